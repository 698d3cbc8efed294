"""Examples with flipped labels must get high values of every score."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support import TRAIN, folders, succeed

from src.datasets import load_dataset
from src.metrics import Proxy

# Lower bounds that a broken score would miss (chance is 0.5 +- 0.035); each is well below the printed value.
FLOORS = {
    "samis_loss": 0.8, "samis_prob": 0.8, "mean_loss": 0.8, "forg": 0.75, "etl": 0.85, "csl": 0.9, "aum": 0.9,
    "dual": 0.85, "dyn_unc": 0.8, "el2n": 0.9,
}  # fmt: skip
# The two flatness scores detect flipped labels less well, and only in models that have overfitted them.
FLATNESS_FLOORS = {"flat": 0.58, "eps": 0.57}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Digits with 5% of the training labels flipped: the file, a folder, and the flipped examples."""
    base = tmp_path_factory.mktemp("noisy")
    train, test = load_dataset("digits", base)
    rng = np.random.default_rng(0)
    labels = train.labels.numpy().copy()
    flipped = np.zeros(len(labels), bool)
    flipped[rng.choice(len(labels), round(0.05 * len(labels)), replace=False)] = True
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    images = [part.fetch(torch.arange(len(part))).permute(0, 2, 3, 1).numpy() for part in (train, test)]
    path = base / "noisy.npz"
    np.savez(path, x_train=images[0], y_train=labels, x_test=images[1], y_test=test.labels.numpy())
    return path, base, flipped


def check(noisy, model, mode, floor, capsys):
    path, base, flipped = noisy
    name = load_dataset(f"npz:{path}", base)[0].entry.name
    value = roc_auc_score(flipped, Proxy(mode, name, folder=base / model / "metrics").scores)
    with capsys.disabled():
        print(f"\n  AUROC of {mode} ({model}) for flipped labels: {value:.3f}", end="")
    assert value > floor


@pytest.fixture(scope="module")
def premature(noisy):
    """The premature protocol: an SGD- and a SAM-trained resnet8, 16 epochs, their scores and the dynamics."""
    path, base, _ = noisy
    base, dataset = base / "resnet8", f"--dataset=npz:{path}"
    for optimizer in ("sgd", "sam"):
        succeed(
            "train_full.py", dataset, "--model=resnet8", f"--optimizer={optimizer}", "--epochs=16",
            "--batch_size=128", "--learning_rate=0.1", "--lr_sched=const", "--measure_proxies", "--save_epochs=last",
            *folders(base, *TRAIN),
        )  # fmt: skip
    reading = folders(base, "datasets", "models", "metrics")
    succeed("compute_sam_sgd.py", dataset, "--model=resnet8", "--epochs=16", *reading)
    averaging = ("average_scores.py", dataset, "--model=resnet8", "--seeds", 1, *folders(base, "datasets", "metrics"))
    succeed(*averaging)
    succeed(*averaging, "--optimizer=sgd")


@pytest.mark.parametrize("mode", FLOORS)
def test_flipped_labels_score_high(noisy, premature, mode, capsys):
    check(noisy, "resnet8", mode, FLOORS[mode], capsys)


@pytest.fixture(scope="module")
def overfitted(noisy):
    """Two small models trained until they have memorized many of the flipped labels."""
    path, base, _ = noisy
    base, dataset = base / "small_mlp", f"--dataset=npz:{path}"
    for seed in (1, 2):
        succeed(
            "train_full.py", dataset, "--model=small_mlp", f"--seed={seed}", "--epochs=50", "--batch_size=32",
            "--learning_rate=0.1", "--lr_sched=cosine", "--measure_proxies", "--save_epochs=last",
            *folders(base, *TRAIN),
        )  # fmt: skip
    succeed(
        "average_scores.py", dataset, "--model=small_mlp", "--seeds", 1, 2, "--modes", "flat", "eps",
        *folders(base, "datasets", "metrics"),
    )  # fmt: skip


@pytest.mark.parametrize("mode", FLATNESS_FLOORS)
def test_flipped_labels_are_less_flat_where_they_are_overfitted(noisy, overfitted, mode, capsys):
    check(noisy, "small_mlp", mode, FLATNESS_FLOORS[mode], capsys)


SENSITIVITIES = {  # posterior and form: the flags that make them, and the floor
    "mpe kfac diag": (("--lr=0.02", "--lrmin=0.001"), 0.8),
    "mpe kfac full": (("--lr=0.02", "--lrmin=0.001", "--class_cov=full"), 0.8),
    "mpe iblr diag": (("--lr=0.05", "--lrmin=0", "--optimizer=iblr", "--optim_var"), 0.65),
}


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_flipped_labels_are_sensitive(noisy, name, capsys):
    """The Memory-Perturbation Equation on a small model."""
    path, base, _ = noisy
    (more, floor), base = SENSITIVITIES[name], base / name
    succeed(
        "examples/1_loo_iterations.py", f"--dataset=npz:{path}", "--model=small_mlp", "--epochs=30", "--bs=32",
        "--delta=5", "--name_exp=noisy", "--write_scores", *more,
        *folders(base, "datasets", "models", "metrics", "log", "resume_ckpts", "pickles"),
    )  # fmt: skip
    check(noisy, name, "mpe", floor, capsys)
