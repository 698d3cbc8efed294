"""Layouts and array conventions of the user's data: what is converted, what is assumed, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, FLAG, refuse
from support import TRAIN, folders, succeed

from src.artifacts.io import read_json
from src.datasets import DataConfig, dataset_name, load_dataset, training_indices
from src.errors import ArgumentError, FileError
from src.metrics import Proxy

LABELS = np.arange(20) % 4
TRAINING = ("--model=small_mlp", "--batch_size=4", "--learning_rate=0.05", "--lr_sched=const", "--epochs=2")


def write_photos(root, parts, count=10):
    """Two classes in ``root/part/``, or in the root for the part ``"."``."""
    generator = np.random.default_rng(0)
    for part in parts:
        for level, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = generator.integers(0, 60, (8, 8)) + 190 * level
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{k}.png")
    return f"folder:{root}"


def pixels(images):
    return images.fetch(torch.arange(len(images)))


def test_val_is_the_test_part_where_there_is_none(tmp_path, caplog):
    caplog.set_level("INFO")
    with_test = load_dataset(write_photos(tmp_path / "pets", ("train", "test", "val")), ".")[0]
    assert "val/" not in caplog.text
    shutil.rmtree(tmp_path / "pets" / "val")
    assert load_dataset(f"folder:{tmp_path}/pets", ".")[0].entry.name == with_test.entry.name
    (tmp_path / "pets" / "test").rename(tmp_path / "pets" / "val")
    train, test = load_dataset(f"folder:{tmp_path}/pets", ".")
    assert (len(train), len(test), train.drawn, test.files[0]) == (20, 20, None, "val/dark/0.png")
    assert "no test/; using val/" in caplog.text
    with pytest.raises(ArgumentError, match="has a test part"):
        load_dataset(f"folder:{tmp_path}/pets", ".", test_fraction=0.5)


@pytest.mark.parametrize("part", ["train", "."])
def test_test_images_are_drawn_per_class(tmp_path, part):
    name = write_photos(tmp_path / "pets", (part,))
    full, test = load_dataset(name, ".")
    start = "" if part == "." else "train/"
    assert [len(full), full.total, len(test), full.labels.tolist()] == [20, 20, 4, [0] * 10 + [1] * 10]
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert torch.equal(pixels(test), pixels(full)[full.drawn])
    assert [test.files[k] for k in range(4)] == [full.files[i] for i in full.drawn]
    assert full.files[11] == f"{start}light/1.png"
    kept = np.setdiff1d(np.arange(20), full.drawn)
    values = pixels(full)[kept].double() / 255
    assert np.allclose(full.entry.normalizations["samis"].mean, values.mean())
    again, more = (load_dataset(name, ".", **options)[0] for options in ({}, {"test_fraction": 0.35}))
    other = load_dataset(name, ".", test_seed=1)[0]
    assert again.drawn.tolist() == full.drawn.tolist() != other.drawn.tolist()
    assert len(more.drawn) == 8
    assert {full.entry.name, more.entry.name, other.entry.name} == {dataset_name(name)}
    assert len({images.digest for images in (full, again, more, other)}) == 3
    assert DataConfig(name, test_seed=1).examples(".").digest == other.digest
    examples = DataConfig(name, subset="8").examples(".")
    assert training_indices(DataConfig(name), examples).tolist() == kept.tolist()
    assert set(training_indices(DataConfig(name, subset="8"), examples)) < set(kept)


def test_a_class_may_be_called_train(tmp_path):
    write_photos(tmp_path / "rides", (".",))
    (tmp_path / "rides" / "dark").rename(tmp_path / "rides" / "train")
    train, _ = load_dataset(f"folder:{tmp_path}/rides", ".")
    assert train.class_names == ["light", "train"]


def test_drawn_examples_get_no_score(tmp_path):
    name = write_photos(tmp_path / "pets", (".",))
    flags = (f"--dataset={name}", "--test_fraction=0.3")
    done = succeed("train_full.py", *flags, *TRAINING, "--optimizer=sgd", "--measure_proxies",
                   *folders(tmp_path, *TRAIN))  # fmt: skip
    assert "drew 6 of 20 images for testing" in done.err
    assert "--test_fraction=0.3" in done.out  # in the next command
    settings = read_json(next(tmp_path.rglob("results.json")))["settings"]
    assert settings["examples"] == 14
    succeed("average_scores.py", *flags, "--model=small_mlp", "--seeds=1", "--optimizer=sgd", "--modes=aum",
            *folders(tmp_path, "datasets", "metrics"))  # fmt: skip
    drawn = load_dataset(name, ".", test_fraction=0.3)[0].drawn
    scores = Proxy("aum", name, folder=tmp_path / "metrics").scores
    assert np.flatnonzero(np.isnan(scores)).tolist() == drawn.tolist()
    refuse("train_full.py", flags[0], *TRAINING, "--optimizer=sgd", "--measure_proxies", *folders(tmp_path, *TRAIN),
           status=FILE, says=r"test_fraction \(0.3 vs. 0.2\)")  # fmt: skip
    refuse("train_full.py", "--dataset=digits", "--test_fraction=0.3", status=FLAG, says="own data")
    refuse("train_full.py", flags[0], "--test_fraction=0", status=FLAG, says="test_fraction")
    refuse("train_full.py", flags[0], *TRAINING, "--test_fraction=0.001", *folders(tmp_path, *TRAIN), status=FILE,
           says="larger fraction")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- npz


def images(shape=(8, 8, 3), count=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save(path, **changed):
    arrays = {"x_train": images(), "y_train": LABELS, "x_test": images(seed=1), "y_test": LABELS, **changed}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return f"npz:{path}"


RGB, TEST = images(), images(seed=1)
WORDS = np.array(["bee", "ant", "dog", "cat"])  # class k in the order of the alphabet: see below
ALPHABET = np.argsort(np.argsort(WORDS))[LABELS]
SAME = {
    "floats to 1": ({"x_train": RGB / 255.0, "x_test": (TEST / 255).astype(np.float64)}, "0 to 1"),
    "floats to 255": ({"x_train": RGB.astype(np.float32), "x_test": TEST.astype(np.float32)}, "0 to 255"),
    "integers": ({"x_train": RGB.astype(np.int64), "x_test": TEST.astype(np.int64)}, "0 to 255"),
    "16 bits": ({"x_train": RGB.astype(np.uint16) * 257, "x_test": TEST.astype(np.uint16) * 257}, "0 to 65535"),
    "channels first": ({"x_train": np.moveaxis(RGB, 3, 1), "x_test": np.moveaxis(TEST, 3, 1)}, "channels first"),
    "one-hot": ({"y_train": np.eye(4)[LABELS], "y_test": np.eye(4, dtype=bool)[LABELS]}, "one-hot"),
    "from 1": ({"y_train": LABELS + 1, "y_test": (LABELS + 1)[:, None]}, "numbered from 1"),
    "whole floats": ({"y_train": LABELS.astype(np.float32), "y_test": LABELS.astype(np.float32)}, "whole numbers"),
    "other names": (
        {"x_train": None, "x_test": None, "X_train": RGB, "X_test": TEST},
        "using X_train and y_train as x_train and y_train",
    ),
    "medmnist": (
        {"x_train": None, "y_train": None, "x_test": None, "y_test": None, "train_images": RGB, "test_images": TEST,
         "train_labels": LABELS[:, None], "test_labels": LABELS[:, None]},
        "train_images",
    ),
    "validation": ({"x_test": None, "y_test": None, "x_val": TEST, "y_val": LABELS}, "x_val and y_val as x_test"),
}  # fmt: skip


@pytest.mark.parametrize("convention", SAME)
def test_conventions_give_the_same_data_set(tmp_path, caplog, convention):
    """The images, the labels and the name are those of the standard file, and one line states the assumption."""
    caplog.set_level("INFO")
    expected = load_dataset(save(tmp_path / "a.npz"), ".")
    assert not caplog.records
    changed, line = SAME[convention]
    found = load_dataset(save(tmp_path / "a.npz", **changed), ".")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(pixels(one), pixels(other))
        assert torch.equal(one.labels, other.labels)
    assert found[0].entry.name == expected[0].entry.name == dataset_name(f"npz:{tmp_path}/a.npz")
    assert any(line in record.getMessage() for record in caplog.records)


def test_text_labels_are_class_names(tmp_path):
    train, test = load_dataset(save(tmp_path / "a.npz", y_train=WORDS[LABELS], y_test=WORDS[LABELS].astype("S")), ".")
    assert train.class_names == ["ant", "bee", "cat", "dog"]
    assert train.labels.tolist() == test.labels.tolist() == ALPHABET.tolist()
    named = save(tmp_path / "a.npz", y_train=WORDS[LABELS], y_test=WORDS[LABELS], class_names=WORDS)
    assert load_dataset(named, ".")[0].labels.tolist() == LABELS.tolist()


def test_npz_without_a_test_part(tmp_path):
    name = save(tmp_path / "a.npz", x_train=None, y_train=None, x_test=None, y_test=None, x=RGB, y=LABELS)
    train, test = load_dataset(name, ".")
    assert np.bincount(test.labels).tolist() == [1, 1, 1, 1]
    assert torch.equal(pixels(train), torch.from_numpy(RGB).permute(0, 3, 1, 2))
    assert DataConfig(name).examples(".").digest == train.digest


DIM = RGB // 16
UNCLEAR = {
    "negative": ({"x_train": RGB / 127.5 - 1, "x_test": TEST / 127.5 - 1}, "negative values"),
    "not finite": ({"x_train": np.full(RGB.shape, np.nan), "x_test": TEST / 255}, "not finite"),
    "floats to 15": ({"x_train": DIM / 1.0, "x_test": DIM / 1.0}, "scale is unclear"),
    "integers to 15": ({"x_train": DIM.astype(int), "x_test": DIM.astype(int)}, "scale is unclear"),
    "12 bits": ({"x_train": RGB.astype(np.uint16) * 16, "x_test": TEST.astype(np.uint16) * 16}, "12 bits"),
    "large": ({"x_train": RGB * 9.0, "x_test": TEST * 9.0}, "scale is unclear"),
    "two dtypes": ({"x_train": RGB / 255}, "same dtype"),
    "3x3": ({"x_train": images((3, 3, 3)), "x_test": images((3, 3, 3))}, "channels first or last"),
    "two names": (
        {"x_train": None, "X_train": RGB, "train_images": RGB, "train_labels": LABELS}, "X_train, train_images",
    ),
    "not one-hot": ({"y_train": np.ones((20, 4))}, "row 0 is not one-hot"),
    "fractions": ({"y_train": LABELS + 0.5}, "whole numbers"),
    "some text": ({"y_train": WORDS[LABELS]}, "only one of"),
    "unknown text": ({"y_train": WORDS[LABELS], "y_test": np.array(["eel"] * 20)}, "'eel'"),
    "from 2": ({"y_train": LABELS + 2, "y_test": LABELS + 2}, "no images of class 0"),
    "from 1 with five names": (
        {"y_train": LABELS + 1, "y_test": LABELS + 1, "class_names": np.array(list("abcde"))}, "no images of class 0",
    ),
    "images without labels": ({"y_test": None}, "y_test"),
    "file names": ({"files_train": np.array(["a", "b"])}, "2 names for 20 images"),
}  # fmt: skip


def test_other_arrays_next_to_ours_are_ignored(tmp_path):
    name = load_dataset(save(tmp_path / "a.npz"), ".")[0].entry.name
    more = {"X_train": TEST, "x": TEST, "y": LABELS, "x_val": TEST, "test_images": RGB, "test_labels": LABELS}
    assert load_dataset(save(tmp_path / "a.npz", **more), ".")[0].entry.name == name


@pytest.mark.parametrize("convention", UNCLEAR)
def test_unclear_arrays_are_refused_in_one_line(tmp_path, convention):
    changed, line = UNCLEAR[convention]
    with pytest.raises(FileError, match=line) as caught:
        load_dataset(save(tmp_path / "a.npz", **changed), ".")
    assert str(caught.value).startswith(f"{tmp_path}/a.npz: ")
    assert "\n" not in str(caught.value)
