"""Planted truth: examples whose labels were flipped must score high, whatever the score."""

import numpy as np
import pytest
from support import TRAIN, folders, succeed

from src.datasets import load_dataset
from src.metrics import Proxy
from src.metrics.compare import auroc

# What a broken score (chance is 0.5) would miss; each floor lies well under what is printed.
FLOORS = {
    "samis_loss": 0.8, "samis_prob": 0.8, "mean_loss": 0.8, "forg": 0.6, "etl": 0.8, "flat": 0.6, "eps": 0.6,
    "csl": 0.8, "aum": 0.8, "dual": 0.6, "dyn_unc": 0.6, "el2n": 0.8,
}  # fmt: skip
EPOCHS = 16


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The digits with 5 % of the training labels flipped; trained, scored and averaged by the scripts."""
    base = tmp_path_factory.mktemp("noisy")
    train, test = load_dataset("digits", base)
    rng = np.random.default_rng(0)
    labels = train.labels.numpy().copy()
    flipped = np.zeros(len(labels), bool)
    flipped[rng.choice(len(labels), round(0.05 * len(labels)), replace=False)] = True
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    images = [part.fetch(np_indices(part)).permute(0, 2, 3, 1).numpy() for part in (train, test)]
    path = base / "noisy.npz"
    np.savez(path, x_train=images[0], y_train=labels, x_test=images[1], y_test=test.labels.numpy())
    dataset = f"--dataset=npz:{path}"
    for optimizer in ("sgd", "sam"):
        succeed(
            "train_full.py", dataset, "--model=resnet8", f"--optimizer={optimizer}", f"--epochs={EPOCHS}",
            "--batch_size=128", "--learning_rate=0.1", "--lr_sched=const", "--measure_proxies", "--save_epochs=last",
            *folders(base, *TRAIN),
        )  # fmt: skip
    reading = folders(base, "datasets", "models", "metrics")
    succeed("compute_sam_sgd.py", dataset, "--model=resnet8", f"--epochs={EPOCHS}", *reading)
    averaging = ("average_scores.py", dataset, "--model=resnet8", "--seeds", 1, *folders(base, "datasets", "metrics"))
    succeed(*averaging)
    succeed(*averaging, "--optimizer=sgd")
    return load_dataset(f"npz:{path}", base)[0].entry.name, base / "metrics", flipped


def np_indices(part):
    import torch

    return torch.arange(len(part))


@pytest.mark.parametrize("mode", FLOORS)
def test_flipped_labels_score_high(noisy, mode, capsys):
    name, metrics, flipped = noisy
    value = auroc(Proxy(mode, name, folder=metrics).scores, flipped)
    with capsys.disabled():
        print(f"\n  AUROC of {mode} for flipped labels: {value:.3f}", end="")
    assert value > FLOORS[mode]
