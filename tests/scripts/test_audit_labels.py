"""audit_labels.py: planted errors in the user's own images, its files, and bad input."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image
from refusals import FILE, FLAG, refuse
from support import folders, succeed, write_blobs

from src.artifacts.io import read_json
from src.metrics import Proxy

WRONG = np.array([4, 17, 30, 31, 55])


def softened(true, classes=3):
    """Confident probabilities of the true class, which differ between examples."""
    noise = np.random.default_rng(0).dirichlet(np.ones(classes), len(true))
    return 0.99 * np.eye(classes)[true] + 0.01 * noise


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """120 images in an npz file, of which five have a wrong label, and probabilities."""
    base = tmp_path_factory.mktemp("audit")
    true = np.arange(120) % 3
    labels = true.copy()
    labels[WRONG] = (labels[WRONG] + 1) % 3
    data = write_blobs(base / "blobs.npz", y_train=labels, class_names=np.array(["ant", "bee", "cat"]))
    np.save(base / "p.npy", softened(true))
    return base, (f"--dataset=npz:{data}", f"--probabilities={base / 'p.npy'}"), true, labels


def read_issues(folder):
    (path,) = folder.rglob("label_issues.csv")
    with path.open() as file:
        return list(csv.DictReader(file)), read_json(path.with_suffix(".json"))


def test_planted_errors_are_listed(planted, tmp_path):
    _, flags, true, labels = planted
    where = folders(tmp_path, "datasets", "metrics")
    done = succeed("audit_labels.py", *flags, *where)
    rows, record = read_issues(tmp_path)
    assert list(rows[0]) == ["index", "file", "given label", "suggested label", "probability", "score", "rank"]
    assert sorted(int(row["index"]) for row in rows) == WRONG.tolist()
    names = ("ant", "bee", "cat")
    for rank, row in enumerate(rows, start=1):
        i = int(row["index"])
        assert (row["given label"], row["suggested label"]) == (names[labels[i]], names[true[i]])
        assert (row["file"], int(row["rank"])) == ("", rank)
        assert float(row["probability"]) > 0.5
    assert record["estimated_errors"] == pytest.approx(5, abs=0.5)
    assert sum(pair["examples"] for pair in record["most_common"]) == 5
    proxy = Proxy("label_error", "blobs", folder=tmp_path / "metrics", n=120)
    assert proxy.get_sorted_indices()[-5:][::-1].tolist() == [int(row["index"]) for row in rows]
    assert "about 5 of 120 labels are probably wrong (4.2%); two estimates: 5 and 5" in done.out
    assert done.out.count("\n  ") == 5
    assert "plot_images.py" in done.out
    assert "overestimated" not in done.err
    succeed("plot_images.py", flags[0], "--modes=label_error", "--n=2", "--only_overview", *where,
            *folders(tmp_path, "plots"))  # fmt: skip
    with_top = succeed("audit_labels.py", *flags, "--top=7", *where)
    assert len(read_issues(tmp_path)[0]) == 7
    assert with_top.status == 0


def test_weak_models_are_reported(planted, tmp_path):
    """Models that predict 60 % of the labels out of sample make most mistakes themselves."""
    _, flags, true, _ = planted
    guesses = np.where(np.arange(120) % 5 < 3, true, (true + 1) % 3)
    np.save(tmp_path / "weak.npy", softened(guesses))
    flags = (flags[0], f"--probabilities={tmp_path / 'weak.npy'}", *folders(tmp_path, "datasets", "metrics"))
    assert "overestimated" in succeed("audit_labels.py", *flags).err


def test_ranks_are_combined_with_those_of_a_score(planted, tmp_path):
    """The other score is highest for the last examples."""
    _, flags, _, _ = planted
    where = folders(tmp_path, "datasets", "metrics")
    np.save(tmp_path / "other.npy", np.arange(120.0))
    succeed("register_score.py", tmp_path / "other.npy", "--mode=other", flags[0], "--high=atypical", *where)
    refuse("audit_labels.py", *flags, "--combine", "another", *where, status=FLAG, says=("another", "unknown score"))
    succeed("audit_labels.py", *flags, *where)
    alone = Proxy("label_error", "blobs", normalize=False, folder=tmp_path / "metrics").scores
    refuse("audit_labels.py", *flags, "--combine", "other", *where, status=FILE, says="combine", keep=tmp_path)
    succeed("audit_labels.py", *flags, "--combine", "other", "--overwrite", *where)
    rows, _ = read_issues(tmp_path)
    ranks = alone.argsort().argsort() + 1
    expected = (ranks + np.arange(1, 121)) / 240
    assert int(rows[0]["index"]) == expected.argmax()
    found = Proxy("label_error", "blobs", normalize=False, folder=tmp_path / "metrics").scores
    np.testing.assert_allclose(found, expected)


def test_the_files_of_a_folder(tmp_path, monkeypatch):
    """The paths in the table, relative to the folder, are those of the images in the order of the training set."""
    generator = np.random.default_rng(1)
    for part, count in (("train", 6), ("test", 1)):
        for level, name in enumerate(("dark", "light")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = generator.integers(0, 40, (8, 8)) + 200 * level
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / part / name / f"{k}.png")
    (tmp_path / "photos" / "train" / "light" / "3.png").rename(tmp_path / "photos" / "train" / "dark" / "9.png")
    np.save(tmp_path / "p.npy", softened(np.repeat([0, 1], [6, 6]), 2))  # dark: 0-5 and the light image 9
    monkeypatch.chdir(tmp_path)
    done = succeed("audit_labels.py", "--dataset=folder:photos", "--probabilities=p.npy",
                   *folders(tmp_path, "datasets", "metrics"))  # fmt: skip
    rows, _ = read_issues(tmp_path)
    assert [(row["file"], row["given label"], row["suggested label"]) for row in rows] == [
        ("train/dark/9.png", "dark", "light")
    ]
    assert "train/dark/9.png, dark, light" in done.out


def test_bad_input(planted, tmp_path, monkeypatch):
    _, flags, true, _ = planted
    where = folders(tmp_path, "datasets", "metrics")
    refuse("audit_labels.py", flags[0], *where, status=FILE, says=("out_of_sample_blobs", "--folds 5"), keep=tmp_path)
    refuse("audit_labels.py", *where, status=FLAG, says="dataset")
    refuse("audit_labels.py", *flags, "--top=0", *where, status=FLAG, says="top")
    np.save(tmp_path / "short.npy", softened(true)[:100])
    bad = (flags[0], f"--probabilities={tmp_path / 'short.npy'}")
    refuse("audit_labels.py", *bad, *where, status=FILE, says=(r"short.npy", r"\(100, 3\)"), keep=tmp_path)
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    refuse("audit_labels.py", *flags, "--cleanlab", *where, status=FLAG, says="pip install", keep=tmp_path)


def test_cleanlab_beside_it(planted, tmp_path):
    pytest.importorskip("cleanlab")
    _, flags, _, _ = planted
    done = succeed("audit_labels.py", *flags, "--cleanlab", *folders(tmp_path, "datasets", "metrics"))
    rows, record = read_issues(tmp_path)
    assert [row["cleanlab issue"] for row in rows] == ["1"] * 5
    assert sorted(int(row["cleanlab rank"]) for row in rows) == [1, 2, 3, 4, 5]
    assert record["cleanlab_issues"] == 5
    assert "cleanlab selects 5, of which 5 are among the 5 most suspicious here" in done.out
