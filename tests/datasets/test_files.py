"""From scores and selections back to the user's files, through the scripts, with odd file names."""

import csv
import os

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, refuse
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts.io import read_npz
from src.datasets import load_dataset
from src.datasets.files import short_name
from src.metrics import Proxy

ODD = ["a b.png", "ü–日本.png", "$x^2$.png", 'comma, "quote".png', "it's 100%.png", " lead.png"]
TRAINING = ("--model=small_mlp", "--batch_size=4", "--learning_rate=0.05", "--lr_sched=const", "--epochs=2")


def write_photos(root, parts=("train", "test")):
    """Two classes of images with odd names: dark ones and light ones."""
    generator = np.random.default_rng(0)
    for part in parts:
        for level, name in enumerate(("dark & cold", "light")):
            (root / part / name).mkdir(parents=True)
            for file in ODD:
                pixels = generator.integers(0, 60, (8, 8, 3)) + 190 * level
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / file)
    return root


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("files")
    data = f"--dataset=folder:{write_photos(base / 'photos')}"
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", data, *TRAINING, f"--optimizer={optimizer}", *folders(base, *TRAIN))
    where = folders(base, "datasets", "models", "metrics")
    succeed("compute_sam_sgd.py", data, "--model=small_mlp", "--epochs=2", *where)
    succeed("average_scores.py", data, "--model=small_mlp", "--seeds", 1, where[0], where[2])
    return base, data


def test_scores_lead_back_to_the_files(trained, monkeypatch):
    base, data = trained
    monkeypatch.chdir(base)
    proxy = Proxy("samis_loss", "folder:photos", normalize=False, folder=base / "metrics")
    assert Proxy("samis_loss", "photos", folder=base / "metrics").path == proxy.path
    rows = rows_of(proxy.path.with_suffix(".csv"))
    assert list(rows[0]) == ["index", "file", "class", "score", "rank", "rank within class"]
    names = [f"train/{name}/{file}" for name in ("dark & cold", "light") for file in sorted(ODD)]
    order = np.argsort(-proxy.scores, kind="stable")
    assert [int(row["index"]) for row in rows] == order.tolist()
    seen = {}
    for rank, row in enumerate(rows, start=1):
        index = int(row["index"])
        assert (row["file"], row["class"]) == (names[index], names[index].split("/")[1])
        assert (base / "photos" / row["file"]).is_file()
        assert float(row["score"]) == proxy.scores[index]
        seen[row["class"]] = seen.get(row["class"], 0) + 1
        assert (int(row["rank"]), int(row["rank within class"])) == (rank, seen[row["class"]])
    done = succeed(
        "plot_images.py", data, "--modes=samis_loss", "--n=3", *folders(base, "datasets", "metrics", "plots")
    )
    assert f"{order[0]} ({names[order[0]]})" in done.out


def test_averages_read_labels_without_decoding(trained, monkeypatch):
    base, data = trained
    monkeypatch.setattr("src.datasets.decoding.open_image", None)
    monkeypatch.setattr("src.datasets.own.open_image", None)
    succeed("average_scores.py", data, "--model=small_mlp", "--seeds", 1, "--overwrite",
            *folders(base, "datasets", "metrics"))  # fmt: skip


def test_selection_becomes_a_folder(trained, tmp_path):
    base, data = trained
    flags = (data, "--model=small_mlp", "--coreset_func=random", "--coreset_fraction=0.5", *folders(base, *TRAIN))
    target = tmp_path / "chosen photos"
    succeed("select_coreset.py", *flags, f"--out={tmp_path / 's.npz'}", f"--materialize={target}")
    stored, rows = read_npz(tmp_path / "s.npz"), rows_of(tmp_path / "s.csv")
    assert [int(row["index"]) for row in rows] == stored["indices"].tolist()
    assert [float(row["weight"]) for row in rows] == stored["weights"].tolist()
    found = {path.relative_to(target).as_posix() for path in target.rglob("*.png")}
    assert found == {row["file"].removeprefix("train/") for row in rows}
    for row in rows:
        assert os.path.samefile(base / "photos" / row["file"], target / row["file"].removeprefix("train/"))
    refuse("select_coreset.py", *flags, f"--out={tmp_path / 's.npz'}", f"--materialize={target}", status=FILE,
           says=("chosen photos", "exists"), keep=target)  # fmt: skip


def test_data_without_files_become_png_files(tmp_path):
    data = write_blobs(tmp_path / "blobs.npz", n=30, class_names=np.array(["a/b", "..", "plain"]))
    train, _ = load_dataset(f"npz:{data}", tmp_path)
    (tmp_path / "out").mkdir()
    succeed("select_coreset.py", f"--dataset=npz:{data}", "--model=small_mlp", "--coreset_func=random",
            "--coreset_fraction=0.3", f"--materialize={tmp_path / 'out'}", f"--out={tmp_path / 's.npz'}",
            *folders(tmp_path, *TRAIN))  # fmt: skip
    rows = rows_of(tmp_path / "s.csv")
    assert {row["file"] for row in rows} == {""}
    places = {"a/b": "a_b", "..": "_..", "plain": "plain"}
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(rows) == 9
    for row in rows:
        image = Image.open(tmp_path / "out" / places[row["class"]] / f"{int(row['index']):02}.png")
        expected = train.fetch(torch.tensor([int(row["index"])]))[0, 0]
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_short_names():
    assert short_name("train/cat/IMG_1.jpg") == "IMG_1.jpg"
    assert short_name("train/cat/photo_of_my_cat_0001.jpg") == "photo_…001.jpg"
