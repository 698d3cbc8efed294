import hashlib
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datasets import make_splits, parse_subset, validation_indices
from src.errors import ArgumentError, FileError


def split_path(folder, seed, index):
    return folder / "made" / f"seed_{seed}" / f"val_{index}.txt"


VECTORS = [
    (1000, 1, "83160a3989f7", [400, 350, 810, 610, 980, 680], [459, 49, 509], 100),
    (1000, 2, "9af0799122f2", [240, 10, 220], [], 100),
    (1000, 10, "3eb47613b21f", [700, 510, 940], [], 100),
    (1037, 1, "3a9c91cc6e7b", [560, 710, 400], [], 100),
    (1037, 10, "0063e5e81711", [530, 500, 70], [], 137),
]


@pytest.mark.parametrize(("count", "index", "digest", "head", "tail", "size"), VECTORS)
def test_files_equal_the_published_vectors(tmp_path, count, index, digest, head, tail, size):
    split = validation_indices(tmp_path, "made", 1234, index, np.arange(count) % 10, 10)
    assert split[: len(head)].tolist() == head
    assert split[len(split) - len(tail) :].tolist() == tail
    assert len(split) == size
    content = split_path(tmp_path, 1234, index).read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith(digest)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_splits_partition_and_are_stratified(labels, seed):
    labels = np.array(labels)
    splits = make_splits(labels, 5, seed)
    assert np.array_equal(np.sort(np.concatenate(splits)), np.arange(len(labels)))
    counts = np.bincount(labels, minlength=5)
    for split in splits[:9]:
        assert np.array_equal(np.bincount(labels[split], minlength=5), counts // 10)
        assert (np.diff(labels[split]) >= 0).all()  # grouped by class


@pytest.mark.parametrize("index", [0, 11, -1])
def test_index_out_of_range_names_the_argument(tmp_path, index):
    with pytest.raises(ArgumentError, match=r"samis_validation_split_index .*1 to 10"):
        validation_indices(tmp_path, "made", 1, index, np.zeros(100, int), 1)


def test_too_few_examples_for_a_split(tmp_path):
    labels = np.arange(18) % 2
    with pytest.raises(ArgumentError, match="empty"):
        validation_indices(tmp_path, "made", 1, 3, labels, 2)
    assert len(validation_indices(tmp_path, "made", 1, 10, labels, 2)) == 18


def test_small_class_beside_a_large_one(tmp_path):
    labels = np.array([0] * 30 + [1] * 5)
    assert (labels[validation_indices(tmp_path, "made", 1, 1, labels, 2)] == 0).all()
    assert np.bincount(labels[validation_indices(tmp_path, "made", 1, 10, labels, 2)]).tolist() == [3, 5]


def test_missing_file_is_made_again(tmp_path):
    labels = np.arange(100) % 5
    before = validation_indices(tmp_path, "made", 3, 7, labels, 5)
    split_path(tmp_path, 3, 7).unlink()
    assert np.array_equal(validation_indices(tmp_path, "made", 3, 7, labels, 5), before)


@pytest.mark.parametrize("damage", [lambda lines: lines[:-3], lambda lines: [lines[1], *lines[1:]]])
def test_damaged_file_is_named(tmp_path, damage):
    labels = np.arange(100) % 5
    validation_indices(tmp_path, "made", 3, 1, labels, 5)
    path = split_path(tmp_path, 3, 4)
    path.write_text("\n".join(damage(path.read_text().split())))
    with pytest.raises(FileError, match=r"val_4\.txt"):
        validation_indices(tmp_path, "made", 3, 4, labels, 5)


def test_overlap_and_foreign_files_are_named(tmp_path):
    labels = np.arange(100) % 5
    validation_indices(tmp_path, "made", 3, 1, labels, 5)
    path = split_path(tmp_path, 3, 2)
    path.write_text(split_path(tmp_path, 3, 1).read_text())
    with pytest.raises(FileError, match=r"val_2\.txt.*val_1\.txt"):
        validation_indices(tmp_path, "made", 3, 5, labels, 5)
    with pytest.raises(FileError, match=r"val_1\.txt: is not split 1 of these 200"):
        validation_indices(tmp_path, "made", 3, 5, np.arange(200) % 5, 5)


def test_unwritable_folder_is_a_file_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FileError, match="could not be written"):
        validation_indices(blocked, "made", 1, 1, np.zeros(100, int), 1)


def _work(folder, start, queue):
    start.wait()
    queue.put(validation_indices(folder, "made", 5, 6, np.arange(2000) % 10, 10).tolist())


def test_processes_at_once_agree_and_leave_nothing_behind(tmp_path):
    context = multiprocessing.get_context("fork")
    start, queue = context.Event(), context.Queue()
    workers = [context.Process(target=_work, args=(tmp_path, start, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(result == results[0] for result in results)
    folder = split_path(tmp_path, 5, 6).parent
    assert sorted(path.name for path in folder.parent.iterdir()) == ["seed_5"]
    assert len(list(folder.iterdir())) == 10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=150), st.data())
def test_number_takes_the_same_share_of_each_class(labels, data):
    labels = np.array(labels)
    count = data.draw(st.integers(1, len(labels)))
    chosen = parse_subset(str(count), len(labels), labels)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    assert chosen.min() >= 0
    assert chosen.max() < len(labels)
    sizes = np.bincount(labels, minlength=6)
    assert (np.abs(np.bincount(labels[chosen], minlength=6) - sizes * count / len(labels)) < 1).all()
    assert np.array_equal(chosen, parse_subset(str(count), len(labels), labels))


def test_subset_file(tmp_path):
    path = tmp_path / "chosen.txt"
    path.write_text("7\n3\n99\n")
    assert parse_subset(str(path), 100, np.zeros(100, int)).tolist() == [3, 7, 99]
