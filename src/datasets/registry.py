"""The catalog of data sets, and the settings for loading one (``DataConfig``).

To add a data set, add an entry to ``DATASETS`` and, unless torchvision reads it, a function that loads it. Only the
loaders import torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.cli import check_options, number, option
from src.errors import ArgumentError, FileError
from src.lazy import later

if TYPE_CHECKING:
    from src.datasets.batches import ImageSet
    from src.datasets.decoding import Photos
    from src.datasets.files import Examples

log = logging.getLogger(__name__)

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images.

    Attributes:
        crop_padding: Zero padding on each side before a random crop of the original size; 0 for no crop.
        flip: Whether to flip each image horizontally with probability one half.
        alternate_flips: Whether the flips are drawn once, and inverted every other epoch, so that two consecutive
            epochs use both versions of each image (Jordan 2024, arXiv:2404.00498).
        cutout_holes: Number of squares per image that are set to the mean color.
        cutout_length: Side of these squares in pixels, before clipping at the border.
        random_resized_crop: Whether to crop a box of random area and aspect ratio and scale it to the image size.
    """

    crop_padding: int = 0
    flip: bool = False
    alternate_flips: bool = False
    cutout_holes: int = 0
    cutout_length: int = 16
    random_resized_crop: bool = False

    def __bool__(self) -> bool:
        return bool(self.crop_padding or self.flip or self.cutout_holes or self.random_resized_crop)


@dataclass(frozen=True)
class Download:
    """A published file of a data set.

    Attributes:
        file: Path relative to the data set's folder.
        urls: URLs, tried in order; https first.
        md5: The published checksum.
        sha256: Checksum that makes downloads from mirrors without https safe.
    """

    file: str
    urls: tuple[str, ...]
    md5: str
    sha256: str


@dataclass(frozen=True)
class DatasetEntry:
    """One data set.

    Attributes:
        name: The name, also used in paths.
        num_classes: Number of classes.
        channels: 1 (gray) or 3 (color).
        image_size: Height and width of the images.
        normalizations: Normalization for each paper, ``"samis"`` and ``"mpe"``.
        load: ``(entry, folder) -> (train, test)``; the folder is ``{datasets_folder}/{name}``. None for own data.
        augmentation: The augmentation that ``--data_augmentation`` enables.
        always: The augmentation that is always applied to training images.
        cutout: Whether Cutout is supported.
        class_names: Names of the classes, if the data do not contain them.
        downloads: The files to download.
        published: Digest of the decoded images and labels by part, for files that are not otherwise verified.
        content: Hex digest of the files of own data; None for catalog data sets.
        embedded: Whether the images are part of this project, so that nothing is downloaded.
    """

    name: str
    num_classes: int
    channels: int
    image_size: int
    normalizations: Mapping[str, Normalization]
    load: Callable[[DatasetEntry, Path], tuple[ImageSet, ImageSet]] | None
    augmentation: Augmentation = Augmentation()
    always: Augmentation = Augmentation()
    cutout: bool = False
    class_names: tuple[str, ...] = ()
    downloads: tuple[Download, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    content: str | None = None
    embedded: bool = False

    def training_augmentation(
        self,
        switched_on: bool,
        *,
        alternate_flips: bool = False,
        cutout_holes: int = 0,
        cutout_length: int = 16,
    ) -> Augmentation | None:
        """Return the augmentation of a training run, given its flags; None for no augmentation.

        Raises:
            ArgumentError: The data set does not support Cutout.
        """
        if cutout_holes and not self.cutout:
            allowed = ", ".join(name for name, entry in DATASETS.items() if entry.cutout)
            raise ArgumentError(
                "cutout_holes", f"{cutout_holes}: is supported for {allowed} and your own data, not for {self.name}"
            )
        chosen = self.augmentation if switched_on else self.always
        chosen = replace(
            chosen, alternate_flips=alternate_flips, cutout_holes=cutout_holes, cutout_length=cutout_length
        )
        return chosen or None


def _same(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Normalization]:
    """Use one normalization for both papers, for data sets whose normalization only one paper gives."""
    return {"samis": Normalization(mean, std), "mpe": Normalization(mean, std)}


_CIFAR = Normalization(
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_IMAGENET = _same((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _idx(folder: str, mirrors: Sequence[str], *checksums: tuple[str, str]) -> tuple[Download, ...]:
    """Return the four files of MNIST or a data set in its format, given the md5 and sha256 of each."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{name}-ubyte.gz" for name in names]
    return tuple(
        Download(f"{folder}/raw/{file}", tuple(f"{mirror}/{file}" for mirror in mirrors), *sums)
        for file, sums in zip(files, checksums, strict=True)
    )


_CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)

_ENTRIES = (
    DatasetEntry(
        name="digits",
        num_classes=10,
        channels=1,
        image_size=8,
        normalizations=_same((0.3058,), (0.3764,)),  # mean and std of its training set
        load=later("src.datasets.vision", "load_digits"),
        augmentation=Augmentation(crop_padding=1),
        class_names=DIGITS,
        embedded=True,
    ),
    DatasetEntry(
        name="mnist",
        num_classes=10,
        channels=1,
        image_size=28,
        normalizations=_same((0.1307,), (0.3081,)),
        load=later("src.datasets.vision", "load_torchvision", "MNIST"),
        class_names=DIGITS,
        downloads=_idx(
            "MNIST",
            ("https://ossci-datasets.s3.amazonaws.com/mnist",),
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            ("d53e105ee54ea40749a09fcbcd1e9432", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            ("9fb629c4189551a2d022fa330f9573f3", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            ("ec29112dd5afa0611ce80d1b7f02629c", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        published={"train": "d18cfd466eb143ac", "test": "a0863a96c44e5666"},
    ),
    DatasetEntry(
        name="fmnist",
        num_classes=10,
        channels=1,
        image_size=28,
        normalizations={
            "samis": Normalization((0.2861,), (0.3530,)),
            "mpe": Normalization((0.2860,), (0.3530,)),
        },
        load=later("src.datasets.vision", "load_torchvision", "FashionMNIST"),
        class_names=FASHION,
        downloads=_idx(
            "FashionMNIST",
            (
                # The host of torchvision's URL supports https only under its other name.
                "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            ),
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("25c81989df183df01b3e8a0aad5dffbe", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("bef4ecab320f06d8554ea6380940ec79", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("bb300cfdad3c16e7a12a480ee83cd310", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        published={"train": "1f243a60b4b748a4", "test": "9a494dc49efeb996"},
    ),
    DatasetEntry(
        name="cifar10",
        num_classes=10,
        channels=3,
        image_size=32,
        normalizations={
            "samis": _CIFAR,
            "mpe": Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        },
        load=later("src.datasets.vision", "load_torchvision", "CIFAR10"),
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        class_names=CIFAR10,
        downloads=(
            Download(
                "cifar-10-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                "c58f30108f718f92721af3b95e74349a",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
    ),
    DatasetEntry(
        name="cifar100",
        num_classes=100,
        channels=3,
        image_size=32,
        normalizations={"samis": _CIFAR, "mpe": _CIFAR},
        load=later("src.datasets.vision", "load_torchvision", "CIFAR100"),
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        class_names=CIFAR100,
        downloads=(
            Download(
                "cifar-100-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
                "eb9058c3a382ffc7106e4002c42a8d85",
                "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            ),
        ),
    ),
    DatasetEntry(
        name="svhn",
        num_classes=10,
        channels=3,
        image_size=32,
        normalizations=_same((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        load=later("src.datasets.vision", "load_torchvision", "SVHN"),
        class_names=DIGITS,
        downloads=tuple(
            Download(
                file,
                # Plain http is used only if https fails; the checksum verifies the file.
                (f"https://ufldl.stanford.edu/housenumbers/{file}", f"http://ufldl.stanford.edu/housenumbers/{file}"),
                *sums,
            )
            for file, *sums in (
                (
                    "train_32x32.mat",
                    "e26dedcc434d2e4c54c9b2d4a06d8373",
                    "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                ),
                (
                    "test_32x32.mat",
                    "eb5a983be6a315427106f1b164d9cef3",
                    "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                ),
            )
        ),
    ),
    DatasetEntry(
        name="tiny_imagenet",
        num_classes=200,
        channels=3,
        image_size=64,
        normalizations=_IMAGENET,
        load=later("src.datasets.imagenet", "load_tiny_imagenet"),
        augmentation=_CROP_AND_FLIP,
        cutout=True,
        downloads=(
            Download(
                "tiny-imagenet-200.zip",
                (
                    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                ),
                "90528d7ca1a48142e341f4ef8d21d0de",
                "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            ),
        ),
    ),
    DatasetEntry(
        name="imagenet",
        num_classes=1000,
        channels=3,
        image_size=224,
        normalizations=_IMAGENET,
        load=later("src.datasets.imagenet", "load_imagenet"),  # local archives; torchvision verifies their md5
        augmentation=Augmentation(flip=True, random_resized_crop=True),
        always=Augmentation(random_resized_crop=True),
    ),
)
DATASETS: dict[str, DatasetEntry] = {entry.name: entry for entry in _ENTRIES}

# Sources of encoded images: the prefix before the colon, and the class that finds the images.
_PHOTOS: dict[str, Callable[[Path], Photos]] = {
    "folder": later("src.datasets.decoding", "ImageFolder"),
    "hf": later("src.datasets.own_hf", "HuggingFaceImages"),
}
# Loaders of own data, by the prefix before the colon.
OWN_SOURCES: dict[str, Callable[[Path, DataConfig, Path], tuple[ImageSet, ImageSet]]] = {
    "npz": later("src.datasets.own_npz", "load_npz"),
    **{kind: later("src.datasets.own_images", "load_photos", find) for kind, find in _PHOTOS.items()},
}
# Their names, labels and files, without decoding images.
OWN_EXAMPLES: dict[str, Callable[[Path, DataConfig, Path | None], Examples]] = {
    "npz": later("src.datasets.own_npz", "npz_examples"),
    **{kind: later("src.datasets.own_images", "photo_examples", find) for kind, find in _PHOTOS.items()},
}
OWN = "npz:FILE, folder:DIR or hf:NAME"
DECODED = "decoded"  # folder of decoded photos, inside the folder of data sets


def dataset_flag(name: str) -> str:
    """Return the value of ``--dataset`` for a data set's name in paths. They differ for own data."""
    return name if name in DATASETS else OWN


def lookup(name: str) -> DatasetEntry:
    """Return the entry of a catalog name, ignoring case (``MNIST`` is ``mnist``).

    Raises:
        ArgumentError: The name is unknown.
    """
    if name.lower() not in DATASETS:
        names = ", ".join(DATASETS)
        raise ArgumentError("dataset", f"{name}: unknown; choose from {names}, or {OWN} for your own data")
    return DATASETS[name.lower()]


def _own_source(text: str) -> tuple[str, str] | None:
    """Return the kind and path of own data, such as ``folder:DIR``; None for a catalog name."""
    kind, colon, path = text.partition(":")
    return (kind, path) if colon and kind in OWN_SOURCES else None


def dataset_name(text: str) -> str:
    """Return the name of a data set in file names.

    Args:
        text: A value that ``load_dataset`` accepts, or a name in file names. Own data (``folder:DIR``) are read,
            because their name depends on their contents.

    Raises:
        ArgumentError: The text is neither.
        FileError: Own data are missing, damaged, or not in the expected format.
    """
    if own := _own_source(text):
        return OWN_EXAMPLES[own[0]](Path(own[1]).expanduser(), DataConfig(text), None).name
    if text.lower() in DATASETS:
        return text.lower()
    if not text or text.startswith(".") or ":" in text or Path(text).name != text:
        names = ", ".join(DATASETS)
        raise ArgumentError("dataset", f"{text!r}: is not the name of a data set; give one of {names}, {OWN}")
    return text


@dataclass(frozen=True)
class DataConfig:
    """A data set, how to read own data, and which training examples to use.

    Attributes:
        dataset: A catalog name, ``npz:FILE``, ``folder:DIR`` or ``hf:NAME_OR_DIR[:CONFIG]``.
        image_size: Own data only: resize to this height and width.
        channels: Own data only: convert to gray (1) or color (3).
        decode: Folders of photos only: ``"draft"`` decodes JPEG files much larger than ``image_size`` at a reduced
            size; ``"full"`` always decodes at full size, as versions before this setting did.
        cache_folder: Folder of decoded photos; ``None`` for ``decoded`` in the folder of data sets.
        test_fraction: Own data without a test part only: the fraction of each class drawn for testing; None for 0.2.
        test_seed: The seed of this draw, which is independent of the run's seed.
        subset: The training examples to use; see ``parse_subset``. None for all.
        exclude: A file that lists training examples not to use; see ``read_exclusions``. None for none.

    Raises:
        ArgumentError: The name is unknown, or an argument does not apply to it.
    """

    dataset: str = option(
        "cifar100",
        f"{', '.join(DATASETS)}, or your own: npz:FILE (arrays x_train, y_train, x_test, y_test), "
        "folder:DIR (train/ and test/ with a folder per class), hf:NAME_OR_DIR[:CONFIG] (Hugging Face datasets)",
        lambda text: text if _own_source(text) else text.lower(),
        metavar="NAME",
    )
    image_size: int | None = option(
        None,
        "own data: scale the shorter side to PIXELS and crop the center square (default: unchanged)",
        number(int, 1),
        metavar="PIXELS",
    )
    channels: int | None = option(
        None, "own data: convert to gray (1) or color (3) (default: unchanged)", int, choices=(1, 3)
    )
    decode: str = option(
        "draft",
        "own data: how to decode large JPEG files: 'draft' at a half, a quarter or an eighth of their size, if "
        "that keeps twice the PIXELS of --image_size; 'full' at full size, to match results of older versions",
        choices=("draft", "full"),
    )
    cache_folder: Path | None = option(
        None,
        "own data: cache for decoded images, reused by later runs (default: decoded/ in --datasets_folder)",
        Path,
        metavar="DIR",
    )
    test_fraction: float | None = option(
        None,
        "own data without a test part: draw this fraction of each class for testing (default: 0.2)",
        number(float, 0, 1, open_low=True, open_high=True),
        metavar="FRACTION",
    )
    test_seed: int = option(0, "seed of this draw; the same for all runs that are compared", number(int, 0))
    subset: str | None = option(
        None,
        "use only N training examples (the same fraction of each class), or those whose indices are in FILE, one per "
        "line; indices refer to the full data set (default: all)",
        metavar="N|FILE",
    )
    exclude: str | None = option(
        None,
        "leave out the training examples listed in FILE: one index or file name per line, or a csv file with a "
        "column index or file, such as label_issues.csv; --subset N takes N of the others (default: none)",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if own := _own_source(self.dataset):
            if not own[1]:
                raise ArgumentError("dataset", f"{self.dataset}: nothing after the colon; {OWN} is needed")
            if self.decode != "draft" and own[0] == "npz":
                raise ArgumentError(
                    "decode", f"{self.decode}: applies only to folder:DIR and hf:NAME; npz:FILE is already decoded"
                )
            return
        entry = lookup(self.dataset)
        for argument in ("image_size", "channels"):
            value, fixed = getattr(self, argument), getattr(entry, argument)
            if value not in (None, fixed):
                raise ArgumentError(argument, f"{value}: applies only to own data; {entry.name} has {fixed}")
        if self.test_fraction is not None or self.test_seed:
            name = "test_seed" if self.test_fraction is None else "test_fraction"
            raise ArgumentError(name, f"{getattr(self, name)}: applies only to own data; {entry.name} has a test set")
        if self.decode != "draft":
            raise ArgumentError(
                "decode", f"{self.decode}: applies only to own data; {entry.name} is always decoded at full size"
            )

    def load(self, folder: str | Path) -> tuple[ImageSet, ImageSet]:
        """Load all examples of the data set; ``subset`` and ``exclude`` are not applied.

        A catalog data set is read from ``{folder}/{name}.npz`` if it exists (with any number of examples), else from
        ``{folder}/{name}/``, and missing files are downloaded. All else is own data; decoded
        images of a folder are cached in ``cache_folder``.

        Args:
            folder: The folder of data sets.

        Returns:
            The training set and the test set.

        Raises:
            FileError: The data are missing, damaged, or not in the expected format.
        """
        from src.datasets.batches import Content

        folder = Path(folder)
        if own := _own_source(self.dataset):
            train, test = OWN_SOURCES[own[0]](Path(own[1]).expanduser(), self, self.cache_folder or folder / DECODED)
        else:
            entry = lookup(self.dataset)
            local = folder / f"{entry.name}.npz"
            try:
                if local.exists():
                    from src.datasets.own_npz import load_catalog_npz

                    train, test = load_catalog_npz(entry, local)
                else:
                    train, test = entry.load(entry, folder / entry.name)
            except OSError as error:
                raise FileError(
                    f"{folder}: cannot read or create {entry.name} there ({error.strerror or error})"
                ) from error
        train.content = test.content = Content(train, test)
        return train, test

    def examples(self, folder: str | Path) -> Examples:
        """Load the names, labels and files of all training examples. Own images are not decoded.

        Args:
            folder: The folder of data sets.

        Raises:
            FileError: The data are missing, damaged, or not in the expected format.
        """
        if own := _own_source(self.dataset):
            cache = self.cache_folder or Path(folder) / DECODED
            return OWN_EXAMPLES[own[0]](Path(own[1]).expanduser(), self, cache)
        return self.load(folder)[0].examples

    def examples_at_hand(self, folder: str | Path) -> Examples | None:
        """Return ``examples``; None for a catalog data set that is not in the folder, or damaged there."""
        if not _own_source(self.dataset):
            entry, folder = lookup(self.dataset), Path(folder)
            if not (entry.embedded or any((folder / name).exists() for name in (entry.name, f"{entry.name}.npz"))):
                return None
        try:
            return self.examples(folder)
        except FileError as error:
            if _own_source(self.dataset):
                raise
            log.warning("%s", error)
            return None


def load_dataset(name: str, folder: str | Path, **options: Any) -> tuple[ImageSet, ImageSet]:
    """Load a data set by name: ``DataConfig(name, **options).load(folder)``.

    Args:
        name: A catalog name in upper or lower case, ``npz:FILE``, ``folder:DIR`` or ``hf:NAME``.
        folder: The folder of data sets.
        **options: ``image_size``, ``channels``, ``decode`` and ``cache_folder`` for own data; see ``DataConfig``.

    Returns:
        The training set and the test set.

    Raises:
        ArgumentError: The name is unknown, or an option does not apply to it.
        FileError: The data are missing, damaged, or not in the expected format.
    """
    return DataConfig(name, **options).load(folder)


def flips_images(dataset: str) -> bool:
    """Whether a data set's augmentation flips images, given its name; that of the user's own data does."""
    return dataset not in DATASETS or DATASETS[dataset].augmentation.flip
