"""The 8x8 digits that ship with scikit-learn: 1,797 real images, no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from src.datasets.catalogue import DatasetEntry
from src.datasets.images import ImageSet

TEST_SHARE = 0.2
SPLIT_SEED = 0  # part of the data set's definition: changing it changes every index


def load_digits(entry: DatasetEntry, folder: Path) -> tuple[ImageSet, ImageSet]:
    """Train and test part: a fixed split that takes a fifth of each class for testing, in original order.

    Args:
        entry: The catalogue entry.
        folder: Not used: the images are embedded.
    """
    # read from scikit-learn's file, as importing scikit-learn takes a second
    file = Path(find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    images = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)  # values 0..16
    labels = table[:, -1].astype(np.int64)
    generator = np.random.RandomState(SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(entry.num_classes):
        members = np.flatnonzero(labels == label)
        held_out[generator.permutation(members)[: round(TEST_SHARE * len(members))]] = True
    return tuple(
        ImageSet(entry, part, torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen]))
        for part, chosen in (("train", ~held_out), ("test", held_out))
    )
