"""compute_hessian_eigen.py as users run it: successful runs, bad input, interruptions."""

import io
import json
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from refusals import FILE, FLAG, RunsCode, refuse, spoilt
from support import Forked, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_json
from src.datasets import load_dataset

SCRIPT = "compute_hessian_eigen.py"
SMALL = ("--lanczos_steps=8", "--trace_probes=3", "--tolerance=0.5")


@pytest.fixture
def flags(world, tmp_path):
    """The flags of a small measurement of the shared models, written to an empty folder."""
    return (world.dataset, "--model=small_mlp", "--epochs=3", f"--hessian_folder={tmp_path / 'h'}", *SMALL,
            *folders(world.base, "datasets", "models", "metrics"))  # fmt: skip


def folder_of(world, tmp_path, optimizer="sgd", part="train", spec="all"):
    name = f"{part}_{spec}_small_mlp_over_{world.name}_with_{optimizer}_sched_const_nobn"
    return tmp_path / "h" / name / "1" / "epoch_3"


def packed(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_a_checkpoint_of_train_full(world, flags, tmp_path):
    for optimizer in ("sgd", "sam"):
        result = succeed(SCRIPT, *flags, f"--optimizer={optimizer}", "--precision=fp64", "--lr_sched=const")
        path = folder_of(world, tmp_path, optimizer) / "pyhessian_eigen_lanczos.pkl"
        assert str(path) in result.out
        assert "eigenvalue 5: " in result.out
        assert re.search(r"the Lanczos basis takes \d+ [KM]iB \(9 vectors\), up to \d+ [KM]iB \(301\)", result.err)
        assert "but the loss is over" not in result.err
        stored = pickle.loads(path.read_bytes())
        assert [len(stored[k]) for k in ("eigenvals", "trace", "density_eigen", "density_weight")] == [5, 3, 1, 1]
        record = read_json(path.with_suffix(".json"))
        assert record["settings"]["checkpoint"]
        assert record["settings"]["experiment"] == world.run(optimizer)
        for key in ("loss", "gradient_norm", "products", "seconds", "residuals", "trace_standard_error"):
            assert record[key] is not None
        assert record["products"] == record["lanczos_steps"] + 3
        assert not path.with_suffix(".state").exists()
    assert len(list((tmp_path / "h").rglob("*.pkl"))) == 2


def test_the_numbers_are_those_of_the_loss(world, flags, tmp_path):
    """Compare with a dense Hessian of the checkpoint's mean loss, computed from the files."""
    succeed(SCRIPT, *flags, "--precision=fp64", "--lanczos_steps=60", "--tolerance=1e-6", "--eigen_split=test")
    found = pickle.loads((folder_of(world, tmp_path, part="test") / "pyhessian_eigen_lanczos.pkl").read_bytes())
    from src.training import load_model

    network, state = load_model(world.checkpoint)
    _, test = load_dataset(world.dataset.split("=")[1], world.base)
    images = test.fetch(torch.arange(len(test))).double() / 255
    normal = state["normalisation"]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (normal.mean, normal.std))
    network = network.double()
    loss = torch.nn.functional.cross_entropy(network((images - mean) / std), test.labels)
    parameters = list(network.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(vector):
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradient @ vector, parameters, retain_graph=True)])

    vector = torch.randn(len(gradient), dtype=torch.float64)
    for _ in range(300):  # plain power iteration
        vector = product(vector / vector.norm())
    assert found["eigenvals"][0] == pytest.approx(vector.norm().item(), rel=1e-6)


def test_other_runs_and_files(world, flags, tmp_path):
    flags = [flag for flag in flags if not flag.startswith("--model=")]
    succeed(SCRIPT, *flags, f"--exp={world.run('sam')}")
    assert (folder_of(world, tmp_path, "sam") / "pyhessian_eigen_lanczos.pkl").exists()
    shutil.copy(world.checkpoint, tmp_path / "mine.pt")
    flags.remove("--epochs=3")
    succeed(SCRIPT, *flags, f"--checkpoint={tmp_path / 'mine.pt'}")
    (path,) = folder_of(world, tmp_path).parent.glob("checkpoint_????????/*.pkl")
    assert read_json(path.with_suffix(".json"))["settings"]["epoch"] == 3


def test_parts_of_the_data(world, flags, tmp_path):
    succeed(SCRIPT, *flags, "--high_low_spec=samis_loss:low:0.30")
    succeed(SCRIPT, *flags, "--high_low_spec=samis_loss:high:0.3")
    low, high = (
        read_json(folder_of(world, tmp_path, spec=f"samis_loss:{side}:0.3") / "pyhessian_eigen_lanczos.json")
        for side in ("low", "high")
    )
    assert low["settings"]["examples"] == high["settings"]["examples"] == 18
    assert low["loss"] != high["loss"]
    result = succeed(SCRIPT, *flags, "--subset=30")
    assert "was trained on 60 examples, but the loss is over 30," in result.err
    state = read_checkpoint(world.checkpoint)
    split = packed({**state, "settings": {**state["settings"], "examples": 54}})
    with spoilt(world.checkpoint, split):  # as written by train_split.py and train_prune.py
        result = succeed(SCRIPT, *flags, f"--hessian_folder={tmp_path / 'split'}")
    assert "was trained on 54 examples, but the loss is over 60," in result.err
    says = (r"lanczos\.pkl: was made with different settings", r"examples \(30 vs. 60\)", "--overwrite")
    refuse(SCRIPT, *flags, status=FILE, keep=tmp_path, says=says)
    succeed(SCRIPT, *flags, "--overwrite")


def test_operators_and_modes_have_files_of_their_own(world, flags, tmp_path):
    for more in ((), ("--operator=ggn",), ("--eigen_mode=power_iter", "--power_iterations=5")):
        succeed(SCRIPT, *flags, *more)
    names = {path.name for path in folder_of(world, tmp_path).glob("*.pkl")}
    assert names == {f"pyhessian_eigen_{n}.pkl" for n in ("lanczos", "lanczos_ggn", "power_iter")}
    power = read_json(folder_of(world, tmp_path) / "pyhessian_eigen_power_iter.json")
    assert power["settings"]["order"] == "magnitude"
    assert power["products"] > 8 + 3 + 5  # the products of the residuals are included


def test_what_is_there_is_left(world, flags, tmp_path):
    first = succeed(SCRIPT, *flags)
    path = folder_of(world, tmp_path) / "pyhessian_eigen_lanczos.pkl"
    moment = path.stat().st_mtime_ns
    again = succeed(SCRIPT, *flags)
    assert "already measured" in again.out
    assert path.stat().st_mtime_ns == moment
    assert first.out.splitlines()[:6] == again.out.splitlines()[1:7]
    for flag, says in (("--top_n=3", r"top_n \(5 vs. 3\)"), ("--precision=fp64", "precision"),
                       ("--basis=none", "basis"), ("--probe_seed=5", "probe_seed")):  # fmt: skip
        refuse(SCRIPT, *flags, flag, status=FILE, says=("different settings", says, "--overwrite"), keep=tmp_path)
    with spoilt(path.with_suffix(".json"), None):
        refuse(SCRIPT, *flags, status=FILE, says=("does not record the settings", "--overwrite"), keep=tmp_path)
    with spoilt(path.with_suffix(".json"), b"junk"):
        refuse(SCRIPT, *flags, status=FILE, says=(r"lanczos\.json: ", "damaged", "--overwrite"), keep=tmp_path)
    with spoilt(world.checkpoint, packed({**read_checkpoint(world.checkpoint), "extra": 1})):
        refuse(SCRIPT, *flags, status=FILE, says=("different settings: checkpoint",), keep=tmp_path)


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--epochs=9",), FILE, ("no checkpoint of epoch 9, seed 1", "python train_full.py .*--epochs=9")),
        (("--seed=5",), FILE, ("no checkpoint of epoch 3, seed 5", "python train_full.py")),
        (
            ("--exp=split_lenet_over_x_with_sam_sched_step_val_split_7",),
            FILE,
            (
                "no checkpoint of epoch 3",
                "train_split.py .*--model=lenet --optimizer=sam --lr_sched=step --samis_validation_split_index=7",
            ),
        ),
        (("--exp=standard_mlp_over_x_with_sgd_sched_const",), FILE, ("train_full.py .*--model=mlp --optimizer=sgd",)),
        (("--exp=min_mem_static_coreset_large_0.1_x",), FILE, ("no checkpoint", "made by train_prune.py$")),
        (("--exp=pretrain/x/lenet/0123",), FILE, ("no checkpoint of epoch 3", "made by train_prune.py and select")),
        (("--exp=mpe/mine_iter",), FILE, ("no checkpoint of epoch 3", "made by the scripts in examples/$")),
        (("--exp=other",), FILE, ("no checkpoint of epoch 3, seed 1 for other; check the run's name",)),
        (("--exp=x", "--optimizer=sam"), FLAG, ("--optimizer: has no effect with --exp, which names the run",)),
        (("--checkpoint=x.pt",), FLAG, ("--epochs: has no effect with --checkpoint",)),
        (("--power_iterations=5",), FLAG, ("--power_iterations: has no effect without --eigen_mode",)),
        (
            ("--eigen_mode=power_iter", "--max_steps", "9"),
            FLAG,
            ("--max_steps: has no effect with --eigen_mode=power_iter",),
        ),
        (("--scores_folder=x",), FLAG, ("--scores_folder: has no effect without --high_low_spec",)),
        (("--checkpoint=a.pt", "--exp=b"), FLAG, ("not allowed with",)),
        (("--top_n=100000",), FLAG, ("--top_n 100000: must be at most", "number of parameters")),
        (("--top_n=0",), FLAG, ("--top_n: 0 is not an integer of at least 1",)),
        (("--high_low_spec=mem:0.3",), FLAG, ("--high_low_spec: 'mem:0.3' is not metric:low|high:fraction",)),
        (("--high_low_spec=nope:low:0.3",), FLAG, ("'nope': unknown score", "samis_loss")),
        (("--high_low_spec=mem:low:1.5",), FLAG, ("--high_low_spec: 1.5 is not",)),
        (("--high_low_spec=samis_loss:low:0.001",), FLAG, ("--high_low_spec: 0.001 of 60 examples selects none",)),
        (
            ("--high_low_spec=forg:low:0.5",),
            FILE,
            (r"forg_.*\.pkl: no forgetting events scores", "average_scores.py"),
        ),
        (("--eigen_split=test", "--subset=5"), FLAG, ("--subset: has no effect with --eigen_split=test",)),
        (
            ("--eigen_split=test", "--high_low_spec=samis_loss:low:0.5"),
            FLAG,
            ("--high_low_spec: has no effect with --eigen_split=test",),
        ),
        (("--subset=61",), FLAG, ("--subset 61: must be from 1 to 60",)),
        (
            ("--eigen_mode=power_iter", "--operator=ggn"),
            FLAG,
            (
                "--eigen_mode power_iter",
                "Hessian",
            ),
        ),
        (("--eigen_mode=power_iter", "--eigen_order=largest"), FLAG, ("--eigen_order largest",)),
        (("--precision=bf16",), FLAG, ("--precision: invalid choice: 'bf16'",)),
        (("--hessian_folder=/proc/x",), FILE, ("/proc/x.*: is not writable", "another folder")),
    ],
)
def test_bad_input(world, flags, tmp_path, more, status, says):
    refuse(SCRIPT, *flags, *more, status=status, says=says, keep=tmp_path)
    assert not (tmp_path / "h").exists()


def test_networks_that_do_not_fit(world, flags, tmp_path):
    other = [flag for flag in flags if not flag.startswith("--model=")]
    run = f"--exp={world.run()}"
    refuse(SCRIPT, *other, run, "--model=mlp", status=FILE, says=("not mlp", "--model="))
    refuse(SCRIPT, *(flag for flag in other if flag != "--epochs=3"), "--checkpoint=/none.pt", status=FILE,
           says=(r"/none\.pt: file not found",))  # fmt: skip
    whole, content = read_checkpoint(world.checkpoint), world.checkpoint.read_bytes()
    proof = tmp_path / "proof"
    nothing = {name: value * float("nan") for name, value in whole["model_state"].items()}
    huge = {name: value * 1e38 for name, value in whole["model_state"].items()}
    for bad, says in (
        (content[:2000], "is damaged"),
        (packed({**whole, "extra": RunsCode(proof)}), "could run code"),
        (packed(whole["model_state"]), "not a checkpoint of this project"),
        (packed({**whole, "model_state": nothing}), "is not finite; train it"),
    ):
        with spoilt(world.checkpoint, bad):
            refuse(SCRIPT, *flags, status=FILE, says=(r"epoch_3\.pt: ", says, "again|anew|recreate"), keep=world.base)
    with spoilt(world.checkpoint, packed({**whole, "model_state": huge})):
        refuse(SCRIPT, *flags, status=FILE, says=("the loss is not finite", "--learning_rate"), keep=world.base)
    assert not proof.exists()
    data = write_blobs(tmp_path / "other.npz", n=60, classes=4)
    refuse(SCRIPT, f"--dataset=npz:{data}", *flags[1:], f"--exp={world.run()}", status=FILE,
           says=("was trained on different data", r"num_classes \(3 vs"))  # fmt: skip


def test_scores_of_another_data_set(world, flags, tmp_path):
    wrong = pickle.dumps(dict.fromkeys(range(50), 0.5))
    with spoilt(world.scores, wrong), spoilt(world.scores.with_suffix(".json"), None):
        refuse(SCRIPT, *flags, "--high_low_spec=samis_loss:low:0.5", status=FILE,
               says=(r"samis_loss_.*\.pkl: ", "50 examples, but the data set has 60"))  # fmt: skip


def resumable(world, base):
    """The flags of a longer measurement that is resumed."""
    return (world.dataset, "--model=small_mlp", "--epochs=3", "--lanczos_steps=150", "--trace_probes=150",
            "--trace_tolerance=0", "--tolerance=0.5", "--probes=2", "--save_every=5", "--resume",
            f"--hessian_folder={base}", *folders(world.base, "datasets", "models", "metrics"))  # fmt: skip


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The result of that measurement without interruption."""
    base = tmp_path_factory.mktemp("whole")
    process = Forked(SCRIPT, *resumable(world, base))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return next(base.rglob("*.pkl"))


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_interrupted_and_resumed_gives_the_same_bits(world, whole, tmp_path, sign, status):
    flags = resumable(world, tmp_path / "stopped")
    process = Forked(SCRIPT, *flags)
    for _ in range(3000):
        if list((tmp_path / "stopped").rglob("progress.pt")) or process.poll() is not None:
            break
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    if sign == signal.SIGINT:
        assert err.strip().splitlines()[-1].startswith(f"{SCRIPT}: interrupted;")
    refuse(SCRIPT, *flags, "--top_n=2", status=FILE, says=(r"progress\.pt: was made with different", "top_n"))
    process = Forked(SCRIPT, *flags)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resuming after" in err
    (later,) = (tmp_path / "stopped").rglob("*.pkl")
    assert whole.read_bytes() == later.read_bytes()
    records = [read_json(path.with_suffix(".json")) for path in (whole, later)]
    assert records[0]["products"] == records[1]["products"]
    assert records[1]["resumed"]
    np.testing.assert_array_equal(records[0]["residuals"], records[1]["residuals"])
    assert not list((tmp_path / "stopped").rglob("*.state"))


def test_a_damaged_record_of_what_is_done(world, flags, tmp_path):
    succeed(SCRIPT, *flags)
    (path,) = tmp_path.rglob("*.json")
    record = read_json(path)
    for name, value in (("residuals", [None]), ("eigenvalues", 5), ("gradient_norm", "a"), ("loss", None)):
        with spoilt(path, json.dumps({**record, name: value}).encode()):
            refuse(SCRIPT, *flags, status=FILE, says=(r"\.json: ", "--overwrite|again"))
    del record["converged"]
    with spoilt(path, json.dumps(record).encode()):
        refuse(SCRIPT, *flags, status=FILE, says=(r"\.json: is damaged", "converged", "--overwrite"))


def test_an_interrupted_measurement_of_other_settings_is_not_lost(world, flags, tmp_path):
    state = folder_of(world, tmp_path) / "pyhessian_eigen_lanczos.state"
    power = folder_of(world, tmp_path) / "pyhessian_eigen_power_iter.state"
    iterate = ("--eigen_mode=power_iter", "--power_iterations=3")
    for folder, name, more in ((state, "progress", ()), (power, "power", iterate)):
        folder.mkdir(parents=True)
        torch.save({"settings": {"top_n": 9}}, folder / f"{name}.pt")
        for resume in ((), ("--resume",)):
            says = (rf"{name}\.pt: was made with different settings", r"top_n \(9 vs", "--overwrite")
            refuse(SCRIPT, *flags, *more, *resume, status=FILE, keep=tmp_path, says=says)
        succeed(SCRIPT, *flags, *more, "--resume", "--overwrite")
        assert not folder.exists()
        folder.mkdir()
        (folder / "progress.pt").write_bytes(b"junk")
        succeed(SCRIPT, *flags, *more, "--resume", "--overwrite")
        assert not folder.exists()
