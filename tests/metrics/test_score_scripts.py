"""The scripts that average, fetch and plot scores, run as by users."""

import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from support import TRAIN, call, folders, succeed, write_blobs

from src.artifacts.io import label_hash
from src.artifacts.store import write_scores
from src.datasets import load_dataset
from src.metrics import SCORES, Proxy
from src.metrics.average import RUN_MODES
from src.metrics.samis import FIELDS, save_seed


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Blobs with two made-up scores; returns the folder, the data set's flag and its name in paths."""
    base = tmp_path_factory.mktemp("toy")
    path = write_blobs(base / "blobs.npz", n=30)
    train, _ = load_dataset(f"npz:{path}", base)
    rng = np.random.default_rng(0)
    difficulty = rng.random(30)
    for mode, noise in (("csl", 0.1), ("aum", 0.3)):
        target = SCORES[mode].path(base / "metrics", train.entry.name)
        record = {"label_hash": label_hash(train.labels)}
        write_scores(target, difficulty + noise * rng.random(30), record)
    return base, f"--dataset=npz:{path}", train.entry.name


def test_plot_proxies_draws_and_tabulates_what_is_there(toy, tmp_path):
    base, dataset, name = toy
    done = succeed("plot_proxies.py", dataset, f"--metrics_folder={base / 'metrics'}", f"--plots_folder={tmp_path}")
    folder = tmp_path / "proxies" / name
    correlation, distributions, *paths = done.out.splitlines()
    assert re.search(r" and .*: Spearman -?\d\.\d{3} \(within class -?\d\.\d{3}\)$", correlation)
    assert distributions.startswith(f"{folder}: distributions of 2 scores")
    assert [Path(path).name for path in paths] == ["comparison.png", "comparison.pdf", "correlations.csv"]
    assert all(Path(path).is_file() for path in paths)
    stems = ("all_scores_hist", "all_scores_distribution", "all_prob_dist")
    for mode in ("csl", "aum"):
        assert {p.name for p in (folder / mode).iterdir()} == {f"{s}.{k}" for s in stems for k in ("png", "pdf")}
    rows = list(csv.DictReader((folder / "correlations.csv").read_text().splitlines()))
    assert [(row["score"], row["reference"]) for row in rows] == [
        ("csl", "csl"), ("csl", "aum"), ("aum", "csl"), ("aum", "aum"),
    ]  # fmt: skip
    table = json.loads((folder / "correlations.json").read_text())
    assert table["csl"]["csl"]["spearman"] == pytest.approx(1.0)
    assert float(rows[1]["spearman_within_class"]) == table["csl"]["aum"]["spearman_within_class"]
    assert (folder / "comparison.png").exists()
    assert (folder / "comparison.pdf").exists()


def test_plot_proxies_against_a_reference_folder(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, f"--metrics_folder={tmp_path}", f"--plots_folder={tmp_path}", "--modes", "csl")
    folder = ("--scores_folder", base / "metrics", "--reference", base / "metrics")
    succeed("plot_proxies.py", *flags, *folder, "--reference_modes", "aum")
    table = json.loads((tmp_path / "proxies" / name / "correlations.json").read_text())
    assert {score: list(row) for score, row in table.items()} == {"csl": ["aum"]}
    refused = call("plot_proxies.py", *flags, *folder, "--reference_modes", "mem")
    assert (refused.status, "--reference_modes" in refused.complaint) == (1, True)
    refused = call("plot_proxies.py", *flags, "--scores_folder", base / "metrics", "--reference", tmp_path)
    assert (refused.status, "--reference" in refused.complaint) == (2, True)
    write_scores(SCORES["csl"].path(tmp_path, "cifar10"), np.arange(5.0), {})
    (tmp_path / "none").mkdir()
    cifar = ("--dataset=cifar10", f"--datasets_folder={tmp_path / 'no_data'}", *flags[1:])
    for chosen, status, remedy in (
        ((), 2, f"fetch_scores.py --dataset cifar10 --folder={tmp_path / 'none'}"),
        (("--reference_modes", "forg"), 1, f"--modes forg --folder={tmp_path / 'none'}"),
    ):
        refused = call("plot_proxies.py", *cifar, "--reference", tmp_path / "none", *chosen)
        assert (refused.status, remedy in refused.complaint) == (status, True), refused.err


def test_scores_of_other_labels_are_refused_by_both_figures(toy, tmp_path):
    base, dataset, name = toy
    for change, named in (({"label_hash": "0" * 16}, "different labels"), ({}, "was made for 29 examples")):
        write_scores(SCORES["csl"].path(tmp_path, name), np.arange(30.0 if change else 29.0), change)
        for script in ("plot_proxies.py", "plot_images.py"):
            place = (f"--plots_folder={tmp_path / 'plots'}", f"--metrics_folder={base / 'metrics'}")
            refused = call(script, dataset, "--modes", "csl", f"--scores_folder={tmp_path}", *place)
            assert refused.status == 1
            assert named in refused.complaint
            assert "csl_" in refused.complaint


def test_plot_images_draws_each_class_and_the_overview(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, f"--metrics_folder={base / 'metrics'}", f"--plots_folder={tmp_path}", "--n=2")
    succeed("plot_images.py", *flags, "--modes", "csl", "aum")
    folder = tmp_path / "images" / name
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    stems = [f"{end}_csl_aum_2/{label}" for end in ("lowest", "highest") for label in range(3)] + ["overview_csl_2"]
    assert found == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    succeed("plot_images.py", *flags, "--modes", "aum")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_class_names_of_any_kind_are_drawn(toy, tmp_path):
    base, dataset, name = toy
    names = ["cat \N{CAT}", "a$x^$", "$5 or $6_"]
    arrays = dict(np.load(dataset.removeprefix("--dataset=npz:")))
    np.savez(tmp_path / f"{name.rsplit('-', 1)[0]}.npz", **arrays, class_names=names)
    flags = (f"--dataset=npz:{tmp_path / name.rsplit('-', 1)[0]}.npz", f"--metrics_folder={base / 'metrics'}",
             f"--plots_folder={tmp_path}", "--modes", "csl", "--n=2")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        succeed("plot_images.py", *flags)
    assert len(list((tmp_path / "images" / name / "lowest_csl_2").glob("*.png"))) == 3


def test_plot_images_of_chosen_classes_and_a_subset(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, f"--metrics_folder={base / 'metrics'}", f"--plots_folder={tmp_path}", "--modes", "csl")
    succeed("plot_images.py", *flags, "--classes", "1", "--subset=6")
    assert [p.name for p in sorted((tmp_path / "images" / name / "lowest_csl_5").iterdir())] == ["1.pdf", "1.png"]
    refused = call("plot_images.py", *flags, "--classes", "zebra")
    assert (refused.status, "'zebra'" in refused.complaint) == (2, True)
    refused = call("plot_images.py", *flags, "--n=0")
    assert (refused.status, "--n" in refused.complaint) == (2, True)


def test_missing_scores_name_the_commands_that_make_them(toy, tmp_path):
    base, dataset, _ = toy
    refused = call("plot_images.py", dataset, "--modes", "samis_loss", f"--metrics_folder={base / 'metrics'}")
    assert refused.status == 1
    assert "compute_sam_sgd.py and average_scores.py" in refused.complaint


def test_average_scores_answers_bad_flags_in_one_line(toy, tmp_path):
    _, dataset, _ = toy
    place = folders(tmp_path, "datasets", "metrics")
    for flags, status, named in (
        (("--seeds", 1, 1), 2, "contains a duplicate"),
        (("--seeds", "-1"), 2, "--seeds"),
        (("--seeds", 1, "--modes", "mem"), 2, "--modes"),
        (("--seeds", 1, "--modes", "csl"), 1, "no recorded dynamics"),
        (("--seeds", 3), 1, "seed 3 has not been scored yet"),
    ):
        refused = call("average_scores.py", dataset, "--model=mlp", *flags, *place)
        assert (refused.status, named in refused.complaint) == (status, True), refused.err
    assert not (tmp_path / "metrics").exists()


def test_average_scores_keeps_other_results_and_writes_all_or_nothing(toy, tmp_path):
    _, dataset, name = toy
    for seed in (1, 2):
        columns = {key: np.random.default_rng(seed).random(30) for key in FIELDS[:5]}
        settings = {"dataset": name, "model": "mlp", "seed": seed, "epoch": 2, "protocol": "full"}
        save_seed(tmp_path / "metrics", columns, settings, "ab")
    flags = ("average_scores.py", dataset, "--model=mlp", *folders(tmp_path, "datasets", "metrics"))
    succeed(*flags, "--seeds", 1, "--modes", "samis_prob")
    refused = call(*flags, "--seeds", 1, 2)
    assert refused.status == 1
    assert "seeds ([1] vs. [1, 2])" in refused.complaint
    assert not SCORES["samis_loss"].path(tmp_path / "metrics", name).exists()
    succeed(*flags, "--seeds", 1, 2, "--overwrite")
    proxy = Proxy("samis_loss", name, folder=tmp_path / "metrics")
    assert proxy.record["seeds"] == [1, 2]
    assert proxy.record["model"] == "mlp"
    assert proxy.record["sources"] == [f"{name}/mlp/{seed}/nn_loss_diff_score.npz" for seed in (1, 2)]
    assert str(tmp_path) not in json.dumps(proxy.record)


def test_average_scores_leaves_out_what_a_short_run_cannot_give(toy, tmp_path):
    _, dataset, name = toy
    model = (dataset, "--model=small_mlp")
    succeed("train_full.py", *model, "--epochs=2", "--batch_size=16", "--learning_rate=0.05", "--lr_sched=const",
            "--optimizer=sgd", "--seed=1", "--measure_proxies", *folders(tmp_path, *TRAIN))  # fmt: skip
    flags = ("average_scores.py", *model, "--seeds", 1, "--optimizer=sgd", *folders(tmp_path, "datasets", "metrics"))
    done = succeed(*flags)
    assert re.findall("left out (.*):", done.err) == ["tdds, csg, cld"]
    assert "tdds" not in done.out
    written = {path.stem.removesuffix(f"_{name}") for path in (tmp_path / "metrics").glob("*/*.pkl")}
    assert written == {*RUN_MODES} - {"tdds", "csg", "cld"}
    refused = call(*flags, "--modes", "csl", "tdds")
    assert (refused.status, "tdds: needs at least 3 recorded epochs" in refused.complaint) == (2, True), refused.err


def test_fetch_scores_answers_in_one_line(tmp_path):
    refused = call("fetch_scores.py", "--dataset=cifar10", "--base_url=http://127.0.0.1:9", f"--folder={tmp_path}")
    assert refused.status == 1
    assert "6 of 6 files failed" in refused.complaint
    assert "download failed" in refused.complaint
    refused = call("fetch_scores.py", "--dataset=digits", f"--folder={tmp_path}")
    assert (refused.status, "--dataset" in refused.complaint) == (2, True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
