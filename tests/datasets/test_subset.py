import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.datasets import parse_subset
from src.errors import FileError, FlagError


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


@pytest.mark.parametrize("text", ["0", "-3", "101", "+0"])
def test_number_out_of_range(text):
    with pytest.raises(FlagError, match=r"^subset .*1 to 100"):
        parse_subset(text, 100, np.zeros(100, int))


def test_file(tmp_path):
    path = tmp_path / "chosen.txt"
    path.write_text("7\n3\n99\n")
    assert parse_subset(str(path), 100, np.zeros(100, int)).tolist() == [3, 7, 99]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n100\n", "index 100"),
        ("4\n4\n", "4 twice"),
        ("a\n", "chosen.txt"),
        ("", "chosen.txt"),
        ("-1\n", "chosen.txt"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "chosen.txt"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        parse_subset(str(path), 100, np.zeros(100, int))


def test_missing_file(tmp_path):
    with pytest.raises(FileError, match=r"none\.txt"):
        parse_subset(str(tmp_path / "none.txt"), 100, np.zeros(100, int))
