"""Runs under adverse conditions: no network, full disk, no permissions, odd names, damaged states, many processes."""

import json
import math
import os
import socket
import tempfile
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, FLAG, RunsCode, assert_kept, check, on_a_full_disk, refuse, snapshot, spoilt, unprivileged
from support import ROOT, TRAIN, Forked, as_torchrun, call, folders, succeed, write_blobs

from src.artifacts.io import write_checkpoint
from src.training import RunFiles


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=60)


def quick(blobs, base, *flags):
    return (f"--dataset=npz:{blobs}", "--model=small_mlp", "--batch_size=16", "--lr_sched=const",
            "--learning_rate=0.05", "--epochs=3", *flags, *folders(base, *TRAIN))  # fmt: skip


@pytest.fixture(scope="module")
def finished(blobs, tmp_path_factory):
    """The folder of a finished run of three epochs. Tests restore the files that they change."""
    base = tmp_path_factory.mktemp("finished")
    succeed("train_full.py", *quick(blobs, base))
    return base


def only(base, pattern):
    (path,) = base.rglob(pattern)
    return path


# ---------------------------------------------------------------------------------- losses, settings, damaged states


@pytest.mark.parametrize("optimizer", ["sgd", "sam", "iblr"])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_batch(blobs, tmp_path, optimizer):
    flags = quick(blobs, tmp_path, "--model=mlp", f"--optimizer={optimizer}", "--measure_proxies", "--epochs=1")
    says = (r"epoch 1, batch \d+", "learning.rate")
    refuse("train_full.py", *flags, "--learning_rate=1e30", status=1, says=says)
    assert not list(tmp_path.rglob("*.pt"))
    succeed("train_full.py", *flags)  # leftovers of the failed run do not get in the way


def test_a_last_step_that_breaks_the_network_is_not_saved(blobs, tmp_path):
    flags = quick(blobs, tmp_path, "--model=mlp", "--batch_size=60", "--epochs=1", "--learning_rate=1e30")
    refuse("train_full.py", *flags, status=1, says=("epoch 1", "learning.rate"))
    assert not list(tmp_path.rglob("*.pt"))


def test_other_settings_do_not_replace_results(blobs, finished):
    for flags, says in (
        (("--learning_rate=0.1",), (r"learning_rate \(0\.05 vs. 0\.1\)", "--overwrite")),
        (("--learning_rate=0.1", "--resume"), (r"learning_rate \(0\.05 vs. 0\.1\)", "--overwrite")),
        (("--epochs=2", "--resume"), r"epochs \(3 vs. 2\)"),
    ):
        refuse("train_full.py", *quick(blobs, finished, *flags), status=FILE, says=says, keep=finished)


def test_damaged_results(blobs, tmp_path):
    flags = quick(blobs, tmp_path, "--epochs=1")
    succeed("train_full.py", *flags)
    path = only(tmp_path, "results.json")
    for content in ("{broken", "[1, 2]", "{}", '{"settings": 3, "history": [1]}'):
        path.write_text(content)
        refuse("train_full.py", *flags, status=FILE, says=("results.json", "--overwrite"), keep=tmp_path)
    succeed("train_full.py", *flags, "--overwrite")
    assert json.loads(path.read_text())["finished"]


def saved(tmp_path, state):
    return write_checkpoint(tmp_path / "state.pt", state).read_bytes()


def test_a_bad_state_is_named_and_the_one_before_it_is_used(blobs, finished, tmp_path):
    newest = only(finished, "epoch=3.pth.tar")
    proof = tmp_path / "proof"
    torch.save({"format": "resume-1", "model": RunsCode(proof)}, tmp_path / "evil.pt")
    files = RunFiles(newest.parent, newest.parent)
    content, intact = newest.read_bytes(), files.read_state(3)
    for bad in (
        *(content[:3000], b"junk", (tmp_path / "evil.pt").read_bytes(), saved(tmp_path, {"a": 1})),
        saved(tmp_path, {"format": "resume-1", "epoch": 3}),
    ):
        with spoilt(newest, bad):
            done = succeed("train_full.py", *quick(blobs, finished, "--resume"))
            (warning,) = [line for line in done.err.splitlines() if "| WARNING" in line]
            assert str(newest) in warning
            assert "continuing after epoch 2 of 3" in done.err
            again = files.read_state(3)["model"]
            assert all(torch.equal(again[name], value) for name, value in intact["model"].items())
    assert not proof.exists()


def test_a_state_that_does_not_fit_is_named(blobs, finished, tmp_path):
    newest = only(finished, "epoch=3.pth.tar")
    # in the format of earlier versions, which includes the weights
    intact = {**RunFiles(newest.parent, newest.parent).read_state(3), "format": "resume-1"}
    steps, epochs = intact["optimizer"], intact["history"]

    def optimizer(spoil):
        return {**steps, "state": {i: {n: spoil(v) for n, v in s.items()} for i, s in steps["state"].items()}}

    for changes in (
        {"model": {name: value[:1] for name, value in intact["model"].items()}},
        {"model": {name: value.to(torch.complex64) for name, value in intact["model"].items()}},
        *({"model": 3}, {"optimizer": {}}, {"optimizer": {**steps, "state": {99: steps["state"][0]}}}),
        *(
            {"optimizer": optimizer(spoil)}
            for spoil in (
                lambda v: v[:1],
                lambda v: v.long(),
                lambda v: v.to(torch.complex64),
                lambda v: v.sum(),
                str,
            )
        ),
        *(
            {"optimizer": {**steps, "param_groups": [{**steps["param_groups"][0], name: value}]}}
            for name, value in (("lr", "a"), ("momentum", "a"), ("params", 3), ("nesterov", None))
        ),
        *({"history": value} for value in (7, [], epochs[:2], [*epochs[:2], 5])),
        {"history": [*epochs[:2], {**epochs[2], "test_accuracy": "text"}]},
        {"history": [*epochs[:2], {**epochs[2], "train_seconds": torch.zeros(2)}]},
    ):
        with spoilt(newest, saved(tmp_path, {**intact, **changes})):
            refuse("train_full.py", *quick(blobs, finished, "--resume"), status=FILE, says="epoch=3.pth.tar",
                   keep=finished)  # fmt: skip


@pytest.mark.parametrize("content", ["junk", "other shape"])
def test_damaged_dynamics_make_the_run_start_again(blobs, tmp_path, content):
    flags = quick(blobs, tmp_path, "--measure_proxies", "--resume")
    succeed("train_full.py", *flags)
    path, row = only(tmp_path, "dynamics.npz"), only(tmp_path, "dynamics_epoch=1.npz")
    first = path.read_bytes()
    if content == "junk":
        row.write_text(content)
    else:
        np.savez(row, row=np.zeros(3))
    done = succeed("train_full.py", *flags)
    assert done.err.count(f"{row}: ") == 2, "both states need this row"
    assert "training from scratch" in done.err
    assert path.read_bytes() == first


def test_damaged_pretraining_is_made_again(blobs, tmp_path):
    run = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=herding", "--coreset_pretrain_epochs=1",
           *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("select_coreset.py", *run, f"--out={tmp_path / 'first.npz'}")
    (folder,) = (tmp_path / "models" / "pretrain").rglob("seed_1")
    for number, spoil in enumerate((lambda: (folder / "results.json").write_text("{"), (folder / "last.pt").unlink)):
        spoil()
        for name in ("logits", "embeddings"):
            (folder / f"{name}.npz").unlink()
        out = tmp_path / f"{number}.npz"
        succeed("select_coreset.py", *run, f"--out={out}")
        assert (folder / "last.pt").exists()
        with np.load(out) as again, np.load(tmp_path / "first.npz") as first:
            np.testing.assert_array_equal(again["indices"], first["indices"])


# -------------------------------------------------------------------------------------- files to write and read


@pytest.mark.parametrize("name", ["models", "metrics", "log", "resume_ckpts"])
def test_a_folder_that_cannot_be_written_is_found_before_training(blobs, tmp_path, name):
    (tmp_path / name).write_text("a file in place of a folder")
    done = call("train_full.py", *quick(blobs, tmp_path, "--measure_proxies", "--verbose"))
    check(done, "train_full.py", FILE, f"{tmp_path / name}/")
    assert "epoch 1/3" not in done.err
    assert (tmp_path / name).read_text() == "a file in place of a folder"


def test_splits_that_cannot_be_written(blobs, tmp_path):
    (tmp_path / "datasets").write_text("")
    refuse("train_split.py", *quick(blobs, tmp_path), status=FILE, says="datasets/splits/", keep=tmp_path)


def test_a_disk_that_fills_while_a_run_goes_on(blobs, finished, tmp_path):
    for base, limit in ((tmp_path, 100), (finished, 6000)):  # at the start, and during the run
        before = snapshot(base)
        done = on_a_full_disk(limit, "train_full.py", *quick(blobs, base, "--epochs=5", "--resume"))
        check(done, "train_full.py", FILE, r"results\.json: |seed_1/\S+: ", "free disk space")
        assert_kept({path: content for path, content in before.items() if path.name != "results.json"}, base)
    assert "continuing after epoch 3 of 5" in succeed("train_full.py", *quick(blobs, finished, "--resume",
                                                      "--epochs=5")).err  # fmt: skip


def test_a_disk_that_is_full_when_scores_are_written(world):
    for script, flags, limit in (
        ("compute_sam_sgd.py", world.compute("--overwrite"), 1000),
        ("average_scores.py", world.average("--overwrite"), 300),
    ):
        before = snapshot(world.base)
        check(on_a_full_disk(limit, script, *flags), script, FILE, f"{world.base / 'metrics'}/", "free disk space")
        assert_kept(before, world.base)


def test_a_folder_that_may_not_be_entered_is_not_called_empty():
    with tempfile.TemporaryDirectory() as base:  # not tmp_path, whose parent folders only the owner can enter
        closed = Path(base, "closed")
        closed.mkdir(mode=0)
        Path(base).chmod(0o755)
        call("plot_proxies.py", "--dataset=digits", "--modes=flat")  # import modules that only root can read
        with unprivileged():
            refuse("plot_proxies.py", "--dataset=digits", "--modes=flat", f"--scores_folder={closed}", status=FILE,
                   says=(f"{closed}.*: Permission denied",))  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """Two classes of gray 8x8 images."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def train_on(data, base, *flags):
    return (f"--dataset={data}", "--model=mlp", "--epochs=1", "--batch_size=16", *flags, *folders(base, *TRAIN))


def test_pictures_that_do_not_fit_in_memory(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("src.datasets.own_images.resize", full)
    flags = train_on(f"folder:{photos}", tmp_path)
    refuse("train_full.py", *flags, "--image_size=9999", status=FILE, says="memory")
    monkeypatch.undo()
    succeed("train_full.py", *flags)


def test_pipes_are_not_waited_for(photos, blobs, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = train_on(f"folder:{photos}", tmp_path)
    for more in ((f"--dataset=npz:{pipe}",), (f"--subset={pipe}",),
                 (f"--pretrained={pipe}", "--model=vit", "--image_size=32")):  # fmt: skip
        refuse("train_full.py", *flags, *more, status=FILE, says="pipe: ")
    pruning = (f"--dataset=npz:{blobs}", "--model=small_mlp", f"--selection={pipe}", *folders(tmp_path, *TRAIN))
    refuse("train_prune.py", *pruning, status=FILE, says="pipe: ")
    os.mkfifo(photos / "train" / "dog" / "x.png")
    refuse("train_full.py", *flags, status=FILE, says="x.png: ")


def test_names_that_are_not_utf8_from_training_to_figures(photos, tmp_path):
    for part in ("train", "test"):
        folder = os.fsencode(photos / part)
        os.rename(folder + b"/dog", folder + b"/d\xf6g")
        os.rename(folder + b"/d\xf6g/0.png", folder + b"/d\xf6g/\xff.png")
    place = os.fsdecode(os.fsencode(tmp_path) + b"/phot\xf6s")
    photos.rename(place)
    base = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfctput"))
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", *train_on(f"folder:{place}", base, f"--optimizer={optimizer}", "--lr_sched=const"))
    data, kept = (f"--dataset=folder:{place}", "--model=mlp"), folders(base, "datasets", "metrics")
    succeed("compute_sam_sgd.py", *data, "--epochs=1", *kept, f"--models_folder={base}/models")
    succeed("average_scores.py", *data, "--seeds=1", *kept)
    succeed("plot_images.py", data[0], *kept, f"--plots_folder={base}/plots")
    assert len(list(base.rglob("lowest_*/*.png"))) == 2
    (Path(place) / "test" / os.fsdecode(b"d\xf6g") / "1.png").write_bytes(b"junk")
    done = Forked("train_full.py", *train_on(f"folder:{place}", base)).result()
    check(done, "train_full.py", FILE, "1.png")


# ------------------------------------------------------------------------------------- the network, and processes


@pytest.mark.parametrize("dataset", ["cifar10", "svhn", "mnist", "tiny_imagenet"])
def test_a_download_without_a_network(tmp_path, monkeypatch, dataset):
    patience = []

    def offline(*_, timeout=None, **__):
        patience.append(timeout or socket.getdefaulttimeout())
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    says = (f"datasets/{dataset}", "download")
    refuse("train_full.py", *train_on(dataset, tmp_path), status=FILE, keep=tmp_path, says=says)
    assert patience
    assert all(patience), "a server that never answers would be waited for without end"
    assert socket.getdefaulttimeout() is None


def test_noise_that_processes_cannot_share(blobs, tmp_path):
    """With the real torchrun: each process ends with a one-line message, and torchrun reports their exit status."""
    flags = quick(blobs, tmp_path, "--optimizer=iblr", "--distributed_training")
    agent = find_spec("torch.distributed.run").origin
    launch = ("--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    done = Forked(agent, *launch, ROOT / "train_full.py", *flags).result()
    assert done.status != 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("train_full.py: ")]
    assert "--optimizer" in line
    assert done.err.count("Traceback") == 1, done.err  # the status of torchrun, which reports the failure
    assert f"exitcode  : {FLAG}" in done.err


def test_a_file_that_only_the_leading_process_reads(blobs, finished):
    before = snapshot(finished)
    flags = quick(blobs, finished, "--learning_rate=0.1")
    lines = [result.complaint for result in as_torchrun(2, "train_full.py", *flags, "--distributed_training")]
    assert sum("learning_rate" in line for line in lines) == 1
    assert all("learning_rate" in line or "another training process" in line for line in lines)
    assert_kept(before, finished)
    first, second = as_torchrun(2, "train_full.py", *flags)
    check(first, "train_full.py", FLAG, "--distributed_training")
    assert (second.status, second.err) == (FLAG, "")


# ------------------------------------------------------------------------------ a run whose loss increases

SMALL = ("--dataset=digits", "--subset=100", "--model=small_mlp")
RUN = (*SMALL, "--batch_size=50", "--lr_sched=const")


def history(base):
    (path,) = base.glob("models/*/seed_1/results.json")
    return json.loads(path.read_text())["history"]


@pytest.mark.parametrize(("rate", "diverges"), [("1e9", True), ("0.05", False)])
def test_a_loss_above_that_of_the_untrained_model_is_named(tmp_path, rate, diverges):
    result = succeed("train_full.py", *RUN, "--epochs=4", f"--learning_rate={rate}", *folders(tmp_path, *TRAIN))
    assert ("WARNING   | training did not lower the loss" in result.err) == diverges
    assert ("training did not lower the loss" in result.out) == diverges
    (log,) = tmp_path.glob("log/*/seed_1.log")
    assert ("training did not lower the loss" in log.read_text()) == diverges
    assert history(tmp_path)[0]["untrained_loss"] == pytest.approx(math.log(10), rel=0.2)


def test_a_resumed_run_remembers_the_untrained_model(tmp_path):
    flags = (*RUN, "--batch_size=100", "--learning_rate=1e9", "--resume", *folders(tmp_path, *TRAIN))
    succeed("train_full.py", *flags, "--epochs=1")
    before = history(tmp_path)[0]["untrained_loss"]
    assert before == history(tmp_path)[0]["train_loss"]  # the loss of the only batch, before its step
    result = succeed("train_full.py", *flags, "--epochs=2")
    assert "training did not lower the loss" in result.out
    assert [record.get("untrained_loss") for record in history(tmp_path)] == [before, None]


def test_experiments_and_pretraining_warn_too(tmp_path):
    more = folders(tmp_path, "datasets", "models", "log", "resume_ckpts", "pickles")
    result = succeed("examples/4_evolving_sensitivities.py", *SMALL, "--epochs=2", "--bs=50", "--lr=100",
                     "--hess_init=0.001", "--delta=1", *more)  # fmt: skip
    assert "training did not lower the loss" in result.err
    result = succeed(
        "select_coreset.py",
        *SMALL,
        "--coreset_func=csl",
        "--coreset_fraction=0.5",
        "--coreset_pretrain_epochs=2",
        "--coreset_pretrain_lr=1e5",
        *folders(tmp_path, *TRAIN),
    )
    assert "training did not lower the loss" in result.err
    assert "try more epochs or a smaller learning rate" in result.err
