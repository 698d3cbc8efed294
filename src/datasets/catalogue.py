"""The catalogue: every fact about a data set that has a name, in one place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from src.errors import ArgumentError

DIGITS = tuple("0123456789")

FASHION = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)

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
class Download:
    """A published file that a data set is made from.

    Attributes:
        file: Its path below the data set's folder.
        urls: Where it is found, tried in this order: https first.
        md5: Its checksum as published.
        sha256: Its checksum; with it even a mirror without https cannot deliver another file.
    """

    file: str
    urls: tuple[str, ...]
    md5: str
    sha256: str


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
        downloads: The files that it is downloaded as.
        published: Digest of the decoded images and labels by part (``vision.part_digest``), for files that nothing
            else verifies.
        content: Hex digest of the files of own data; None for those of the catalogue.
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
    downloads: tuple[Download, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    content: str | None = None

    def training_augmentation(
        self, switched_on: bool, *, cutout_holes: int = 0, cutout_length: int = 16
    ) -> Augmentation | None:
        """The augmentation of a training run, from its flags; None if nothing is done.

        Raises:
            ArgumentError: Cutout is asked for where it is not offered.
        """
        if cutout_holes and not self.cutout:
            allowed = ", ".join(name for name, entry in CATALOGUE.items() if entry.cutout)
            raise ArgumentError("cutout_holes", f"{cutout_holes}: is for {allowed} and own data, not for {self.name}")
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
        ArgumentError: There is no such name.
    """
    entry = CATALOGUE.get(name.lower())
    if entry is None:
        names = ", ".join(CATALOGUE)
        raise ArgumentError(
            "dataset", f"{name}: unknown; choose from {names}, or npz:FILE or folder:DIR for own data"
        )
    return entry


def _same(mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Normalisation]:
    """Both papers' normalisation where only one states it."""
    return {"samis": Normalisation(mean, std), "mpe": Normalisation(mean, std)}


_CIFAR = Normalisation(
    (125.3 / 255, 123.0 / 255, 113.9 / 255),
    (63.0 / 255, 62.1 / 255, 66.7 / 255),
)
_IMAGENET = _same((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _idx(folder: str, mirrors: Sequence[str], *checksums: tuple[str, str]) -> tuple[Download, ...]:
    """The four files of MNIST and its kin; md5 and sha256 of each."""
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    files = [f"{name}-ubyte.gz" for name in names]
    return tuple(
        Download(f"{folder}/raw/{file}", tuple(f"{mirror}/{file}" for mirror in mirrors), *sums)
        for file, sums in zip(files, checksums, strict=True)
    )


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
        downloads=_idx(
            "MNIST",
            ("https://ossci-datasets.s3.amazonaws.com/mnist",),
            ("f68b3c2dcbeaaa9fbdd348bbdeb94873", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            ("d53e105ee54ea40749a09fcbcd1e9432", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            ("9fb629c4189551a2d022fa330f9573f3", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            ("ec29112dd5afa0611ce80d1b7f02629c", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
        published={"train": "d18cfd466eb143ac", "test": "a0863a96c44e5666"},
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
        downloads=_idx(
            "FashionMNIST",
            (
                # The host of torchvision's address offers https under its other name only.
                "https://fashion-mnist.s3.eu-central-1.amazonaws.com",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            ),
            ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            ("25c81989df183df01b3e8a0aad5dffbe", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            ("bef4ecab320f06d8554ea6380940ec79", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            ("bb300cfdad3c16e7a12a480ee83cd310", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
        published={"train": "1f243a60b4b748a4", "test": "9a494dc49efeb996"},
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
        downloads=(
            Download(
                "cifar-10-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
                "c58f30108f718f92721af3b95e74349a",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
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
        downloads=(
            Download(
                "cifar-100-python.tar.gz",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
                "eb9058c3a382ffc7106e4002c42a8d85",
                "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            ),
        ),
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
        downloads=tuple(
            Download(
                file,
                # Plain http only where https fails: the checksum decides, not the connection.
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
        sizes=(1281167, 50000),  # from local archives, which torchvision checks by md5 (no sha256 is published)
    )
)
