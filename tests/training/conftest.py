"""A small real data set and tiny models for the tests of the training loop."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from src.datasets import Augmentation, Batches, load_dataset
from src.training import Dynamics, Trainer, TrainingConfig


class Tiny(nn.Module):
    """A convolution, optional BatchNorm, dropout and a linear layer: everything that a resume must restore."""

    def __init__(self, batchnorm: bool = True, dropout: float = 0.2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * 16, 10)

    def features(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.dropout(x.flatten(1))

    def forward(self, x):
        return self.head(self.features(x))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    train, test = load_dataset("digits", tmp_path_factory.mktemp("data"))
    return train.subset(torch.arange(3, 203)), test.subset(torch.arange(50))


@pytest.fixture
def make_trainer(digits):
    """Build a trainer on 200 digits; keyword arguments override settings of the loop."""
    train, test = digits
    norm = train.entry.normalizations["samis"]

    def make(
        *,
        batchnorm=True,
        dropout=0.2,
        dynamics=True,
        weights=None,
        batch_size=64,
        augment=True,
        dtype=torch.float32,
        train=train,
        model=None,
        after_step=(),
        group=None,
        sync_batchnorm=False,
        compile_model=False,
        **settings,
    ):
        config = replace(TrainingConfig(epochs=4, learning_rate=0.05, lr_sched="cosine", seed=7), **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = (model or Tiny(batchnorm, dropout)).to(dtype)
        augmentation = Augmentation(crop_padding=1, flip=True, cutout_holes=1, cutout_length=2) if augment else None
        batches = Batches(
            train, batch_size, normalization=norm, order="shuffled", augmentation=augmentation, seed=7, dtype=dtype
        )
        return Trainer(
            model,
            batches,
            Batches(test, 64, normalization=norm, dtype=dtype),
            config,
            weights=weights,
            dynamics=Dynamics(train.total, 10, torch.device("cpu"), True) if dynamics else None,
            after_step=after_step,
            group=group,
            sync_batchnorm=sync_batchnorm,
            compile_model=compile_model,
        )

    return make
