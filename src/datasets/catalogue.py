"""The catalogue: every fact about a data set that has a name, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from src.datasets.class_names import CIFAR10, CIFAR100, DIGITS, FASHION
from src.errors import FlagError


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images.

    Attributes:
        crop_padding: Zeros added on each side before a random crop of the original size; 0 for no crop.
        flip: Mirror each image left to right with probability one half.
        cutout_holes: Squares set to the mean colour in each image.
        cutout_length: Side of those squares in pixels, before they are clipped at the border.
        random_resized_crop: Cut a box of random area and shape and scale it to the image size.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout_holes: int = 0
    cutout_length: int = 16
    random_resized_crop: bool = False

    def __bool__(self) -> bool:
        return bool(self.crop_padding or self.flip or self.cutout_holes or self.random_resized_crop)


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Attributes:
        name: Its name, also in paths.
        num_classes: Number of classes.
        channels: 1 (grey) or 3 (colour).
        image_size: Height and width of its images.
        normalisations: Normalisations by the paper that uses them, ``"samis"`` and ``"mpe"``.
        source: Who loads it: a key of ``src.datasets.loading.SOURCES``.
        augmentation: What ``--data_augmentation`` switches on.
        always: What is done to training images in any case.
        cutout: Whether Cutout may be asked for.
        sizes: Length of the training and the test part as published; None for own data.
        class_names: Names of the classes where the data themselves do not carry them.
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    normalisations: Mapping[str, Normalisation]
    source: str
    augmentation: Augmentation = Augmentation()
    always: Augmentation = Augmentation()
    cutout: bool = False
    sizes: tuple[int, int] | None = None
    class_names: tuple[str, ...] = ()

    def training_augmentation(
        self, switched_on: bool, *, cutout_holes: int = 0, cutout_length: int = 16
    ) -> Augmentation | None:
        """The augmentation of a training run, from its flags; None if nothing is done.

        Raises:
            FlagError: Cutout is asked for where it is not offered.
        """
        if cutout_holes and not self.cutout:
            allowed = ", ".join(name for name, entry in CATALOGUE.items() if entry.cutout)
            raise FlagError(f"--cutout_holes {cutout_holes}: is for {allowed} and own data, not for {self.name}")
        chosen = self.augmentation if switched_on else self.always
        chosen = replace(chosen, cutout_holes=cutout_holes, cutout_length=cutout_length)
        return chosen or None


CATALOGUE: dict[str, DatasetEntry] = {}


def _add(entry: DatasetEntry) -> None:
    CATALOGUE[entry.name] = entry


def dataset_names() -> list[str]:
    """The names of the catalogue, in its order."""
    return list(CATALOGUE)


def dataset_flag(name: str) -> str:
    """What ``--dataset`` takes for a data set's name in paths: own data are called otherwise there."""
    return name if name in CATALOGUE else "npz:FILE or folder:DIR"


def lookup(name: str) -> DatasetEntry:
    """The entry of a catalogue name, in either case (``MNIST`` is ``mnist``).

    Raises:
        FlagError: There is no such name.
    """
    entry = CATALOGUE.get(name.lower())
    if entry is None:
        names = ", ".join(CATALOGUE)
        raise FlagError(f"--dataset {name}: unknown; choose from {names}, or npz:FILE or folder:DIR for own data")
    return entry


def _same(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Normalisation]:
    """Both papers' normalisation where only one states it."""
    return {"samis": Normalisation(mean, std), "mpe": Normalisation(mean, std)}


_CIFAR = Normalisation(
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_IMAGENET = _same((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)

_add(
    DatasetEntry(
        name="digits",
        num_classes=10,
        channels=1,
        image_size=8,
        normalisations=_same((0.3058,), (0.3764,)),  # of its training part
        source="digits",
        augmentation=Augmentation(crop_padding=1),
        sizes=(1438, 359),
        class_names=DIGITS,
    )
)
_add(
    DatasetEntry(
        name="mnist",
        num_classes=10,
        channels=1,
        image_size=28,
        normalisations=_same((0.1307,), (0.3081,)),
        source="torchvision",
        sizes=(60000, 10000),
        class_names=DIGITS,
    )
)
_add(
    DatasetEntry(
        name="fmnist",
        num_classes=10,
        channels=1,
        image_size=28,
        normalisations={
            "samis": Normalisation((0.2861,), (0.3530,)),
            "mpe": Normalisation((0.2860,), (0.3530,)),
        },
        source="torchvision",
        sizes=(60000, 10000),
        class_names=FASHION,
    )
)
_add(
    DatasetEntry(
        name="cifar10",
        num_classes=10,
        channels=3,
        image_size=32,
        normalisations={
            "samis": _CIFAR,
            "mpe": Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        },
        source="torchvision",
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        sizes=(50000, 10000),
        class_names=CIFAR10,
    )
)
_add(
    DatasetEntry(
        name="cifar100",
        num_classes=100,
        channels=3,
        image_size=32,
        normalisations={"samis": _CIFAR, "mpe": _CIFAR},
        source="torchvision",
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        sizes=(50000, 10000),
        class_names=CIFAR100,
    )
)
_add(
    DatasetEntry(
        name="svhn",
        num_classes=10,
        channels=3,
        image_size=32,
        normalisations=_same((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        source="torchvision",
        sizes=(73257, 26032),
        class_names=DIGITS,
    )
)
_add(
    DatasetEntry(
        name="tiny_imagenet",
        num_classes=200,
        channels=3,
        image_size=64,
        normalisations=_IMAGENET,
        source="tiny_imagenet",
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        sizes=(100000, 10000),
    )
)
_add(
    DatasetEntry(
        name="imagenet",
        num_classes=1000,
        channels=3,
        image_size=224,
        normalisations=_IMAGENET,
        source="imagenet",
        augmentation=Augmentation(flip=True, random_resized_crop=True),
        always=Augmentation(random_resized_crop=True),
        sizes=(1281167, 50000),
    )
)
