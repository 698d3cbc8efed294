"""Trained and scored models shared by the tests of bad input."""

import pytest
from support import TRAIN, folders, succeed, write_blobs

from src.datasets import load_dataset
from src.metrics import SCORES

EXAMPLES = 60


class World:
    """Paths of files, and the flags that select them."""

    def __init__(self, base, dataset, name):
        self.base, self.dataset, self.name = base, dataset, name

    def compute(self, *flags):
        return (
            self.dataset,
            "--model=small_mlp",
            "--epochs=3",
            *flags,
            *folders(self.base, "datasets", "models", "metrics"),
        )

    def average(self, *flags):
        return (self.dataset, "--model=small_mlp", "--seeds", "1", "2", *flags, *folders(self.base, "metrics"))

    def plot(self, plots, *flags):
        return (
            self.dataset,
            "--modes",
            "samis_loss",
            *flags,
            f"--plots_folder={plots}",
            *folders(self.base, "metrics"),
        )

    def run(self, optimizer="sgd"):
        return f"standard_small_mlp_over_{self.name}_with_{optimizer}_sched_const"

    @property
    def checkpoint(self):
        return self.base / "models" / self.run() / "seed_1" / "epoch_3.pt"

    @property
    def seed_file(self):
        return self.base / "metrics" / self.name / "small_mlp" / "1" / "nn_loss_diff_score.npz"

    @property
    def dynamics(self):
        return self.base / "metrics" / self.run() / "seed_1" / "dynamics.npz"

    @property
    def scores(self):
        return SCORES["samis_loss"].path(self.base / "metrics", self.name)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two seeds of a pair of models, scored and averaged. Tests restore the files that they change."""
    base = tmp_path_factory.mktemp("world")
    data = write_blobs(base / "blobs.npz", n=EXAMPLES)
    place = World(base, f"--dataset=npz:{data}", load_dataset(f"npz:{data}", base)[0].entry.name)
    for seed in (1, 2):
        for optimizer in ("sgd", "sam"):
            succeed("train_full.py", place.dataset, "--model=small_mlp", "--epochs=3", "--batch_size=16",
                    "--learning_rate=0.05", "--lr_sched=const", f"--optimizer={optimizer}", f"--seed={seed}",
                    "--measure_proxies", *folders(base, *TRAIN))  # fmt: skip
        succeed("compute_sam_sgd.py", *place.compute(f"--seed={seed}"))
    succeed("average_scores.py", *place.average())
    return place
