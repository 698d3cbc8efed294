"""The contents of the page, checked against planted truths, and the files of make_report.py."""

import base64
import csv
import gzip
import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from refusals import FILE, FLAG, refuse
from support import folders, succeed, write_blobs

from src.artifacts import paths
from src.artifacts.io import label_hash, write_csv, write_json, write_npz, write_pickle
from src.artifacts.store import write_scores
from src.datasets import DataConfig
from src.errors import FileError
from src.metrics import SCORES
from src.metrics.compare import spearman
from src.metrics.label_errors import cleanlab_issues
from src.report import page, tables
from src.report.collect import Contents, Dynamics, read_dynamics_of

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
    found = Contents(train, test, labels, scores, entries, {mode: {} for mode in scores})
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
    assert "20 most suspicious by out-of-sample" in how
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
    inside = sum(np.isin(np.arange(N), np.argsort(-v, kind="stable")[:12]) for v in found.scores.values())
    (agreed,) = [one for one in tables.findings(found) if "top 5 %" in one.text]
    assert agreed.text.startswith(f"{np.count_nonzero(inside >= 2)} example")
    assert set(agreed.examples) == set(np.flatnonzero(inside >= 2).tolist())


def test_a_class_leads_only_beyond_chance(blobs):
    """Some class is always the most common among the highest scores; the page mentions it if that is no accident."""
    _, _, found, _ = blobs

    def about_classes(values):
        sentences = tables.findings(replace(found, scores={"mem": values}), count=9)
        return [one for one in sentences if "times its share" in one.text]

    assert about_classes(found.scores["csl"]) == []  # random
    last = tables.findings(replace(found, scores={"mem": found.scores["csl"]}), count=9)[-1]
    assert last.text.startswith("No class is clearly more common than by chance among the 20 examples")
    higher = found.scores["csl"] + (found.labels == 1)
    top = np.argsort(-higher)[:20]
    (sentence,) = about_classes(higher)
    times = 1 / np.mean(found.labels == 1)
    assert f"20 are labeled “\u2068bee\u2069”, {times:.1f} times its share" in sentence.text
    assert set(sentence.examples) == set(top.tolist())
    assert (
        about_classes(np.round(found.scores["csl"] + (found.labels == 1))) == []
    )  # which of them leads is arbitrary
    # scores of a part: the share is that among the examples with a score
    part = np.where(found.labels == 1, higher, np.nan)
    assert about_classes(part) == []


def test_examples_tied_at_the_limit_are_not_in_the_top(blobs):
    assert tables.top(np.array([1.0, 3, np.nan, 2, 2]), 0.5).tolist() == [1]
    assert tables.top(np.array([1.0, 3, np.nan, 2, 0]), 0.5).tolist() == [1, 3]
    assert tables.top(np.ones(100), 0.05).tolist() == []
    _, _, found, _ = blobs
    rows = tables.class_rows(replace(found, scores={"mem": np.where(found.labels == 0, 1.0, np.nan)}))
    assert [row["top"] for row in rows] == [0, 0, 0]
    assert rows[0]["mean"] == 1.0
    assert np.isnan(rows[1]["mean"])  # not 0: the class has no score


def test_agreement_has_intervals_and_leaves_out_the_order_of_ties(blobs):
    _, _, found, _ = blobs
    linear = found.scores["mem"] + 0.3 * np.random.default_rng(2).normal(size=N)
    truth, rows = tables.agreement(replace(found, scores=found.scores | {"csl": linear}))
    assert (truth, [row["mode"] for row in rows]) == ("memorization", ["csl", "aum"])
    for row in rows:
        rho = spearman(linear if row["mode"] == "csl" else found.scores["aum"], found.scores["mem"])
        value, low, high = row["interval"]
        assert value == rho
        width = 2 * 1.96 * np.sqrt((1 + rho**2 / 2) / N) * (1 - rho**2)  # Bonett and Wright 2000, eq. 4
        assert low < rho < high
        assert 0.7 < (high - low) / width < 1.3
    planted = np.isin(np.arange(N), WRONG)
    scores = found.scores | {"aum": np.r_[np.full(10, np.nan), np.ones(N - 10)]}
    _, rows = tables.agreement(replace(found, scores=scores, planted=planted))
    assert (rows[0]["mode"], rows[0]["interval"], rows[0]["precision"]) == ("mem", (1.0, 1.0, 1.0), 1.0)
    constant = next(row for row in rows if row["mode"] == "aum")
    assert constant["precision"] == pytest.approx(4 / (N - 10))  # by chance; of five wrong labels, four have a score
    # no example has both a score and the truth
    apart = {"mem": np.where(np.arange(N) < 9, 1.0, np.nan), "csl": np.where(np.arange(N) < 9, np.nan, 1.0)}
    _, rows = tables.agreement(replace(found, scores=apart))
    assert np.isnan([*rows[0]["interval"], rows[0]["within"], rows[0]["top"]]).all()


def test_a_score_is_described_as_it_is_stored(blobs):
    _, _, found, _ = blobs
    records = {
        "mem": {"negated": True},  # a registered score, say
        "csl": {"scaling": "min-max of the mean over seeds", "raw_min": -2.5, "raw_max": 7.0},
        "aum": {},
    }
    described = replace(found, records=records)
    assert [tables.title(described, mode) for mode in records] == [
        "memorization (negated)", "cumulative sample loss", "area under the margin (negated)"
    ]  # fmt: skip
    assert "The sign was changed" in tables.meaning(described, "aum")
    assert "Scaled to [0, 1]; before, -2.5 to 7." in tables.meaning(described, "csl")
    assert "cale" not in tables.meaning(described, "aum")
    records = {"forg": {"training_accuracy": [0.9, 0.6]}, "csl": {"training_accuracy": [0.6]}}
    entries = {mode: SCORES[mode] for mode in records}
    assert tables.unlearned(replace(found, records=records, entries=entries)) == (["forg"], 0.6)


def test_a_part_never_has_more_examples_than_asked_for(blobs):
    """Even if more are listed, or each score and class has extremes of its own."""
    _, _, found, _ = blobs
    rows = [{"index": str(k), "duplicate of": str(k + 1), "in": "train"} for k in range(0, 200, 2)]
    listed = tables.shown_examples(replace(found, duplicates=rows), 100)
    assert len(listed) == 100
    assert set(range(50)) <= set(listed.tolist())  # the first listed ones, in pairs
    many = {f"s{k}": np.random.default_rng(k).random(N) for k in range(40)}
    part = set(tables.shown_examples(replace(found, scores=many), 100).tolist())
    assert len(part) == 100
    for label in range(CLASSES):  # 240 extremes do not fit; those of the first scores come first
        mine = np.flatnonzero(found.labels == label)
        for mode in ("s0", "s1", "s2"):
            assert {mine[many[mode][mine].argmax()], mine[many[mode][mine].argmin()]} <= part


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
    (tmp_path / "other.csv.gz").write_text("mine")
    small = ("--examples=100", f"--out={tmp_path / 'other.html'}")
    refuse("make_report.py", *flags, *small, status=FILE, says=("other.csv.gz", "--overwrite"), keep=tmp_path)
    assert [int(row["rank mem"]) for row in rows] == ranks.tolist()
    text = out.read_text()
    shown = np.frombuffer(decode(text, "index"), "<u4")
    assert len(np.unique(shown)) == 100
    np.testing.assert_array_equal(np.frombuffer(decode(text, "rank1"), "<u2"), ranks[shown])
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
    assert "1 training example is an exact (1) or near (0) duplicate of another example, 1 of them of a test" in text
    image = Image.open(
        io.BytesIO(base64.b64decode(re.search(r'src="data:image/jpeg;base64,([^"]*)"', text).group(1)))
    )
    pixels = found.test.fetch(found.test.indices).numpy().transpose(0, 2, 3, 1).astype(int)
    errors = np.abs(pixels - np.asarray(image).reshape(pixels.shape[1:])).mean((1, 2, 3))
    assert errors.argmin() == 1
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
    for content in ({"estimated_errors": "many"}, {"most_common": [{"examples": 3}]}):
        write_json(issues.with_suffix(".json"), {**facts, **content})
        refuse("make_report.py", *flags, f"--out={out}", status=FILE, says=("label_issues.json", "damaged"))
    issues.unlink()
    table = paths.duplicates_stem(base / "metrics", found.train.entry.name).with_suffix(".csv")
    names = "index,file,class,duplicate of,in,its file,its class,found by,similarity"
    for content, says in (
        (names.replace("its class,", ""), "its class"),
        (f"{names}\n{N},,ant,1,train,,ant,equal pixels,1", "no index of an example"),
        (f"{names}\n1,,ant,x,train,,ant,equal pixels,1", "does not name"),
    ):
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(content)
        refuse("make_report.py", *flags, f"--out={out}", status=FILE, says=("duplicates.csv", says))
    table.unlink()


def test_seeds_with_different_epochs_are_refused(blobs, tmp_path):
    _, _, found, facts = blobs
    files = {}
    for seed, epochs in (("1", 3), ("2", 2)):
        each = np.ones((epochs, N), np.float32)
        arrays = dict.fromkeys(("loss", "probability", "margin", "correct", "el2n", "divergence"), each)
        settings = json.dumps({"seed": int(seed)})
        files[seed] = write_npz(
            tmp_path / f"{seed}.npz", **arrays, labels=found.labels, label_hash=facts["label_hash"], settings=settings
        )
    with pytest.raises(FileError, match=r"2\.npz: has 2 epochs, but .*1\.npz has 3"):
        read_dynamics_of("run", files, tmp_path, {"n": N, "label_hash": facts["label_hash"]})


def test_one_byte_keeps_a_curve():
    values = np.array([0, 0.25, 1, np.nan])
    bytes_ = page.one_byte(values)
    assert bytes_.tolist() == [0, 64, 254, 255]


def test_ranks_are_those_of_the_score_tables(blobs):
    """Equal scores share a rank; scores that differ only at double precision do not."""
    _, _, found, _ = blobs
    values = np.arange(N, 0, -1.0)
    values[:4] = [N + 1, N + 1, np.nan, N + 1 - 1e-12]
    ranks = page.example_arrays(replace(found, scores={"mem": values}), np.arange(4))["rank0"]
    assert ranks.tolist() == [1, 1, 0, 3]
