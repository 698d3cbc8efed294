"""Which data a script works on."""

import argparse
from dataclasses import dataclass

from src.cli import number, option
from src.datasets.catalogue import dataset_names
from src.datasets.loading import OWN_SOURCES, check_arguments


def parse_dataset(text: str) -> str:
    """The value of ``--dataset``: a name in either case, or own data.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if text.partition(":")[0] in OWN_SOURCES and ":" in text:
        return text
    names = {name.lower(): name for name in dataset_names()}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(
            f"unknown data set {text!r}; choose from {', '.join(names)}, npz:FILE, folder:DIR"
        )
    return names[text.lower()]


@dataclass(frozen=True)
class DataConfig:
    """A data set, how own images are read, and which training examples are used.

    Attributes:
        dataset: A catalog name, ``npz:FILE`` or ``folder:DIR``.
        image_size: Own data only: resize to this height and width.
        channels: Own data only: turn into gray (1) or color (3).
        subset: Only these training examples; see ``parse_subset``.

    Raises:
        ArgumentError: The name is unknown, or an argument does not apply to it.
    """

    dataset: str = option(
        "cifar100",
        f"{', '.join(dataset_names())}, or your own: npz:FILE (arrays x_train, y_train, x_test, y_test), "
        "folder:DIR (train/ and test/ with a folder per class)",
        parse_dataset,
        metavar="NAME",
    )
    image_size: int | None = option(
        None,
        "scale own data so that the shorter side has PIXELS, and cut the center square (default: as they are)",
        number(int, 1),
        metavar="PIXELS",
    )
    channels: int | None = option(
        None, "turn own data into gray (1) or color (3) (default: as they are)", int, choices=(1, 3)
    )
    subset: str | None = option(
        None,
        "use only N training examples (the same share of each class) or those whose indices are in FILE, one per "
        "line; indices stay those of the full data set (default: all)",
        metavar="N|FILE",
    )

    def __post_init__(self) -> None:
        check_arguments(self.dataset, self.image_size, self.channels)
