"""What the page says, computed from planted truths, and the files of make_report.py."""

import base64
import csv
import gzip
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from refusals import FILE, FLAG, refuse
from support import folders, succeed, write_blobs

from src.artifacts import paths
from src.artifacts.io import label_hash, write_csv, write_json, write_npz, write_pickle
from src.artifacts.store import write_scores
from src.datasets import DataConfig
from src.metrics import SCORES
from src.metrics.label_errors import cleanlab_issues
from src.report import page, tables
from src.report.collect import Contents, Dynamics

N, CLASSES = 240, 3
WRONG = np.array([4, 17, 30, 31, 55])


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """Images with two scores and five wrong labels."""
    base = tmp_path_factory.mktemp("blobs")
    labels = np.arange(N) % CLASSES
    labels[WRONG] = (labels[WRONG] + 1) % CLASSES
    data = write_blobs(base / "blobs.npz", n=N, y_train=labels, class_names=np.array(["ant", "bee", "</script>"]))
    train, test = DataConfig(f"npz:{data}").load(base)
    rng = np.random.default_rng(0)
    scores = {"mem": rng.random(N), "csl": rng.random(N), "aum": rng.random(N)}
    scores["mem"][WRONG] += 1
    facts = {"label_hash": label_hash(labels), "data_hash": train.digest, "settings": {}}
    for mode, values in scores.items():
        write_scores(SCORES[mode].path(base / "metrics", train.entry.name), values, {**facts, "mode": mode})
    flags = (f"--dataset=npz:{data}", *folders(base, "datasets", "metrics", "models", "hessian", "ntk", "plots"))
    entries = {mode: SCORES[mode] for mode in scores}
    found = Contents(train, len(test), labels, scores, entries, {mode: {} for mode in scores})
    return base, flags, found, facts


def probabilities(labels):
    """Confident out-of-sample probabilities of the true classes."""
    true = labels.copy()
    true[WRONG] = (true[WRONG] - 1) % CLASSES
    return 0.97 * np.eye(CLASSES)[true] + 0.03 * np.random.default_rng(1).dirichlet(np.ones(CLASSES), N), true


def test_label_errors_are_those_of_confident_learning(blobs):
    _, _, found, _ = blobs
    p, true = probabilities(found.labels)
    found = replace(found, probabilities=p)
    assert tables.confident_errors(found).tolist() == WRONG.tolist()
    issues, how = tables.likely_errors(found)
    assert "Out-of-sample" in how
    assert sorted(one.example for one in issues[:5]) == WRONG.tolist()
    assert [one.confident for one in issues] == [True] * 5 + [False] * 15
    assert [one.suggested for one in issues[:5]] == [true[one.example] for one in issues[:5]]
    assert [one.given_probability for one in issues] == [p[one.example, found.labels[one.example]] for one in issues]
    pytest.importorskip("cleanlab")
    _, selected = cleanlab_issues(p, found.labels)
    assert np.flatnonzero(selected).tolist() == WRONG.tolist()
    assert tables.findings(found)[0].examples == WRONG.tolist()


def test_label_errors_from_dynamics_have_no_likely_class(blobs):
    _, _, found, _ = blobs
    margin = np.where(np.isin(np.arange(N), WRONG), -1.0, 2.0) + 0.01 * np.arange(N)
    curves, each = np.ones((2, CLASSES)), np.ones((2, N))
    dynamics = Dynamics(
        "run", [1], {}, [], curves, curves, curves, margin, margin, margin > 0, np.arange(2), each, each
    )
    issues, how = tables.likely_errors(replace(found, dynamics=dynamics))
    assert [one.example for one in issues[:5]] == WRONG.tolist()
    assert {one.suggested for one in issues} == {-1}
    assert "no likely class" in how


def test_findings_and_agreement_are_the_numbers(blobs):
    _, _, found, _ = blobs
    sentences = tables.findings(found)
    top = np.argsort(-found.scores["mem"], kind="stable")[:20]
    counts = np.bincount(found.labels[top], minlength=CLASSES)
    leader = counts.argmax()
    share = counts[leader] / 20 / np.mean(found.labels == leader)
    assert (
        f"{counts[leader]} are labeled “\u2068{found.class_names[leader]}\u2069”, {share:.1f} times"
        in sentences[0].text
    )
    assert set(sentences[0].examples) == set(top[found.labels[top] == leader].tolist())
    inside = sum(np.isin(np.arange(N), np.argsort(-v, kind="stable")[:12]) for v in found.scores.values())
    assert sentences[1].text.startswith(f"{np.count_nonzero(inside >= 2)} example")
    truth, rows = tables.agreement(found)
    assert (truth, {row["mode"] for row in rows}) == ("memorization", {"csl", "aum"})
    planted = np.isin(np.arange(N), WRONG)
    _, rows = tables.agreement(replace(found, planted=planted))
    assert rows[0] == {"mode": "mem", "auroc": 1.0, "precision": 1.0}


def test_ties_give_no_finding_about_classes(blobs):
    """The highest of 90 equal scores are those with the lowest indices, whatever their class."""
    _, _, found, _ = blobs

    def about_classes(values):
        sentences = tables.findings(replace(found, scores={"mem": values}), count=9)
        return [one.text for one in sentences if "times its share" in one.text]

    ordered = np.where(found.labels == 0, 1.0, 0.0) + found.scores["csl"] / 10
    assert len(about_classes(ordered)) == 1
    assert about_classes(np.round(ordered)) == []


def test_a_page_of_a_part_and_the_table_of_all(blobs, tmp_path):
    """Of a set that is too large, the page has the extremes of each class, and the table has everything."""
    _, flags, found, _ = blobs
    out = tmp_path / "page.html"
    done = succeed("make_report.py", *flags, "--examples=100", "--modes", "csl", "mem", f"--out={out}")
    assert done.out.splitlines()[0].startswith("100 of 240 examples, 2 scores")
    assert done.out.splitlines()[-1] == str(out)
    with gzip.open(tmp_path / "page.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mem"]) for row in rows] == found.scores["mem"].tolist()
    ranks = 1 + np.argsort(np.argsort(-found.scores["mem"]))
    assert [int(row["rank mem"]) for row in rows] == ranks.tolist()
    text = out.read_text()
    shown = np.frombuffer(decode(text, "index"), "<u4")
    assert len(np.unique(shown)) == 100
    np.testing.assert_array_equal(np.frombuffer(decode(text, "rank1"), "<u4"), ranks[shown])
    np.testing.assert_array_equal(
        np.frombuffer(decode(text, "score1"), "<f4"), found.scores["mem"][shown].astype("f4")
    )
    for mode in ("csl", "mem"):
        for label in range(CLASSES):
            mine = np.flatnonzero(found.labels == label)
            order = mine[np.argsort(found.scores[mode][mine])]
            assert set(np.r_[order[:4], order[-4:]]) <= set(shown)


def decode(text, name):
    return base64.b64decode(re.search(rf'id="array-{name}">([^<]*)<', text).group(1))


def test_names_cannot_end_the_script_and_files_can_be_left_out(blobs, tmp_path):
    base, flags, found, facts = blobs
    name = found.train.entry.name
    stem = paths.duplicates_stem(tmp_path / "metrics", name)
    row = {"index": 3, "file": "secret.png", "class": "</script>", "duplicate of": 1, "in": "test", "its file": "",
           "its class": "ant", "found by": "equal pixels", "similarity": "1.0000"}  # fmt: skip
    write_csv(stem.with_suffix(".csv"), [row])
    write_json(stem.with_suffix(".json"), facts)
    where = [f"--scores_folder={base / 'metrics'}", f"--metrics_folder={tmp_path / 'metrics'}"]
    rest = [flag for flag in flags if "metrics" not in flag]
    succeed("make_report.py", *rest, *where, "--anonymize", f"--out={tmp_path / 'page.html'}")
    text = (tmp_path / "page.html").read_text()
    assert "1 training example duplicates another example, 1 of them a test example" in text
    assert text.count("</script>") == text.count("<script")  # none comes from a name
    assert "secret.png" not in text
    assert str(tmp_path) not in text
    assert str(base) not in text


def test_figures_of_other_results(blobs, tmp_path):
    """Sensitivities, leave-one-out estimates, spectra and velocities are those in the files."""
    _, flags, found, _ = blobs
    name, rng = found.train.entry.name, np.random.default_rng(0)
    values, p = rng.random(N), rng.dirichlet(np.ones(CLASSES), N)
    removed, deviations = np.array([3, 9, 200]), np.array([0.1, 0.3, 0.2])
    for kind, content in (
        ("scores", {"sensitivities": values, "indices": np.arange(N)[::-1], "probabilities": p}),
        ("retrain", {"indices_retrain": removed, "softmax_deviations": deviations}),
        ("iter", {"test_nlls": np.array([2.0, 1.0, 0.5]), "epochs": np.array([1, 3]), "estimated_nll": [1.5, 0.75]}),
    ):
        write_pickle(paths.pickle_path(tmp_path / "pickles", "e", kind), content)
    spectrum = {"eigenvals": [4.0], "trace": [5.0], "density_eigen": [[0.0, 4.0]], "density_weight": [[0.75, 0.25]]}
    run = paths.standard_experiment("lenet", name, "sgd", "const")
    where = paths.hessian_path(tmp_path / "hessian", "train", "all", run, "nobn", 1, "epoch_2", "lanczos")
    write_pickle(where, spectrum)
    kernels = paths.ntk_folder(tmp_path / "ntk", name, paths.ntk_run("lenet", "sgd", "const"), "mem", 5, 1)
    write_pickle(paths.velocity_path(kernels), {0: 0.5, 100: 0.25})
    rest = [flag for flag in flags if "hessian" not in flag and "ntk" not in flag]
    more = ["--name_exp=e", f"--pickles_folder={tmp_path / 'pickles'}", *folders(tmp_path, "hessian", "ntk")]
    succeed("make_report.py", *rest, *more, f"--out={tmp_path / 'page.html'}")
    text = (tmp_path / "page.html").read_text()
    figures = json.loads(re.search(r'id="plots">(.*?)</script>', text).group(1))
    assert figures["loo"] == {"epochs": [1, 3], "estimates": [1.5, 0.75], "test": [2.0, 1.0, 0.5]}
    assert figures["retrained"]["index"] == (N - 1 - removed).tolist()
    np.testing.assert_allclose(figures["retrained"]["estimated"], values[removed], rtol=1e-4)
    (curve,) = figures["spectra"]
    assert curve["name"] == "train_all_lenet, sgd_sched_const_nobn, seed 1, epoch 2, lanczos"
    peaks = {round(x, 1) for x, y in zip(curve["x"], curve["y"], strict=True) if y > 1}
    assert peaks == {0.0, 4.0}
    assert figures["velocities"] == [
        {"name": "lenet_with_sgd_sched_const, ordered by mem, epoch 5", "x": [0.0, 100.0], "y": [0.5, 0.25],
         "percent": False}
    ]  # fmt: skip
    np.testing.assert_array_equal(np.frombuffer(decode(text, "prediction"), "<i2"), p.argmax(1)[::-1])
    assert "After epoch 3, the leave-one-out estimate is 0.75 and the test loss 0.5." in text


def test_examples_drawn_for_testing_are_not_shown(blobs):
    _, _, found, _ = blobs
    train = found.train.subset(np.arange(N))
    train.drawn = np.array([0, 50, 239])
    drawn = replace(found, train=train)
    rest = sorted(set(range(N)) - {0, 50, 239})
    assert tables.shown_examples(drawn, N).tolist() == rest
    part = tables.shown_examples(drawn, 100)
    assert len(set(part)) == 100
    assert set(part) <= set(rest)
    assert sum(row["size"] for row in tables.class_rows(drawn)) == N - 3


def test_missing_packages_are_named(blobs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    refuse("make_report.py", *blobs[1], f"--out={tmp_path / 'p.html'}", status=FILE, says="pip install")
    assert list(tmp_path.iterdir()) == []


def test_bad_input(blobs, tmp_path):
    base, flags, found, facts = blobs
    out = tmp_path / "page.html"
    out.write_text("mine")
    refuse("make_report.py", *flags, f"--out={out}", status=FILE, says=("page.html", "--overwrite"), keep=tmp_path)
    succeed("make_report.py", *flags, f"--out={out}", "--overwrite")
    succeed("make_report.py", *flags, f"--out={out}")  # a page may be replaced
    refuse("make_report.py", *flags, f"--out={tmp_path}", status=FILE, says="is a folder")
    refuse("make_report.py", *flags, "--modes", "eps", f"--out={out}", status=FILE, says="eps", keep=tmp_path)
    refuse(
        "make_report.py", *flags, "--run=nowhere", f"--out={out}", status=FILE, says=("nowhere", "measure_proxies")
    )
    refuse("make_report.py", *flags, "--name_exp=x", f"--out={out}", status=FLAG, says=("name_exp x", "x_scores.pkl"))
    refuse("make_report.py", *flags, "--selection=no.npz", f"--out={out}", status=FILE, says="no.npz: file not found")
    refuse("make_report.py", *flags, "--planted=no.npy", f"--out={out}", status=FILE, says="no.npy: file not found")
    refuse("make_report.py", *flags, "--pickles_folder=x", status=FLAG, says="has no effect without --name_exp")
    for content, says in (
        ({"indices": np.array([1, N])}, rf"not from 0 to {N - 1}"),
        ({"indices": np.array([1]), "label_hash": "0" * 16}, "different labels"),
        ({"other": np.array([1])}, "indices"),
    ):
        bad = write_npz(tmp_path / "bad.npz", **content)
        refuse("make_report.py", *flags, f"--selection={bad}", f"--out={out}", status=FILE, says=("bad.npz", says))
    issues = paths.label_issues_path(base / "metrics", found.train.entry.name)
    for header, record, says in (
        ("index,other\n1,2", facts, "suggested label"),
        ("index,suggested label\nx,bee", facts, "damaged"),
        ("index,suggested label\n1,bee", {**facts, "label_hash": "0" * 16}, "different labels"),
    ):
        write_json(issues.with_suffix(".json"), record)
        issues.write_text(header)
        refuse("make_report.py", *flags, f"--out={out}", status=FILE, says=("label_issues", says))
    issues.unlink()


def test_one_byte_keeps_a_curve():
    values = np.array([0, 0.25, 1, np.nan])
    bytes_ = page.one_byte(values)
    assert bytes_.tolist() == [0, 64, 254, 255]


def test_ranks_break_ties_by_index_and_leave_out_examples_without_a_score():
    assert page.ranks(np.array([1.0, np.nan, 3.0, 1.0])).tolist() == [2, 0, 1, 3]
