"""Two processes reach the same weights as one process with the same global batch."""

import numpy as np
import pytest
import torch
from support import ROOT, TRAIN, as_torchrun, call, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_npz

COMMON = ("--epochs=2", "--learning_rate=0.05", "--lr_sched=const", "--data_augmentation", "--precision=fp64",
          "--measure_proxies")  # fmt: skip


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    # 121 examples in batches of 8: the last batch has one example, so one process gets none
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=121)


def torchrun(world, script, *flags):
    for result in as_torchrun(world, script, *flags):
        assert result.status == 0, result.err[-3000:]


def last(base):
    (path,) = (base / "models").glob("*/seed_1/last.pt")
    state = read_checkpoint(path)["model_state"]
    return {name: value.double() for name, value in state.items()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("model", "optimizer", "more"),
    [("mlp", "sam", ()), ("resnet8", "sgd", ("--sync_bn",)), ("resnet8", "sam", ("--sync_bn",))],
)
def test_two_processes_equal_one(blobs, tmp_path, model, optimizer, more):
    batch = (
        8 if model == "mlp" else 30
    )  # the processes' shares of resnet8's batches are still unequal: 121 = 4 * 30 + 1
    flags = (
        f"--dataset=npz:{blobs}",
        f"--model={model}",
        f"--optimizer={optimizer}",
        f"--batch_size={batch}",
        *COMMON,
    )
    succeed("train_full.py", *flags, *folders(tmp_path / "one", *TRAIN))
    torchrun(2, "train_full.py", *flags, *more, "--distributed_training", *folders(tmp_path / "two", *TRAIN))
    assert_close(last(tmp_path / "one"), last(tmp_path / "two"))
    arrays = [read_npz(next((tmp_path / x / "metrics").glob("*/seed_1/dynamics.npz"))) for x in ("one", "two")]
    for name in ("loss", "correct", "margin", "el2n", "divergence"):
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_resume_with_another_number_of_processes(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--optimizer=sgd", "--batch_size=8", *COMMON)
    succeed("train_full.py", *flags, "--epochs=3", *folders(tmp_path / "one", *TRAIN))
    torchrun(2, "train_full.py", *flags, "--epochs=1", "--distributed_training", *folders(tmp_path / "two", *TRAIN))
    succeed("train_full.py", *flags, "--epochs=3", "--resume", *folders(tmp_path / "two", *TRAIN))
    assert_close(last(tmp_path / "one"), last(tmp_path / "two"))


WORKER = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
from src.datasets import Batches, load_dataset
from src.models import build_model
from src.training import ProcessGroup, Trainer, TrainingConfig
group = ProcessGroup.from_environment()
group.start(torch.device("cpu"))
train, test = load_dataset("npz:" + sys.argv[1], "unused")
norm = train.entry.normalizations["samis"]
model = build_model("mlp", 3, 1, 8, seed=1).double()
cut = dict(normalization=norm, dtype=torch.float64, rank=group.rank, world=group.world)
weights = torch.linspace(0.1, 3, len(train), dtype=torch.float64)
trainer = Trainer(model, Batches(train, 50, order="shuffled", seed=3, **cut), Batches(test, 50, **cut),
                  TrainingConfig(epochs=2, learning_rate=0.05, optimizer=sys.argv[2], precision="fp64"),
                  weights=weights, group=group)
trainer.fit()
if group.is_main_process:
    torch.save({{"model": model.state_dict(), "history": trainer.history}}, sys.argv[3])
group.stop()
"""


@pytest.mark.parametrize("optimizer", ["sgd", "sam"])
def test_weighted_batches(blobs, tmp_path, optimizer):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), tests=str(ROOT / "tests")))
    for world in (1, 2):
        torchrun(world, script, blobs, optimizer, tmp_path / f"{world}.pt")
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert_close(one["model"], two["model"])
    for a, b in zip(one["history"], two["history"], strict=True):
        for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name


def test_bad_starts_are_one_line(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=mlp", "--epochs=1", *folders(tmp_path, *TRAIN))
    result = call("train_full.py", *flags, "--distributed_training")
    assert result.status == 2
    assert "start the script with torchrun" in result.complaint


def test_two_processes_choose_and_train_as_one(blobs, tmp_path):
    """Both processes train the models of el2n, the main process selects, and both train on its selection."""
    flags = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=el2n", "--coreset_fraction=0.5",
             "--coreset_epochs=2", "--coreset_pretrain_epochs=2", "--coreset_networks=2",
             "--coreset_pretrain_lr=0.05", "--batch_size=8",
             "--learning_rate=0.05", "--lr_sched=const", "--precision=fp64")  # fmt: skip
    succeed("train_prune.py", *flags, *folders(tmp_path / "one", *TRAIN))
    torchrun(2, "train_prune.py", *flags, "--distributed_training", *folders(tmp_path / "two", *TRAIN))
    for one in (tmp_path / "one" / "models").glob("el2n_*/seed_1/selection.npz"):
        two = read_npz(tmp_path / "two" / one.relative_to(tmp_path / "one"))
        np.testing.assert_array_equal(read_npz(one)["indices"], two["indices"])
    states = [
        read_checkpoint(next((tmp_path / name / "models").glob("el2n_*/seed_1/last.pt")))["model_state"]
        for name in ("one", "two")
    ]
    assert_close(*states)
