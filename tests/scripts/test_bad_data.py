"""Data that cannot be trained on: one line that names the file, what is wrong and what would be right."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import FILE, FLAG, refuse, spoilt
from support import ROOT, TRAIN, call, folders, succeed, write_blobs

N = 30
CLASSES = np.arange(N) % 3
PIXELS = np.zeros((N, 8, 8, 1), np.uint8)


def train(data, base, *flags):
    """Flags of a quick run on own data."""
    return (f"--dataset={data}", "--model=mlp", "--epochs=1", "--batch_size=16", *flags, *folders(base, *TRAIN))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y_train": np.array(list("abc") * 10)}, ("y_train is text", "whole numbers from 0")),
        ({"y_train": -CLASSES}, ("y_train has the label -2", "count from 0")),
        ({"y_train": CLASSES / 2}, ("y_train is float64", "whole numbers from 0")),
        ({"y_train": CLASSES * 2, "y_test": np.zeros(7, int)}, ("no image of class 1", "without gaps")),
        ({"y_train": CLASSES * 10**12, "y_test": np.zeros(7, int)}, ("no image of class 1", "without gaps")),
        ({"y_train": CLASSES * 0, "y_test": np.zeros(7, int)}, ("class 0 only", "two classes")),
        ({"y_train": CLASSES[:-1]}, (r"y_train has shape \(29,\) beside 30 images", r"\(30,\) is needed")),
        ({"y_test": np.full(7, 5)}, ("y_test has class 5, which y_train lacks", "needs training images")),
        ({"x_train": PIXELS / 255}, ("x_train is float64", "uint8 pixels from 0 to 255")),
        ({"x_train": PIXELS[..., 0, 0]}, (r"x_train has shape \(30, 8\)", r"\(n, height, width\)")),
        ({"x_train": np.zeros((N, 8, 8, 4), np.uint8)}, ("x_train has shape", "1 or 3")),
        ({"x_train": np.zeros((N, 8, 9, 1), np.uint8)}, (r"x_train .*\(1, 8, 9\), x_test \(1, 8, 8\)", "alike")),
        ({"x_train": PIXELS[:0], "y_train": CLASSES[:0]}, ("x_train", "has no image")),
        ({"x_test": PIXELS[:0], "y_test": CLASSES[:0]}, ("x_test", "has no image")),
        ({"y_train": np.array([{}] * N, dtype=object)}, ("Python objects", "as numbers or text")),
    ],
)
def test_arrays(tmp_path, arrays, says):
    path = write_blobs(tmp_path / "mine.npz", n=N, **arrays)
    refuse("train_full.py", *train(f"npz:{path}", tmp_path), status=FILE, says=(r"mine\.npz: ", *says), keep=tmp_path)


def test_files_that_are_no_npz(tmp_path):
    path = write_blobs(tmp_path / "mine.npz", n=N)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[2000] ^= 255
    np.save(tmp_path / "single.npy", PIXELS)
    contents = (b"", b"hello", content[:3000], bytes(flipped), (tmp_path / "single.npy").read_bytes())
    for spoiled in contents:
        with spoilt(path, spoiled):
            line = refuse("train_full.py", *train(f"npz:{path}", tmp_path), status=FILE,
                          says=(r"mine\.npz: is not an npz archive of arrays, or is damaged", "recreate it"),
                          keep=tmp_path)  # fmt: skip
            assert "allow_pickle=`" not in line, "no advice to load it all the same"
    with spoilt(path, None):
        refuse("train_full.py", *train(f"npz:{path}", tmp_path), status=FILE, says=(r"mine\.npz: there is no such",))
    refuse("train_full.py", *train(f"npz:{tmp_path}", tmp_path), status=FILE, says=("is a folder",))


@pytest.fixture
def photos(tmp_path):
    """Two classes of grey 8x8 pictures."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                save(folder / f"{number}.png", rng.integers(0, 255, (8, 8)))
    return tmp_path / "photos"


def save(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def empty_class(root):
    (root / "train" / "eel").mkdir()


def foreign_class(root):
    shutil.copytree(root / "test" / "dog", root / "test" / "eel")


def one_class(root):
    shutil.rmtree(root / "train" / "cat")


def other_size(root):
    save(root / "test" / "dog" / "x.png", np.zeros((9, 9)))


def no_image(root):
    (root / "train" / "dog" / "x.png").write_bytes(b"junk")


def half_an_image(root):
    path = root / "train" / "dog" / "x.png"
    path.write_bytes((root / "train" / "dog" / "0.png").read_bytes()[:60])


def nested(root):
    (root / "train" / "dog" / "x").mkdir()


def deep(root):
    Image.fromarray(np.zeros((8, 8), np.int32)).save(root / "train" / "dog" / "x.png", "TIFF")


def several(root):
    no_image(root)
    other_size(root)


def no_test(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (empty_class, ("train/eel: has no image", "put images in, or remove the class")),
        (foreign_class, ("test/eel: is a class that train/ lacks", "needs training images")),
        (one_class, ("train: has only class dog", "two classes")),
        (other_size, (r"x\.png: is 9x9 among images of 8x8", "image_size")),
        (no_image, (r"x\.png: cannot be read as an image", "remove or replace")),
        (half_an_image, (r"x\.png: cannot be read as an image", "remove or replace")),
        (nested, ("dog/x: is a folder inside a class folder", "images are needed")),
        (deep, (r"x\.png: has 32 bits per pixel", "save it with 8 or 16")),
        (several, (r"photos: these files", r"x\.png: cannot be read", "test/dog/x.png: is 9x9")),
        (no_test, ("test: there is no such folder", "train/ and test/")),
    ],
)
def test_folders(photos, tmp_path, spoil, says):
    spoil(photos)
    refuse("train_full.py", *train(f"folder:{photos}", tmp_path), status=FILE, says=says, keep=tmp_path)


def test_a_folder_that_is_none(tmp_path):
    refuse("train_full.py", *train(f"folder:{tmp_path / 'none'}", tmp_path), status=FILE,
           says=("none: there is no such folder", "train/ and test/"))  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ("is empty",)),
        (b"1\ntwo\n3", ("'two' is not an index",)),
        (b"1\n-3", ("'-3' is not an index",)),
        (b"1.5", (r"'1\.5' is not an index",)),
        (b"9" * 30, ("9999' is not an index",)),
        (b"\xff\xfe\x00", ("list of indices",)),
        (b"5\n7\n5", ("index 5 twice", "once")),
        (b"3\n30", ("the index 30", "0 to 29")),
        (None, ("there is no such file", "indices")),
    ],
)
def test_subset_files(tmp_path, content, says):
    data = write_blobs(tmp_path / "mine.npz", n=N)
    if content is not None:
        (tmp_path / "some.txt").write_bytes(content)
    flags = train(f"npz:{data}", tmp_path, f"--subset={tmp_path / 'some.txt'}")
    refuse("train_full.py", *flags, status=FILE, says=(r"some\.txt: ", *says), keep=tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn", "mnist", "tiny_imagenet"])
def test_a_download_without_a_network(tmp_path, monkeypatch, dataset):
    patience = []

    def offline(*_, timeout=None, **__):
        patience.append(timeout or socket.getdefaulttimeout())
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    refuse("train_full.py", *train(dataset, tmp_path), status=FILE, keep=tmp_path,
           says=(rf"datasets/{dataset}", "could not be downloaded", "put .* there"))  # fmt: skip
    assert patience
    assert all(patience), "a server that never answers would be waited for without end"
    assert socket.getdefaulttimeout() is None


def test_catalogue_files_that_are_not_theirs(tmp_path):
    (tmp_path / "datasets").mkdir()
    path = tmp_path / "datasets" / "cifar10.npz"
    flags = train("cifar10", tmp_path)
    for changes, says in (
        ({"size": 8}, (r"has images .*\(3, 8, 8\)", r"cifar10 has \(3, 32, 32\)")),
        ({"size": 32, "classes": 12}, ("has the label 11", "classes 0 to 9")),
    ):
        write_blobs(path, n=36, channels=3, **changes)
        refuse("train_full.py", *flags, status=FILE, says=(r"cifar10\.npz: ", *says), keep=tmp_path)
    refuse("train_full.py", *train("imagenet", tmp_path), status=FILE,
           says=("datasets/imagenet: has no train/", r"put ILSVRC2012_img_train\.tar"))  # fmt: skip


def test_split_files_that_are_damaged(tmp_path):
    data = write_blobs(tmp_path / "mine.npz", n=60)
    flags = train(f"npz:{data}", tmp_path)
    succeed("train_split.py", *flags)
    folder = next((tmp_path / "datasets").glob("splits/*/seed_1"))
    mend = f"delete {folder}"
    for name, content, says in (
        ("val_1.txt", "", "is empty"),
        ("val_2.txt", "garbage\n", "'garbage' is not an index"),
        ("val_3.txt", "1\n2\n", "2 indices"),
        ("val_4.txt", "999\n", "the index 999"),
        ("val_5.txt", (folder / "val_6.txt").read_text(), "shares an index"),
    ):
        with spoilt(folder / name, content.encode()):
            refuse("train_split.py", *flags, "--overwrite", status=FILE, says=(says, mend), keep=tmp_path)


def test_splits_of_too_few_examples(tmp_path):
    few = write_blobs(tmp_path / "few.npz", n=12)
    for index, says in ((1, ("is empty", "take split 10, or more data")), (10, ("leaves no training example",))):
        flags = train(f"npz:{few}", tmp_path, f"--samis_validation_split_index={index}")
        refuse("train_split.py", *flags, status=FLAG, says=(f"--samis_validation_split_index {index}", *says))
    assert not list(tmp_path.rglob("results.json"))


def test_every_script_names_the_file_that_it_cannot_read(tmp_path):
    missing = f"--dataset=npz:{tmp_path / 'none.npz'}"
    for script, flags in (
        ("train_split.py", ()),
        ("compute_sam_sgd.py", ()),
        ("average_scores.py", ("--seeds=1",)),
        ("plot_images.py", ()),
        ("plot_proxies.py", ()),
    ):
        refuse(script, missing, *flags, status=FILE, says=(r"none\.npz: there is no such file",))


def test_pictures_that_do_not_fit_in_memory(photos, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("src.datasets.own.resize", full)
    refuse("train_full.py", *train(f"folder:{photos}", tmp_path, "--image_size=9999"), status=FILE,
           says=("not enough memory", "smaller"))  # fmt: skip
    monkeypatch.undo()
    assert call("train_full.py", *train(f"folder:{photos}", tmp_path)).status == 0


def test_pipes_are_not_waited_for(photos, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = train(f"folder:{photos}", tmp_path)
    for script, more in (
        ("train_full.py", (f"--dataset=npz:{pipe}",)),
        ("train_full.py", (f"--subset={pipe}",)),
        ("train_full.py", (f"--pretrained={pipe}", "--model=vit", "--image_size=32")),
        ("train_prune.py", (f"--selection={pipe}",)),
    ):
        given = [flag for flag in flags if script == "train_full.py" or not flag.startswith("--epochs")]
        refuse(script, *given, *more, status=FILE, says=("pipe: is a pipe, socket or device",))
    os.mkfifo(photos / "train" / "dog" / "x.png")
    refuse("train_full.py", *flags, status=FILE, says=(r"x\.png: is not a regular file",))


def test_names_that_are_not_utf8_from_training_to_figures(photos, tmp_path):
    for part in ("train", "test"):
        folder = os.fsencode(photos / part)
        os.rename(folder + b"/dog", folder + b"/d\xf6g")
        os.rename(folder + b"/d\xf6g/0.png", folder + b"/d\xf6g/\xff.png")
    place = os.fsdecode(os.fsencode(tmp_path) + b"/phot\xf6s")
    photos.rename(place)
    base = os.fsdecode(os.fsencode(tmp_path) + b"/\xfctput")
    for optimizer in ("sgd", "sam"):
        succeed(
            "train_full.py", *train(f"folder:{place}", Path(base), f"--optimizer={optimizer}", "--lr_sched=const")
        )
    data, kept = (f"--dataset=folder:{place}", "--model=mlp"), folders(Path(base), "datasets", "metrics")
    succeed("compute_sam_sgd.py", *data, "--epochs=1", *kept, f"--models_folder={base}/models")
    succeed("average_scores.py", *data, "--seeds=1", *kept)
    succeed("plot_images.py", data[0], *kept, f"--plots_folder={base}/plots")
    assert len(list(Path(base).rglob("lowest_*/*.png"))) == 2
    (Path(place) / "test" / os.fsdecode(b"d\xf6g") / "1.png").write_bytes(b"junk")
    done = subprocess.run(
        [sys.executable, ROOT / "train_full.py", *train(f"folder:{place}", Path(base))],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert b"cannot be read as an image" in done.stderr
