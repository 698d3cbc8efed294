import contextlib
import http.client
import signal
import struct
import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from src.datasets import DATASETS, load_dataset, lookup, vision
from src.datasets.own import normalization_of
from src.errors import ArgumentError, FileError

SHARED = Path(__file__).resolve().parents[3] / "shared"


def write_cifar(path, count=20, classes=10, size=32, channels=3, **replaced):
    generator = np.random.default_rng(0)
    shape = (count, size, size, channels)
    arrays = {
        "x_train": generator.integers(0, 256, shape, dtype=np.uint8),
        "y_train": (np.arange(count) % classes).reshape(-1, 1),
        "x_test": generator.integers(0, 256, shape, dtype=np.uint8),
        "y_test": np.arange(count) % classes,
        **replaced,
    }
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return arrays


def test_catalog_is_whole():
    small = ["digits", "mnist", "fmnist", "cifar10", "cifar100", "svhn"]
    assert list(DATASETS) == [*small, "tiny_imagenet", "imagenet"]
    for name, entry in DATASETS.items():
        assert entry.name == name
        assert set(entry.normalizations) == {"samis", "mpe"}
        for normalization in entry.normalizations.values():
            assert len(normalization.mean) == len(normalization.std) == entry.channels
            assert all(0 < value < 1 for value in normalization.mean + normalization.std)
        assert len(entry.class_names) in (0, entry.num_classes)
    assert lookup("MNIST") is lookup("mnist")
    assert lookup("fmnist").normalizations["mpe"].mean != lookup("fmnist").normalizations["samis"].mean


def test_training_augmentation():
    cifar, svhn, imagenet = lookup("cifar10"), lookup("svhn"), lookup("imagenet")
    assert cifar.training_augmentation(True).flip
    assert cifar.training_augmentation(False) is None
    assert cifar.training_augmentation(False, cutout_holes=2, cutout_length=8).cutout_length == 8
    assert svhn.training_augmentation(True) is None
    assert imagenet.training_augmentation(False).random_resized_crop
    assert not imagenet.training_augmentation(False).flip
    with pytest.raises(ArgumentError, match=r"^cutout_holes 1: .*not for svhn"):
        svhn.training_augmentation(True, cutout_holes=1)


def test_digits():
    train, test = load_dataset("digits", "no/such/folder")
    again, _ = load_dataset("DIGITS", "no/such/folder")
    assert (len(train), len(test)) == (1438, 359)
    assert torch.equal(train.fetch(torch.arange(1438)), again.fetch(torch.arange(1438)))
    images = train.fetch(torch.arange(1438))
    assert images.shape == (1438, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    shares = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert ((shares - 0.2).abs() < 0.004).all()
    measured, stated = normalization_of(images), train.entry.normalizations["samis"]
    assert np.allclose(measured.mean + measured.std, stated.mean + stated.std, atol=5e-5)
    everything = torch.cat([images, test.fetch(torch.arange(359))]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797
    assert train.digest == "6e9d12cabf0602bf"  # digest of images, labels and split; results refer to it


def test_digits_are_those_of_scikit_learn():
    published = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(Path(vision.__file__).with_name("digits.npz")) as embedded:
        assert np.array_equal(embedded["images"], published.images)
        assert np.array_equal(embedded["labels"], published.target)
        assert "CC BY 4.0" in str(embedded["license"])


def test_image_sets_keep_original_indices():
    train, _ = load_dataset("digits", ".")
    part = train.subset(torch.tensor([30, 4, 700])).subset(torch.tensor([2, 0]))
    assert part.indices.tolist() == [700, 30]
    assert part.total == 1438
    assert len(part) == 2
    assert torch.equal(part.labels, train.labels[[700, 30]])
    assert torch.equal(part.fetch(torch.tensor([1])), train.fetch(torch.tensor([30])))
    moved = part.to("meta").to("meta")
    assert moved.device.type == "meta"
    assert part.to("cpu") is part


def test_catalog_npz_of_any_length(tmp_path):
    arrays = write_cifar(tmp_path / "cifar100.npz", 20)
    train, test = load_dataset("cifar100", tmp_path)
    assert (len(train), len(test), train.entry.num_classes, len(train.class_names)) == (20, 20, 100, 100)
    assert train.entry is DATASETS["cifar100"]
    assert torch.equal(train.fetch(torch.tensor([3]))[0].permute(1, 2, 0), torch.from_numpy(arrays["x_train"][3]))
    assert train.labels.tolist() == (np.arange(20) % 10).tolist()
    assert train.class_names[0] == "apple"


@pytest.mark.parametrize(
    ("replaced", "word"),
    [
        ({"y_test": None}, "y_test"),
        ({"x_train": None, "y_test": None}, "x_train, y_test"),
        ({"x_train": np.zeros((20, 32, 3, 32), np.uint8)}, r"\(20, 32, 3, 32\)"),
        ({"x_train": np.zeros((20, 32), np.uint8)}, "x_train"),
        ({"y_train": np.array([None] * 20)}, "y_train"),
        ({"y_test": np.zeros((20, 10), int)}, "y_test"),
        ({"y_test": np.full(20, 10)}, "label 10"),
        ({"x_test": np.zeros((20, 28, 28, 3), np.uint8)}, "x_test"),
        ({"channels": 1}, r"\(1, 32, 32\)"),
    ],
)
def test_npz_that_does_not_fit_the_catalog(tmp_path, replaced, word):
    write_cifar(tmp_path / "cifar10.npz", **replaced)
    with pytest.raises(FileError, match=rf"cifar10\.npz.*{word}") as caught:
        load_dataset("cifar10", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "argument"),
    [
        ("cifar11", {}, "dataset"),
        ("npz:", {}, "dataset"),
        ("zip:file", {}, "dataset"),
        ("digits", {"image_size": 32}, "image_size"),
        ("digits", {"channels": 3}, "channels"),
        ("npz:file", {"channels": 2}, "channels"),
        ("npz:file", {"image_size": 0}, "image_size"),
    ],
)
def test_bad_arguments(name, arguments, argument):
    with pytest.raises(ArgumentError, match=f"^{argument} "):
        load_dataset(name, ".", **arguments)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_data_that_cannot_be_downloaded(tmp_path, monkeypatch, name):
    def offline(*_arguments, **_settings):
        raise urllib.error.URLError(OSError("no network"))

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(FileError, match=f"{name}/.*: is missing and could not be downloaded") as caught:
        load_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)
    assert f"{name}.npz" in str(caught.value)


@pytest.mark.parametrize("error", [TimeoutError("timed out"), http.client.BadStatusLine("x")])
def test_a_server_that_hangs_up_is_not_a_disk_that_fails(tmp_path, monkeypatch, error):
    tried = []

    def urlopen(url, **_settings):
        tried.append(url)
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(FileError, match="is missing and could not be downloaded"):
        load_dataset("fmnist", tmp_path)
    assert len(tried) == 2  # both mirrors


def test_a_download_can_be_interrupted(tmp_path, monkeypatch):
    class Answer(contextlib.nullcontext):
        headers: ClassVar[dict] = {}
        reads = 0

        def __enter__(self):
            return self

        def read(self, _size):
            Answer.reads += 1
            signal.raise_signal(signal.SIGINT)
            return b"x" if Answer.reads < 3 else b""

    monkeypatch.setattr("urllib.request.urlopen", lambda *_arguments, **_settings: Answer())
    with pytest.raises(KeyboardInterrupt):
        load_dataset("cifar10", tmp_path)
    assert Answer.reads == 1
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_data_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for name in ("fmnist", "cifar100"):
        with pytest.raises(FileError, match="file"):
            load_dataset(name, blocked)


@pytest.mark.skipif(
    not (SHARED / "lay_out_data.py").exists(),
    reason="needs the original Fashion-MNIST files, which no package of this project brings",
)
def test_fashion_mnist_files_without_network(tmp_path, monkeypatch):
    subprocess.run([sys.executable, SHARED / "lay_out_data.py", tmp_path, "fmnist"], check=True, capture_output=True)

    def refuse(*_arguments, **_settings):
        raise AssertionError("the network was used")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    train, test = load_dataset("FMNIST", tmp_path)
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels.bincount().tolist() == [6000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    measured = normalization_of(train.fetch(torch.arange(60000)))
    assert np.allclose(measured.mean + measured.std, (0.2860, 0.3530), atol=1e-4)
    raw = tmp_path / "fmnist" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:1000])
    with pytest.raises(FileError, match=r"fmnist: the train files of fmnist are damaged"):
        load_dataset("fmnist", tmp_path)


def write_idx(folder, labels):
    """The raw files of MNIST, with these labels."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 2051, len(labels), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = struct.pack(">II", 2049, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


def test_mnist_files_that_are_not_the_published_ones(tmp_path, caplog):
    write_idx(tmp_path / "mnist" / "MNIST" / "raw", [0, 1, 9, 3])
    train, _ = load_dataset("mnist", tmp_path)
    assert train.labels.tolist() == [0, 1, 9, 3]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "differ from the published mnist" in caplog.text
    write_idx(tmp_path / "fmnist" / "FashionMNIST" / "raw", [0, 1, 10, 3])
    with pytest.raises(FileError, match=r"labels from 0 to 10, not 0 to 9"):
        load_dataset("fmnist", tmp_path)


@pytest.mark.skipif(
    not (SHARED / "lay_out_data.py").exists(), reason="needs the original MNIST and Fashion-MNIST files"
)
@pytest.mark.parametrize("name", ["mnist", "fmnist"])
def test_published_files_are_recognized(tmp_path, caplog, name):
    subprocess.run([sys.executable, SHARED / "lay_out_data.py", tmp_path, name], check=True, capture_output=True)
    for raw in tmp_path.rglob("*-ubyte"):
        raw.unlink()  # extracted again from the verified archives
    load_dataset(name, tmp_path)
    assert not caplog.records
    packed = next(tmp_path.rglob("t10k-labels*.gz"))
    packed.write_bytes(packed.read_bytes()[:-1])
    for raw in tmp_path.rglob("*-ubyte"):
        raw.unlink()
    with pytest.raises(FileError, match=r"is damaged .its sha256"):
        load_dataset(name, tmp_path)
