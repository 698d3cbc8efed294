import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT
from torchvision import transforms

from src.datasets import DATASETS, Augmentation, Batches, load_dataset, lookup
from src.datasets.imagenet import load_imagenet, load_tiny_imagenet
from src.datasets.registry import Download
from src.errors import FileError

TINY = replace(lookup("tiny_imagenet"), num_classes=3)
IMAGENET = replace(lookup("imagenet"), num_classes=2, image_size=32)
WNIDS = ("n03", "n01", "n02")


def jpeg(number, size=64, mode="RGB"):
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG")
    return file.getvalue()


def tiny_files():
    files = {}
    for wnid in WNIDS:
        for number in (0, 1, 10, 2):
            content = jpeg(int(wnid[1:]) * 100 + number, mode="L" if number == 1 else "RGB")
            files[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = content
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"boxes"
    for number in range(4):
        files[f"val/images/val_{number}.JPEG"] = jpeg(number)
    lines = [
        f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t57"
        for number, wnid in ((3, "n02"), (0, "n03"), (1, "n01"), (2, "n01"))
    ]
    files["val/val_annotations.txt"] = "\n".join(lines).encode()
    return files


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    return path.read_bytes()


def tiny(content, *urls):
    """The entry of a small Tiny ImageNet with this zip content and these URLs."""
    sums = hashlib.md5(content).hexdigest(), hashlib.sha256(content).hexdigest()
    return replace(TINY, downloads=(Download("tiny-imagenet-200.zip", urls, *sums),))


@pytest.fixture
def server(tmp_path):
    """A folder and the URL at which it is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_arguments):
            pass

    root = tmp_path / "served"
    root.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def check_tiny(train, test):
    assert train.class_names == ["n01", "n02", "n03"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.labels.tolist() == [2, 0, 0, 1]  # val_0 .. val_3
    files = tiny_files()
    for position, name in ((2, "train/n01/images/n01_10.JPEG"), (1, "train/n01/images/n01_1.JPEG")):
        expected = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        assert torch.equal(
            train.fetch(torch.tensor([position]))[0].permute(1, 2, 0), torch.from_numpy(expected.copy())
        )


def test_tiny_imagenet_is_downloaded_checked_and_kept(tmp_path, server, monkeypatch):
    root, address = server
    entry = tiny(write_zip(root / "tiny.zip", tiny_files()), f"{address}/none.zip", f"{address}/tiny.zip")
    check_tiny(*load_tiny_imagenet(entry, tmp_path / "tiny_imagenet"))
    shutil.rmtree(root)
    check_tiny(*load_tiny_imagenet(entry, tmp_path / "tiny_imagenet"))
    monkeypatch.setitem(DATASETS, "tiny_imagenet", entry)
    shutil.rmtree(tmp_path / "tiny_imagenet")
    check_tiny(*load_dataset("tiny_imagenet", tmp_path))


def by_class(files, images):
    """The files after a script has moved the validation images to one folder per class."""
    lines = [line.split("\t") for line in files.pop("val/val_annotations.txt").decode().splitlines()]
    for name, wnid, *_ in lines:
        files[f"val/{wnid}/{images}{name}"] = files.pop(f"val/images/{name}")
    return files


@pytest.mark.parametrize("top", ["tiny-imagenet-200", ""])
@pytest.mark.parametrize("arranged", ["as published", "val/WNID", "val/WNID/images"])
def test_tiny_imagenet_from_the_extracted_folder(tmp_path, top, arranged):
    files = tiny_files()
    if arranged != "as published":
        files = by_class(files, arranged.removeprefix("val/WNID").lstrip("/") and "images/")
    files |= {"val/Thumbs.db": b"x", "train/n01/images/._n01_0.JPEG": b"x", "train/n01/images/.DS_Store": b"x"}
    for name, content in files.items():
        path = tmp_path / "tiny_imagenet" / top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    check_tiny(*load_tiny_imagenet(TINY, tmp_path / "tiny_imagenet"))
    assert (tmp_path / "tiny_imagenet.npz").exists()


def test_tiny_imagenet_downloads_that_fail(tmp_path, server):
    root, address = server
    content = write_zip(root / "tiny.zip", tiny_files())
    folder = tmp_path / "tiny_imagenet"
    with pytest.raises(FileError, match=r"could not be downloaded .*has md5 .*, not "):
        load_tiny_imagenet(tiny(b"another", f"{address}/tiny.zip"), folder)
    same_md5 = replace(tiny(content).downloads[0], urls=(f"{address}/tiny.zip",), sha256="1234")
    with pytest.raises(FileError, match=r"has sha256 .*, not 1234"):
        load_tiny_imagenet(replace(TINY, downloads=(same_md5,)), folder)
    with pytest.raises(FileError, match="could not be downloaded"):
        load_tiny_imagenet(tiny(content, f"{address}/none.zip"), folder)
    assert list(folder.iterdir()) == []


def test_every_download_has_checksums_and_https_first():
    for entry in DATASETS.values():
        for download in entry.downloads:
            assert (len(download.md5), len(download.sha256)) == (32, 64)
            assert download.urls[0].startswith("https://")
        assert entry.downloads or entry.name in ("digits", "imagenet")


def _spoil(files, how):
    if how == "no annotations":
        del files["val/val_annotations.txt"]
        return r"has no val/val_annotations\.txt"
    if how == "empty annotations":
        files["val/val_annotations.txt"] = b""
        return r"val_annotations\.txt is empty"
    if how == "annotations in another encoding":
        files["val/val_annotations.txt"] = b"\xff\xfe" + files["val/val_annotations.txt"]
        return r"val_annotations\.txt is not a UTF-8 text file"
    if how == "two bad images":
        files["train/n01/images/n01_0.JPEG"] = b"no image"
        files["train/n02/images/n02_1.JPEG"] = jpeg(0, size=32)
        return r"\(1\).*n01_0\.JPEG: cannot be read.*\(2\).*n02_1\.JPEG: is 32x32"
    if how == "missing class":
        for name in [name for name in files if "train/n02" in name]:
            del files[name]
        return "has 2 classes in train/, not 3"
    if how == "missing image":
        del files["val/images/val_2.JPEG"]
        return r"'val_2\.JPEG' of class 'n01'"
    if how == "other size":
        files["train/n01/images/n01_0.JPEG"] = jpeg(0, size=32)
        return r"n01_0\.JPEG: is 32x32, not 64x64"
    files["train/n01/images/n01_0.JPEG"] = b"no image"
    return r"n01_0\.JPEG: cannot be read"


@pytest.mark.parametrize(
    "how",
    [
        "no annotations",
        "empty annotations",
        "annotations in another encoding",
        "missing class",
        "missing image",
        "other size",
        "two bad images",
        "unreadable",
    ],
)
def test_tiny_imagenet_that_is_not_whole(tmp_path, how):
    files = tiny_files()
    message = _spoil(files, how)
    path = tmp_path / "tiny_imagenet" / "tiny-imagenet-200.zip"
    entry = tiny(write_zip(path, files))
    with pytest.raises(FileError, match=message) as caught:
        load_tiny_imagenet(entry, path.parent)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileError, match="is damaged"):
        load_tiny_imagenet(TINY, path.parent)


SIZES = [(50, 70), (64, 40), (33, 33), (120, 37), (36, 36), (90, 100)]


def imagenet_files():
    """Images of six sizes in two classes, by part and path."""
    files = {}
    for part, first in (("train", 0), ("val", 100)):
        for number, (height, width) in enumerate(SIZES):
            pixels = np.random.default_rng(first + number).integers(0, 256, (height, width, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            wnid = ("n02", "n01")[number % 2]
            files[f"{part}/{wnid}/{part}_{number}.JPEG"] = file.getvalue()
    return files


@pytest.fixture
def imagenet_folder(tmp_path):
    for name, content in imagenet_files().items():
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "imagenet"


def epoch(images, augmentation, batch_size=4, order="shuffled", **settings):
    normal = images.entry.normalizations["samis"]
    batches = Batches(
        images, batch_size, normalization=normal, order=order, augmentation=augmentation, seed=2, **settings
    )
    return {
        index: image
        for batch in batches.epoch(1)
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True)
    }


def test_imagenet_order_and_test_transform_equal_torchvision(imagenet_folder):
    from torchvision.datasets import ImageFolder

    train, test = load_imagenet(IMAGENET, imagenet_folder)
    assert train.class_names == ["n01", "n02"]
    size = IMAGENET.image_size
    normal = IMAGENET.normalizations["samis"]
    pipeline = transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(normal.mean, normal.std),
        ]
    )
    for images, name in ((train, "train"), (test, "val")):
        plain = ImageFolder(imagenet_folder / name, pipeline)
        images.workers = 0
        seen = epoch(images, None)
        assert images.labels.tolist() == plain.targets
        assert len(seen) == len(plain) == 6
        for index, (image, _) in enumerate(plain):
            assert torch.equal(seen[index], image)


def test_imagenet_workers_batches_and_subsets_change_nothing(imagenet_folder):
    train, _ = load_imagenet(IMAGENET, imagenet_folder)
    augmentation = IMAGENET.training_augmentation(True)
    train.workers = 0
    before = torch.get_rng_state()
    reference = epoch(train, augmentation)
    assert torch.equal(torch.get_rng_state(), before)
    plain = epoch(train, None)
    assert not any(torch.equal(reference[index], plain[index]) for index in plain)
    train.workers = 2
    streamed = epoch(train, augmentation, 3, "sequential")
    assert list(streamed) == list(range(6))
    assert torch.equal(torch.get_rng_state(), before)
    part = epoch(train.subset(torch.tensor([5, 1])), augmentation, 1, "sequential", rank=0, world=1)
    assert list(part) == [5, 1]
    assert all(torch.equal(streamed[index], reference[index]) for index in reference)
    assert all(torch.equal(part[index], reference[index]) for index in part)
    assert train.to("meta").labels.device.type == "meta"


# Batches of 4.7 MB from worker processes.
EPOCH = """
import sys
sys.path.insert(0, {root!r})
from dataclasses import replace
from pathlib import Path
import torch
from src.datasets.imagenet import load_imagenet
from src.datasets import lookup
train, _ = load_imagenet(replace(lookup("imagenet"), num_classes=2, image_size=512), Path({folder!r}))
train.workers = 2
for images in train.stream((torch.arange(6), None) for _ in range(4)):
    assert torch.equal(images, train.fetch(torch.arange(6)))
print("done")
"""


def test_imagenet_with_little_shared_memory(imagenet_folder):
    code = EPOCH.format(root=str(ROOT), folder=str(imagenet_folder))
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    done = subprocess.run([*small, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_imagenet_without_room_in_shared_memory(imagenet_folder, monkeypatch):
    train, _ = load_imagenet(IMAGENET, imagenet_folder)
    positions = torch.arange(6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert isinstance(train._reader()[positions.numpy(), None], np.ndarray)
    train.workers = 1
    (images,) = train.stream([(positions, None)])
    assert torch.equal(images, train.fetch(positions))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    assert isinstance(train._reader()[positions.numpy(), None], torch.Tensor)


def test_imagenet_reader_that_is_killed(imagenet_folder, monkeypatch):
    train, _ = load_imagenet(IMAGENET, imagenet_folder)
    train.workers = 1
    monkeypatch.setattr("src.datasets.imagenet.read_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(FileError, match="a worker process that reads images was killed"):
        list(train.stream([(torch.arange(6), None)]))


def test_imagenet_empty_shares(imagenet_folder):
    train, _ = load_imagenet(IMAGENET, imagenet_folder)
    train.workers = 0
    augmentation = Augmentation(flip=True, random_resized_crop=True)
    normal = IMAGENET.normalizations["samis"]
    shares = Batches(train, 5, normalization=normal, augmentation=augmentation, rank=2, world=3).epoch(1)
    assert [len(batch.labels) for batch in shares] == [1, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_imagenet_unreadable_image_is_one_line(imagenet_folder, workers):
    path = imagenet_folder / "train" / "n01" / "train_1.JPEG"
    path.write_bytes(b"no image")
    train, _ = load_imagenet(IMAGENET, imagenet_folder)
    train.workers = workers
    with pytest.raises(FileError) as caught:
        epoch(train, None)
    assert str(caught.value).startswith(f"{path}: cannot be read as an image")
    assert "\n" not in str(caught.value)


def test_imagenet_folders_that_are_not_whole(imagenet_folder):
    with pytest.raises(FileError, match="has 2 class folders; imagenet has 1000"):
        load_imagenet(lookup("imagenet"), imagenet_folder)
    (imagenet_folder / "val" / "n09").mkdir()
    with pytest.raises(FileError, match="n09: is a class without a folder in train/"):
        load_imagenet(IMAGENET, imagenet_folder)
    os.mkfifo(imagenet_folder / "val" / "n01" / "pipe.JPEG")
    with pytest.raises(FileError, match=r"\(1\) n09: is a class.*\(2\).*pipe\.JPEG: is not a regular file"):
        load_imagenet(IMAGENET, imagenet_folder)
    shutil.rmtree(imagenet_folder / "val")
    with pytest.raises(FileError, match=r"has no val/.*ILSVRC2012_img_val\.tar"):
        load_imagenet(IMAGENET, imagenet_folder)
    shutil.rmtree(imagenet_folder / "train")
    with pytest.raises(FileError, match=r"has no train/.*ILSVRC2012_img_train\.tar"):
        load_imagenet(IMAGENET, imagenet_folder)


def _tar(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def test_imagenet_archives(tmp_path, monkeypatch):
    from torchvision.datasets import imagenet as archives

    files = imagenet_files()
    inner = {
        f"{wnid}.tar": _tar({n.split("/")[-1]: c for n, c in files.items() if n.startswith(f"train/{wnid}/")})
        for wnid in ("n01", "n02")
    }
    validation = {name.split("/")[-1]: content for name, content in files.items() if name.startswith("val/")}
    contents = {"train": _tar(inner), "val": _tar(validation), "devkit": b"devkit"}
    wnids = [("n02", "n01")[number % 2] for number in range(6)]

    def devkit(root):
        torch.save(({}, wnids), f"{root}/meta.bin")

    monkeypatch.setattr(archives, "parse_devkit_archive", devkit)
    for part, content in contents.items():
        name = archives.ARCHIVE_META[part][0]
        (tmp_path / name).write_bytes(content)
        monkeypatch.setitem(archives.ARCHIVE_META, part, (name, hashlib.md5(content).hexdigest()))
    train, test = load_imagenet(IMAGENET, tmp_path)
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for part, images in (("train", train), ("val", test)):
        assert len(list((tmp_path / part).rglob("*.JPEG"))) == len(images)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(contents["train"][:-600])
    with pytest.raises(FileError, match="could not be extracted"):
        load_imagenet(IMAGENET, tmp_path)
    assert not (tmp_path / "train").exists()
