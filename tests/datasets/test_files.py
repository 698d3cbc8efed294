"""From scores and selections back to the user's files, through the scripts, with odd file names."""

import csv
import glob
import os

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, refuse
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts.io import read_json, read_npz
from src.artifacts.store import write_scores
from src.datasets import DataConfig, load_dataset, training_indices
from src.datasets.files import materialize, ranks, short_name, write_score_table
from src.datasets.splits import read_exclusions
from src.errors import ArgumentError
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


def test_equal_scores_share_the_best_rank():
    assert ranks(np.array([0.5, 1.0, np.nan, 0.5, 1.0, 0.1])).tolist() == [3, 1, 0, 3, 1, 5]


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
    monkeypatch.setattr("src.datasets.own_images.open_image", None)
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


def test_data_without_files_become_png_files(tmp_path, monkeypatch):
    data = write_blobs(tmp_path / "blobs.npz", n=30, class_names=np.array(["a/b", "..", "plain"]))
    train, _ = load_dataset(f"npz:{data}", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    succeed("select_coreset.py", f"--dataset=npz:{data}", "--model=small_mlp", "--coreset_func=random",
            "--coreset_fraction=0.3", "--materialize=.", f"--out={tmp_path / 's.npz'}",
            *folders(tmp_path, *TRAIN))  # fmt: skip
    rows = rows_of(tmp_path / "s.csv")
    assert {row["file"] for row in rows} == {""}
    places = {"a/b": "a_b", "..": "_..", "plain": "plain"}
    assert len(glob.glob("**/*.png", recursive=True)) == len(rows) == 9
    for row in rows:
        image = Image.open(tmp_path / "out" / places[row["class"]] / f"{int(row['index']):02}.png")
        expected = train.fetch(torch.tensor([int(row["index"])]))[0, 0]
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_table_never_shows_older_scores(tmp_path):
    examples = load_dataset(f"npz:{write_blobs(tmp_path / 'b.npz', n=6)}", tmp_path)[0].examples
    path = tmp_path / "aum_b.pkl"
    write_scores(path, np.arange(6.0), {})
    table = write_score_table(path, np.arange(6.0), examples)
    assert [row["index"] for row in rows_of(table)] == list("543210")
    write_scores(path, -np.arange(6.0), {})  # interrupted before the table
    assert not table.exists()


def listed(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "my photos")


def test_exclusions_are_indices_names_paths_or_csv_files(photos, tmp_path, monkeypatch):
    examples = DataConfig(f"folder:{photos}").examples(tmp_path)
    names = list(examples.files)

    def indices(*lines, name="list.txt"):
        return read_exclusions(listed(tmp_path / name, *lines), examples).tolist()

    assert indices("3", " 0 ", "3") == [0, 3]
    assert indices(*names[2:8]) == [2, 3, 4, 5, 6, 7]
    monkeypatch.chdir(photos.parent)
    assert indices(f"my photos/{names[1]}", photos / names[4], "", "7") == [1, 4, 7]
    for column, values in (("index", [5, 2]), ("file", [names[5], names[2]])):
        with (tmp_path / "issues.csv").open("w", newline="", encoding="utf-8") as file:
            rows = [[k, value, 0.5] for k, value in enumerate(values)]
            csv.writer(file).writerows([["rank", column, "score"], *rows])
        assert read_exclusions(tmp_path / "issues.csv", examples).tolist() == [2, 5]
    assert indices("index,file", name="none.csv") == []  # as find_duplicates.py writes if there are no duplicates
    assert training_indices(DataConfig(f"folder:{photos}", exclude=str(tmp_path / "none.csv")), examples) is None


def test_exclusions_combine_with_subsets(photos, tmp_path):
    examples = DataConfig(f"folder:{photos}").examples(tmp_path)
    out = listed(tmp_path / "out", 0, 1, 6)

    def chosen(**options):
        return training_indices(DataConfig(f"folder:{photos}", **options), examples)

    assert chosen() is None
    assert chosen(exclude=str(out)).tolist() == [2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert chosen(exclude=str(out), subset=str(listed(tmp_path / "in", 0, 2, 6, 9))).tolist() == [2, 9]
    some = chosen(exclude=str(out), subset="5")
    assert len(some) == 5
    assert not set(some) & {0, 1, 6}
    assert set(chosen(subset="12").tolist()) == set(range(12))
    with pytest.raises(ArgumentError, match="from 1 to 9"):
        chosen(exclude=str(out), subset="10")


def test_excluded_examples_that_were_drawn_for_testing_are_reported(tmp_path, caplog):
    flat = write_photos(tmp_path, parts=("flat",)) / "flat"
    examples = DataConfig(f"folder:{flat}", test_fraction=0.3).examples(tmp_path)
    trained = np.setdiff1d(np.arange(12), examples.drawn)
    out = listed(tmp_path / "out", examples.drawn[0], trained[0], trained[1])
    caplog.set_level("INFO")
    chosen = training_indices(DataConfig(f"folder:{flat}", test_fraction=0.3, exclude=str(out)), examples)
    assert chosen.tolist() == trained[2:].tolist()
    assert f"excluded 2 of {len(trained)} training examples" in caplog.text
    assert "1 of its examples were drawn for testing" in caplog.text


def test_excluded_examples_are_not_trained_on(photos, tmp_path):
    data = f"--dataset=folder:{photos}"
    names = sorted(ODD)
    out = listed(tmp_path / "out.txt", f"train/light/{names[1]}", 2)
    where = folders(tmp_path, *TRAIN)
    full = (data, *TRAINING, "--optimizer=sgd", "--measure_proxies")
    succeed("train_full.py", *full, f"--exclude={out}", *where)
    succeed("average_scores.py", data, "--model=small_mlp", "--seeds=1", "--optimizer=sgd", "--modes=aum",
            where[0], where[2])  # fmt: skip
    scores = Proxy("aum", "my_photos", folder=tmp_path / "metrics").scores
    assert np.flatnonzero(np.isnan(scores)).tolist() == [2, 7]
    assert read_json(next(tmp_path.rglob("results.json")))["settings"]["examples"] == 10
    other = listed(tmp_path / "less", 2)
    refuse("train_full.py", *full, f"--exclude={other}", *where, status=FILE, says="subset")
    succeed("train_full.py", *full, f"--exclude={listed(tmp_path / 'again', 2, 7)}", "--resume", *where)
    for lines, says in (
        (["train/light/a b.png", "light/none.png", "x"], ("'light/none.png' matches no training example", "2 lines")),
        ([12], ("index 12", "0 to 11")),
        (range(12), ("leaves no training examples",)),
        ([], ("empty",)),
    ):
        bad = listed(tmp_path / "bad.txt", *lines)
        refuse("train_full.py", *full, f"--exclude={bad}", *where, status=FILE, says=("bad.txt", *says))
    refuse("train_full.py", *full, "--exclude=nowhere.txt", *where, status=FILE, says="nowhere.txt")


def test_names_that_are_not_valid_text(tmp_path):
    """They are escaped where they are printed, and files are found by their real names."""
    write_photos(tmp_path / "pets", (".",))
    real = os.fsencode(tmp_path / "pets" / "light") + b"/\xff.png"
    os.rename(tmp_path / "pets" / "light" / ODD[0], real)
    full, _ = load_dataset(f"folder:{tmp_path}/pets", tmp_path)
    (index,) = (k for k in range(12) if full.files[k] == "light/\\xff.png")
    assert read_exclusions(listed(tmp_path / "out.txt", "light/\\xff.png"), full.examples).tolist() == [index]
    materialize(full.subset(torch.tensor([index])), tmp_path / "m")
    assert os.path.samefile(os.fsencode(tmp_path / "m" / "light") + b"/\xff.png", real)


def test_short_names():
    assert short_name("train/cat/IMG_1.jpg") == "IMG_1.jpg"
    assert short_name("train/cat/photo_of_my_cat_0001.jpg") == "pho…t_0001.jpg"
