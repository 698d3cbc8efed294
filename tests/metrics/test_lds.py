"""Linear datamodeling score: exactly 1 where models are linear in the subset, and the script."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from refusals import FILE, FLAG, refuse
from support import TRAIN, folders, succeed, write_blobs
from torch import nn

from mpe.attribution import margins, predicted_contributions
from src.jacobians import Posterior
from src.metrics.lds import linear_datamodeling_scores, mean_interval


def test_margin_is_the_log_odds_of_the_label():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(margins(logits, labels), p.log() - (1 - p).log())


def test_predictions_are_exact_for_one_step_of_a_linear_model():
    """From zero weights, the weights after a full-batch step are a sum over the subset.

    With two classes, so is the margin. The step is the Memory-Perturbation Equation with the covariance of SGD, the
    learning rate.
    """
    rng = np.random.default_rng(0)
    draw = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 6, dtype=torch.float64, generator=draw) for n in (30, 8))
    labels, test_labels = (torch.randint(2, (n,), generator=draw) for n in (30, 8))
    model, rate = nn.Linear(6, 2).double(), 0.3
    for p in model.parameters():
        nn.init.zeros_(p)
    included = rng.random((40, 30)) < 0.7
    outputs = np.empty((40, 8))
    for m, mask in enumerate(included):
        losses = nn.functional.cross_entropy(model(train[mask]), labels[mask], reduction="sum")
        weight, bias = (-rate * gradient for gradient in torch.autograd.grad(losses, model.parameters()))
        outputs[m] = margins(test @ weight.T + bias, test_labels).numpy()
    posterior = Posterior({name: torch.full_like(p, rate) for name, p in model.named_parameters()})
    contributions = predicted_contributions(model, posterior, [(test, test_labels)], [(train, labels)])
    np.testing.assert_allclose(included @ contributions.T, outputs, rtol=1e-10, atol=1e-12)
    assert linear_datamodeling_scores(contributions, included, outputs) == pytest.approx(np.ones(8))
    assert linear_datamodeling_scores(-contributions, included, outputs) == pytest.approx(-np.ones(8))


def test_score_is_scipys_spearman_per_test_example():
    rng = np.random.default_rng(0)
    attribution, included = rng.normal(size=(3, 20)), rng.random((15, 20)) < 0.5
    outputs = rng.normal(size=(15, 3))
    outputs[:, 2] = 1.0  # every model agrees: no correlation
    found = linear_datamodeling_scores(attribution, included, outputs)
    for t in range(2):
        sums = [attribution[t, mask].sum() for mask in included]
        assert found[t] == pytest.approx(scipy.stats.spearmanr(sums, outputs[:, t]).statistic)
    assert np.isnan(found[2])
    mean, low, high = mean_interval(found, 200, 0.9, 0)
    assert mean == pytest.approx(found[:2].mean())
    assert min(found[:2]) == pytest.approx(low)
    assert max(found[:2]) == pytest.approx(high)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Blobs with 100 members, their memorization, and a model trained on everything."""
    base = tmp_path_factory.mktemp("lds")
    data = write_blobs(base / "blobs.npz", n=60, classes=3, size=4)
    flags = (f"--dataset=npz:{data}", "--model=small_mlp", "--batch_size=20", "--learning_rate=0.1",
             "--lr_sched=const", "--epochs=15")  # fmt: skip
    succeed("compute_memorization.py", *flags, "--members=100", *folders(base, "datasets", "metrics"))
    succeed("train_full.py", *flags, "--measure_proxies", *folders(base, *TRAIN))
    (members,) = (base / "metrics" / "memorization" / "members").glob("*/*/*")
    (checkpoint,) = (base / "models").glob("standard_*/seed_1/last.pt")
    return base, f"--dataset=npz:{data}", members, checkpoint


def test_the_script_measures_attributions_from_files_and_of_mpe(toy, tmp_path):
    base, dataset, members, checkpoint = toy
    content = np.load(members / "members_1.npz")
    included = np.unpackbits(content["included"], axis=1, count=60).astype(bool)
    outputs = content["test_margin"].astype(np.float64)  # (100, 15)
    centered = included - included.mean(0)
    # fitted to these outputs, so it predicts them better than any attribution that has not seen them
    fitted = np.linalg.lstsq(centered, outputs - outputs.mean(0), rcond=None)[0].T
    np.save(tmp_path / "fitted.npy", fitted)
    np.save(tmp_path / "random.npy", np.random.default_rng(0).normal(size=fitted.shape))
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path}", "--resamples=20")
    done = succeed("evaluate_scores.py", *flags, f"--members={members}", "--test_examples=10",
                   f"--mpe_checkpoint={checkpoint}", "--attribution", f"least squares={tmp_path / 'fitted.npy'}",
                   tmp_path / "random.npy")  # fmt: skip
    (path,) = (tmp_path / "scores").glob("*/lds.json")
    rows = {row["attribution"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["least squares", "random", "MPE"]
    assert rows["least squares"]["lds"] > 0.6
    assert abs(rows["random"]["lds"]) < 0.1
    assert 0.05 < rows["MPE"]["lds"] < rows["least squares"]["lds"]
    assert {(row["test_examples"], row["members"]) for row in rows.values()} == {(10, 100)}
    # 15 epochs, GGN (a forward and two backward passes), the training and 10 of 60 test examples' gradients
    assert rows["MPE"]["cost"] == pytest.approx(15 + 5 / 3 + 1 + 10 / 60)
    assert "| MPE |" in done.out


def test_bad_attributions_and_members_end_in_one_line(toy, tmp_path):
    base, dataset, members, _ = toy
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path / 'plots'}", "--resamples=20")
    np.save(tmp_path / "wide.npy", np.zeros((15, 61)))
    (tmp_path / "empty").mkdir()
    attribution = ("--attribution", tmp_path / "wide.npy")
    for more, status, says in (
        ((f"--members={members}",), FLAG, "--members .*give --attribution, --mpe_checkpoint, or both"),
        (attribution, FLAG, "--attribution: has no effect without --members"),
        ((f"--members={members}", *attribution, "--mpe_delta=1"), FLAG, "--mpe_delta"),
        ((f"--members={members}", *attribution, "--device=cpu"), FLAG, "--device"),
        ((f"--members={members}", *attribution, "--test_examples=501"), FLAG, "--test_examples"),
        ((f"--members={members}", *attribution), FILE, r"wide.npy: .*15 test x 60 training .*\(15, 61\)"),
        ((f"--members={tmp_path / 'empty'}", *attribution), FILE, "fewer than 3 members"),
    ):
        refuse("evaluate_scores.py", *flags, *more, status=status, says=says, keep=base)
