"""The cost of a score, in epoch-equivalents, from the training runs to the averaged file."""

import numpy as np
import pytest
import torch
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_json, read_npz, write_npz
from src.datasets import Batches, Normalization, load_dataset
from src.metrics import SCORES, Proxy
from src.metrics.dynamics import END_SCORES
from src.models import build_model


def test_epochs_and_passes_of_a_pair_add_up_over_seeds(world):
    base = world.base
    for optimizer, each in (("sgd", 1.0), ("sam", 2.0)):
        folder = base / "models" / world.run(optimizer) / "seed_1"
        assert [record["cost"] for record in read_json(folder / "results.json")["history"]] == [each] * 3
        assert read_checkpoint(folder / "epoch_2.pt")["cost"] == 2 * each
        assert (
            read_npz(base / "metrics" / world.run(optimizer) / "seed_1" / "dynamics.npz")["costs"].tolist()
            == [each] * 3
        )
    assert read_npz(world.seed_file)["cost"] == pytest.approx(
        3 + 6 + 2 / 3
    )  # both runs, a forward pass of each model
    assert Proxy("samis_loss", world.name, folder=base / "metrics").record["cost"] == pytest.approx(2 * (9 + 2 / 3))


def test_scores_of_a_run_cost_its_epochs_and_their_own_passes(world, tmp_path):
    for path in (world.base / "metrics").glob("standard_*/**/*"):
        if path.is_file():
            target = tmp_path / "metrics" / path.relative_to(world.base / "metrics")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    modes = ("csl", "el2n", "flat", "eps", "end_loss", "late_rank")
    flags = (
        world.dataset,
        "--model=small_mlp",
        "--seeds",
        "1",
        "2",
        "--optimizer=sam",
        *folders(tmp_path, "metrics"),
    )
    succeed("average_scores.py", *flags, "--modes", *modes, "--el2n_epochs", 1, 2)
    costs = {mode: Proxy(mode, world.name, folder=tmp_path / "metrics").record["cost"] for mode in modes}
    late = pytest.approx(2 * (6 + 2 / 3))  # own data is flipped, so there are two views
    expected = {"csl": 2 * 6, "el2n": 2 * 4, "flat": 2 * (6 + 2), "eps": 2 * (6 + 1), "end_loss": late}
    assert costs == expected | {"late_rank": late}

    # a run of an older version: its cost is unknown, and not part of what decides whether a file is replaced
    path = tmp_path / "metrics" / world.run("sam") / "seed_2" / "dynamics.npz"
    write_npz(path, **{name: array for name, array in read_npz(path).items() if name != "costs"})
    succeed("average_scores.py", *flags, "--modes", "csl")
    assert "cost" not in Proxy("csl", world.name, folder=tmp_path / "metrics").record


def test_a_held_out_split_costs_a_tenth_less(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=60)
    flags = (f"--dataset=npz:{data}", "--model=small_mlp", "--epochs=2", "--batch_size=20", "--learning_rate=0.05",
             "--lr_sched=const", *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("train_split.py", *flags, "--samis_validation_split_index=3")
    (results,) = (tmp_path / "models").glob("*/seed_1/results.json")
    assert [record["cost"] for record in read_json(results)["history"]] == pytest.approx([0.9, 0.9])


def test_a_run_that_an_older_version_began_has_no_cost(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=60)
    flags = (f"--dataset=npz:{data}", "--model=small_mlp", "--batch_size=20", "--learning_rate=0.05",
             "--lr_sched=const", "--measure_proxies", *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("train_full.py", *flags, "--epochs=1")
    (state,) = (tmp_path / "resume_ckpts").glob("**/epoch=1.pth.tar")
    content = read_checkpoint(state)
    del content["history"][0]["cost"]
    torch.save(content, state)
    succeed("train_full.py", *flags, "--epochs=2", "--resume")
    (last,) = (tmp_path / "models").glob("*/seed_1/last.pt")
    assert read_checkpoint(last)["cost"] is None
    (dynamics,) = (tmp_path / "metrics").glob("*/seed_1/dynamics.npz")
    assert "costs" not in read_npz(dynamics)


@pytest.mark.parametrize("score", END_SCORES, ids=lambda score: score.name)
def test_declared_passes_are_those_that_the_model_makes(score, tmp_path):
    train, _ = load_dataset("digits", tmp_path)
    batches = Batches(train.subset(torch.arange(600)), 100, normalization=Normalization((0.3,), (0.4,)), device="cpu")
    counts = np.zeros(2)  # examples in forward and in backward passes

    def count(model, inputs, outputs):
        counts[0] += len(outputs)
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: counts.__setitem__(1, counts[1] + len(gradient)))

    model = build_model("lenet", 10, 1, 8, seed=0)
    model.register_forward_hook(count)
    score.compute(model, batches)
    # checks on a few examples of the first batch are not counted
    assert counts @ [1 / 3, 2 / 3] / 600 == pytest.approx(score.passes, rel=0.2)  # digits are not flipped
    assert SCORES[score.name].passes == score.passes


def test_the_cost_of_a_sensitivity_has_a_backward_pass_per_class(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=60)
    places = folders(tmp_path, "datasets", "models", "metrics", "log", "resume_ckpts", "pickles")
    flags = (f"--dataset=npz:{data}", "--model=small_mlp", "--epochs=2", "--bs=20", "--name_exp=toy", *places)
    succeed("examples/1_loo_iterations.py", *flags, "--optimizer=sgd", "--write_scores")
    (path,) = (tmp_path / "metrics" / "mpe").glob("*.json")
    # two epochs; GGN: a forward and 2 backward passes; variances: a forward and 3 backward passes
    assert read_json(path)["cost"] == pytest.approx(2 + (1 + 2 * 2) / 3 + (1 + 2 * 3) / 3)
