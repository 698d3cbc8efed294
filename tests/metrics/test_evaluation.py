"""evaluate_scores.py and its library: intervals, AUROC, Pareto front, planted noise, and files."""

import csv
import itertools
import json

import numpy as np
import pytest
import scipy.stats
from refusals import FILE, FLAG, refuse
from sklearn.metrics import roc_auc_score
from support import folders, succeed, write_blobs

from src.artifacts.io import label_hash
from src.artifacts.store import write_scores
from src.datasets import load_dataset
from src.errors import ArgumentError
from src.metrics import SCORES
from src.metrics.compare import auroc, bootstrap, pareto_front, spearman
from src.metrics.evaluation import EvaluationConfig, evaluate, planted_mask
from src.metrics.plots import agreement_figure


def resampled(n, resamples, seed):
    """The examples of each resample, drawn as ``bootstrap`` draws them."""
    rng = np.random.default_rng(seed)
    return [rng.integers(n, size=n) for _ in range(resamples)]


@pytest.mark.parametrize("decimals", [1, 9])
def test_intervals_are_those_of_ranking_every_resample_with_scipy(decimals, monkeypatch):
    monkeypatch.setattr("src.metrics.compare._BLOCK", 40 * 7)  # several blocks, the last of them smaller
    rng = np.random.default_rng(decimals)
    reference = rng.normal(size=40).round(decimals)
    labels = np.repeat([0, 1, 2], [20, 18, 2])  # two examples have no rank correlation
    whole = (reference + rng.normal(size=40)).round(decimals)
    holes = np.where(np.arange(40) % 7 == 3, np.nan, -whole)
    found = bootstrap([whole, holes], reference, labels, resamples=30, confidence=0.8, seed=3)
    for values, intervals in zip((whole, holes), found, strict=True):
        every = {"spearman": [], "spearman_within_class": []}
        for drawn in resampled(40, 30, 3):
            drawn = drawn[~np.isnan(values[drawn])]
            a, b, c = values[drawn], reference[drawn], labels[drawn]
            every["spearman"].append(scipy.stats.spearmanr(a, b).statistic)
            each = [scipy.stats.spearmanr(a[c == k], b[c == k]).statistic for k in (0, 1)]
            every["spearman_within_class"].append(np.mean(each))
        for name, drawn in every.items():
            assert intervals[name][1:] == pytest.approx(np.quantile(drawn, [0.1, 0.9]), abs=1e-12)
        known = ~np.isnan(values)
        assert intervals["spearman"].value == spearman(values[known], reference[known])


def test_intervals_cover_the_true_correlation_as_often_as_they_claim():
    rng, rho = np.random.default_rng(0), 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's correlation of a bivariate normal distribution
    covered = []
    for seed in range(200):
        a = rng.normal(size=100)
        b = rho * a + np.sqrt(1 - rho**2) * rng.normal(size=100)
        _, low, high = bootstrap([a], b, resamples=200, confidence=0.9, seed=seed)[0]["spearman"]
        covered.append(low <= truth <= high)
    assert 0.83 < np.mean(covered) < 0.96  # 0.9 +- 3 standard errors


def test_auroc_is_sklearns_and_its_intervals_those_of_every_resample():
    rng = np.random.default_rng(0)
    wrong = rng.random(60) < 0.2
    scores = (wrong + rng.normal(size=60)).round(1)
    assert auroc(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores), rel=1e-12)
    assert auroc(np.arange(4.0), np.array([False, False, True, True])) == 1.0
    assert auroc(np.zeros(4), np.array([False, True, True, True])) == 0.5
    assert np.isnan(auroc(scores, np.ones(60, bool)))
    interval = bootstrap([scores], wrong, resamples=50, confidence=0.9, seed=1)[0]["auroc"]
    drawn = [roc_auc_score(wrong[index], scores[index]) for index in resampled(60, 50, 1)]
    assert interval == pytest.approx((roc_auc_score(wrong, scores), *np.quantile(drawn, [0.05, 0.95])), rel=1e-9)


def test_pareto_front_is_what_no_other_score_beats():
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs, values = rng.integers(1, 6, 8).tolist(), rng.integers(0, 6, 8).astype(float)
        beaten = {
            i
            for i, j in itertools.permutations(range(8), 2)
            if costs[j] <= costs[i] and values[j] >= values[i] and (costs[j], values[j]) != (costs[i], values[i])
        }
        assert sorted(pareto_front(costs, values)) == sorted(set(range(8)) - beaten)
    assert pareto_front([None, 2, 3, 1], [0.9, 0.5, 0.4, np.nan]) == [1]


def test_planted_noise_is_read_from_indices_masks_and_labels(tmp_path):
    clean = np.arange(30) % 3
    noisy = clean.copy()
    noisy[[4, 9, 20]] = (noisy[[4, 9, 20]] + 1) % 3
    mask = noisy != clean
    for name, content in (("indices", np.array([20, 4, 9])), ("mask", mask), ("ones", mask * 1), ("labels", clean)):
        np.save(tmp_path / f"{name}.npy", content)
        assert np.array_equal(planted_mask(tmp_path / f"{name}.npy", noisy), mask)
    (tmp_path / "indices.json").write_text("[4, 9, 20]")
    (tmp_path / "indices.csv").write_text("index\n4\n9\n20\n")
    np.savez(tmp_path / "data.npz", x_train=np.zeros((30, 2, 2)), y_train=clean)
    for name in ("indices.json", "indices.csv", "data.npz"):
        assert np.array_equal(planted_mask(tmp_path / name, noisy), mask)


def test_rows_are_sorted_and_restricted_to_the_chosen_examples():
    rng = np.random.default_rng(0)
    reference = rng.random(400)
    scores = {"weak": reference + rng.random(400), "exact": reference.copy(), "wrong": -reference}
    scores["exact"][::2] = rng.random(200)  # agrees at odd indices only
    costs = {"weak": 1.0, "exact": 3.0, "wrong": None}
    rows = evaluate(scores, reference, None, costs, EvaluationConfig(examples="odd", resamples=20))
    assert [row["score"] for row in rows] == ["exact", "weak", "wrong"]
    assert [row["spearman"] for row in rows][::2] == pytest.approx([1, -1])
    assert [row["top_10"] for row in rows][::2] == [1, 0]
    assert [row["pareto"] for row in rows] == [True, True, False]
    assert {row["examples"] for row in rows} == {200}
    assert {row["auroc"] for row in rows} == {row["spearman_within_class"] for row in rows} == {None}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Three made-up scores of 60 blobs, five of which have wrong labels."""
    base = tmp_path_factory.mktemp("toy")
    wrong, rng = np.array([3, 11, 24, 40, 53]), np.random.default_rng(0)
    clean = np.arange(60) % 3
    noisy = clean.copy()
    noisy[wrong] = (noisy[wrong] + 1) % 3
    np.save(base / "clean.npy", clean)
    path = write_blobs(base / "blobs.npz", n=60, y_train=noisy)
    train, _ = load_dataset(f"npz:{path}", base)
    difficulty = rng.random(60)
    difficulty[wrong] += 1
    record = {"label_hash": label_hash(train.labels)}
    for mode, values, cost in (
        ("csl", difficulty, 4.0),
        ("aum", difficulty + rng.random(60), 2.5),
        ("eps", -difficulty, None),
    ):
        known = {} if cost is None else {"cost": cost}
        write_scores(SCORES[mode].path(base / "metrics", train.entry.name), values, {**record, **known})
    return base, f"--dataset=npz:{path}", train.entry.name


def test_the_script_compares_with_a_score(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path}", "--resamples=50")
    done = succeed("evaluate_scores.py", *flags, "--reference=csl", "--orient")
    stem = tmp_path / "scores" / name / "against_csl"
    assert done.out.splitlines()[-6:-1] == [f"{stem}.{kind}" for kind in ("csv", "json", "md", "png", "pdf")]
    assert "eps: its sign disagrees with csl" in done.err
    assert "aum: its sign" not in done.err
    rows = list(csv.DictReader(stem.with_suffix(".csv").read_text().splitlines()))
    table = json.loads(stem.with_suffix(".json").read_text())
    assert [row["score"] for row in rows] == [row["score"] for row in table["rows"]] == ["aum", "eps"]
    assert [row["cost"] for row in rows] == ["2.5", ""]
    assert [float(row["spearman"]) for row in rows] == [row["spearman"] for row in table["rows"]]
    assert 0 < table["rows"][0]["spearman_low"] < table["rows"][0]["spearman"] < table["rows"][0]["spearman_high"]
    text = stem.with_suffix(".md").read_text()
    assert text in done.out
    assert "2.5 *" in text
    assert "unknown" in text


def test_the_script_counts_the_examples_that_have_scores(toy, tmp_path):
    base, dataset, _ = toy
    lines = ["index,score", *(f"{index},{index}" for index in range(10, 40))]
    (tmp_path / "partial.csv").write_text("\n".join(lines))
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path}", "--resamples=20")
    done = succeed("evaluate_scores.py", *flags, f"--reference={tmp_path / 'partial.csv'}")
    assert "agreement with partial, 30 examples" in done.out


def test_the_script_measures_how_planted_noise_is_found(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path}", "--resamples=50")
    succeed("evaluate_scores.py", *flags, f"--planted={base / 'clean.npy'}")
    rows = json.loads((tmp_path / "scores" / name / "against_planted_noise.json").read_text())["rows"]
    found = {row["score"]: row for row in rows}
    assert [found[mode]["auroc"] for mode in ("csl", "eps")] == [1, 0]
    assert (found["csl"]["top_5"], found["eps"]["top_5"]) == (1, 0)  # the top 3 of 60
    assert found["csl"]["top_10"] == pytest.approx(5 / 6)


def test_the_script_compares_with_a_file_of_either_orientation(toy, tmp_path):
    base, dataset, name = toy
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path}", "--resamples=50")
    rng = np.random.default_rng(1)
    np.savez(
        tmp_path / "consistency.npz", labels=np.arange(60) % 3, scores=-rng.random(60)
    )  # as C-scores are published
    for high, sign in (("atypical", 1), ("typical", -1)):
        file = f"--reference={tmp_path / 'consistency.npz'}"
        succeed("evaluate_scores.py", *flags, file, f"--reference_high={high}", "--modes", "csl")
        rows = json.loads((tmp_path / "scores" / name / "against_consistency.json").read_text())["rows"]
        if high == "atypical":
            first = rows[0]["spearman"]
        assert rows[0]["spearman"] == pytest.approx(sign * first)


def test_a_score_of_too_few_examples_is_left_out_unless_it_was_requested(caplog):
    values = np.arange(10.0)
    scores = {"aum": values, "few": np.where(values < 2, values, np.nan)}
    rows = evaluate(scores, values, None, {}, EvaluationConfig(resamples=20))
    assert [row["score"] for row in rows] == ["aum"]
    assert caplog.messages == ["left out few: few and the reference share 2 examples"]
    with pytest.raises(ArgumentError, match="few and the reference share 2"):
        evaluate(scores, values, None, {}, EvaluationConfig(resamples=20, modes=["aum", "few"]))


def test_bad_flags_and_files_end_in_one_line(toy, tmp_path):
    base, dataset, _ = toy
    flags = (dataset, *folders(base, "datasets", "metrics"), f"--plots_folder={tmp_path / 'plots'}")
    np.save(tmp_path / "short.npy", np.arange(7.0))
    np.save(tmp_path / "far.npy", np.array([3, 60]))
    (tmp_path / "one.txt").write_text("4\n")
    for more, status, says in (
        (("--reference=nope",), FLAG, "--reference nope: is neither a score nor a file"),
        (("--reference=mem",), FILE, "no memorization scores"),
        (("--reference=csl", "--reference_high=typical"), FLAG, "--reference_high"),
        (("--reference=csl", f"--planted={tmp_path / 'far.npy'}"), FLAG, "not allowed with"),
        (("--reference=csl", "--examples=some"), FLAG, "--examples some: no such file"),
        (("--reference=csl", f"--examples={tmp_path / 'one.txt'}"), FLAG, "share 1 examples"),
        (("--reference=csl", "--modes", "mem"), FILE, "no memorization scores"),
        (("--reference=csl", "--confidence=1"), FLAG, "--confidence"),
        ((f"--reference={tmp_path / 'short.npy'}",), FILE, "short.npy.*has 7 scores.*60 examples"),
        ((f"--planted={tmp_path / 'far.npy'}",), FILE, "60 is not an index"),
        ((f"--planted={tmp_path / 'none.npy'}",), FILE, "none.npy"),
    ):
        refuse("evaluate_scores.py", *flags, *more, status=status, says=says, keep=base)
    assert not (tmp_path / "plots").exists()


def test_the_figure_has_every_score_once_with_known_costs_on_a_log_axis():
    rows = [
        {"score": name, "auroc": None, "spearman": value, "spearman_low": value - 0.1, "spearman_high": value + 0.1,
         "cost": cost, "pareto": best}
        for name, value, cost, best in (("a", 0.5, 10.0, True), ("b", 0.501, 10.0, True), ("c", 0.8, None, False))
    ]  # fmt: skip
    figure = agreement_figure(rows, "toy")
    known, unknown = figure.axes
    assert known.get_xscale() == "log"
    texts = {text.get_text(): text for axes in figure.axes for text in axes.texts}
    assert sorted(texts) == ["a", "b", "c"]
    figure.draw_without_rendering()
    boxes = [texts[name].get_window_extent() for name in "ab"]
    assert not boxes[0].overlaps(boxes[1])
    assert unknown.get_xlabel() == "Cost unknown"
    assert known.get_legend_handles_labels()[1] == ["Pareto front"]
