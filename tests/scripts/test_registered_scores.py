"""Scores of other projects: registered from each format, and then used by every script that takes scores."""

import json
import pickle
import re

import numpy as np
import pytest
from refusals import FILE, FLAG, RunsCode, refuse
from support import folders, succeed

from src.artifacts.io import read_npz
from src.coresets import find_method
from src.datasets import load_dataset
from src.errors import ArgumentError
from src.metrics import Proxy, find_score_file, get_score

EXAMPLES = 60  # of the fixture ``world``
VALUES = np.random.default_rng(0).permutation(EXAMPLES) / 8.0 - 1.0  # exact in decimal notation, without ties
ORDER = np.random.default_rng(1).permutation(EXAMPLES)


def csv_of(header, rows):
    return "\n".join([*([header] if header else []), *(",".join(map(str, row)) for row in rows)]).encode()


BY_INDEX = [(i, VALUES[i]) for i in ORDER.tolist()]
FORMATS = {
    "list.json": json.dumps(VALUES.tolist()).encode(),
    "dict.json": json.dumps({str(i): value for i, value in BY_INDEX}).encode(),
    "dict.pkl": pickle.dumps({i: float(value) for i, value in BY_INDEX}),
    "numpy_keys.pickle": pickle.dumps({np.int64(i): np.float32(value) for i, value in BY_INDEX}),
    "array.pkl": pickle.dumps(VALUES),
    "list.pkl": pickle.dumps(VALUES.tolist()),
    "plain.csv": csv_of(None, VALUES[:, None]),
    "named.csv": csv_of("my score", VALUES[:, None]),
    "pairs.csv": csv_of(None, BY_INDEX),
    "columns.csv": csv_of("name, Score ,index", [(f"image {i}", value, i) for i, value in BY_INDEX]),
}


def write(folder, name, content):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        np.save(path, content)
    return path


def register(world, folder, path, *flags):
    return ("register_score.py", path, world.dataset, "--mode=my_score", f"--metrics_folder={folder}", *flags)


@pytest.fixture(scope="module")
def registered(world, tmp_path_factory):
    """A metrics folder with the score, in which low values of the file are atypical."""
    base = tmp_path_factory.mktemp("registered")
    path = write(base, "values.npy", VALUES)
    done = succeed(*register(world, base / "metrics", path, "--high=typical", "--cost=2.5"))
    assert "next: python" in done.out
    assert str(path) not in done.out.split("next:")[1]
    return base / "metrics"


def test_every_format_gives_the_same_scores(world, tmp_path):
    cases = FORMATS | {"array.npy": VALUES.astype(np.float32), "one.npz": {"anything": VALUES}}
    for name, content in cases.items():
        folder = tmp_path / name.replace(".", "_")
        succeed(*register(world, folder, write(tmp_path, name, content), "--high=atypical"))
        proxy = Proxy("my_score", world.name, normalize=False, folder=folder, n=EXAMPLES)
        np.testing.assert_array_equal(proxy.scores, VALUES, err_msg=name)


def test_the_sign_and_the_record(world, registered):
    proxy = Proxy("my_score", world.name, normalize=False, folder=registered)
    np.testing.assert_array_equal(proxy.scores, -VALUES)
    labels = load_dataset(world.dataset.removeprefix("--dataset="), world.base)[0]
    assert proxy.path == registered / "registered" / "my_score" / f"my_score_{world.name}.pkl"
    facts = {"mode": "my_score", "dataset": world.name, "negated": True, "source": "values.npy", "cost": 2.5}
    assert facts.items() <= proxy.record.items()
    assert (proxy.record["data_hash"], proxy.record["total"]) == (labels.digest, EXAMPLES)
    assert proxy.label == get_score("my_score", registered).symbol == "my_score"
    with pytest.raises(ArgumentError, match=r"'my_scor': unknown score; did you mean my_score\?.*register_score.py"):
        get_score("my_scor", registered)
    with pytest.raises(ArgumentError, match="unknown score"):
        find_score_file("my_score", world.name, world.base / "metrics")


def test_examples_may_be_left_out(world, tmp_path):
    path = write(tmp_path, "some.csv", csv_of("index,score", BY_INDEX[:20]))
    succeed(*register(world, tmp_path, path, "--high=atypical"))
    proxy = Proxy("my_score", world.name, folder=tmp_path)
    assert proxy.indices.tolist() == sorted(ORDER[:20].tolist())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("short.npy", VALUES[1:], "has 59 scores, but the training set has 60"),
        ("square.npy", VALUES[:, None], r"array of shape \(60, 1\)"),
        ("text.npy", VALUES.astype(str), "one number per example"),
        ("nan.npy", np.where(VALUES == 0, np.nan, VALUES), "is nan; correct it, or leave"),
        ("two.npz", {"a": VALUES, "b": VALUES}, r"2 arrays \(a, b\), expected one"),
        ("scores.txt", b"1", "extension"),
        ("empty.csv", b"", "no scores"),
        ("twice.csv", csv_of("index,score", [(3, 1), (3, 2)]), "index 3 more than once"),
        ("beyond.csv", csv_of("index,score", [(60, 1)]), "index 60"),
        ("word.csv", csv_of("index,score", [(3, "high")]), "score 'high' is not a number"),
        ("uneven.csv", b"1,2\n3", "row 2 has 1 columns"),
        ("three.csv", csv_of(None, [(1, 2, 3)]), "3 columns and no header"),
        ("unnamed.csv", csv_of("id,score", [(3, 1)]), "column 'index'"),
        ("names.json", b'{"cat": 1.0}', "does not map indices"),
        ("twice.json", b'{"1": 1.0, "01": 2.0}', "more than once"),
        ("none.json", b"[null]", "one number per example"),
        ("broken.json", b"[1, 2", "is not a json file"),
        ("half.pkl", pickle.dumps({0.5: 1.0}), "does not map indices"),
    ],
)
def test_files_that_are_refused(world, tmp_path, name, content, says):
    path = write(tmp_path, name, content)
    refuse(*register(world, tmp_path / "metrics", path, "--high=atypical"), status=FILE, says=(name, says))
    assert not (tmp_path / "metrics").exists()


def test_flags_that_are_refused(world, tmp_path):
    for more, says in (
        (("--cost=0",), "--cost: 0 is not a finite number above 0"),  # costs are drawn on a logarithmic axis
        (("--mode=my-score",), "'my-score'.*under a name of letters, digits, and _"),
        (("--mode=mem",), "--mode mem: is a built-in score"),
    ):
        flags = register(world, tmp_path / "metrics", write(tmp_path, "v.npy", VALUES), "--high=typical", *more)
        refuse(*flags, status=FLAG, says=says)


def test_no_code_of_a_pickle_runs(world, tmp_path):
    path = write(tmp_path, "boom.pkl", pickle.dumps({0: RunsCode(tmp_path / "proof")}))
    refuse(*register(world, tmp_path / "metrics", path, "--high=atypical"), status=FILE, says="boom.pkl")
    assert not (tmp_path / "proof").exists()


def test_other_scores_are_replaced_only_on_request(world, tmp_path):
    one, other = write(tmp_path, "one.npy", VALUES), write(tmp_path, "other.npy", VALUES[::-1].copy())
    succeed(*register(world, tmp_path, one, "--high=atypical"))
    succeed(*register(world, tmp_path, one, "--high=atypical"))
    for path, high in ((other, "atypical"), (one, "typical")):
        refuse(*register(world, tmp_path, path, f"--high={high}"), status=FILE, says="--overwrite")
    succeed(*register(world, tmp_path, other, "--high=atypical", "--overwrite"))
    assert Proxy("my_score", world.name, False, tmp_path).get(0) == VALUES[-1]


def test_figures_take_the_name(world, registered, tmp_path):
    flags = (world.dataset, f"--metrics_folder={registered}", f"--plots_folder={tmp_path}")
    succeed("plot_images.py", *flags, "--modes", "my_score", "--n=2", "--only_overview")
    assert (tmp_path / "images" / world.name / "overview_my_score_2.png").exists()
    both = (f"--scores_folder=my_score={registered}", f"--metrics_folder={world.base / 'metrics'}")
    out = succeed("plot_proxies.py", world.dataset, *both, f"--plots_folder={tmp_path}").out
    assert re.search(r"SAMIS.* and .*|my_score and", out)
    table = json.loads((tmp_path / "proxies" / world.name / "correlations.json").read_text())
    assert {"samis_loss", "my_score"} <= table.keys()
    samis = Proxy("samis_loss", world.name, folder=world.base / "metrics").scores
    rank = [np.argsort(np.argsort(scores)) for scores in (samis, -VALUES)]
    assert table["samis_loss"]["my_score"]["spearman"] == pytest.approx(np.corrcoef(*rank)[0, 1])
    evaluate = ("evaluate_scores.py", world.dataset, *both, f"--plots_folder={tmp_path}", "--resamples=20")
    succeed(*evaluate, "--reference", "my_score")
    rows = json.loads((tmp_path / "scores" / world.name / "against_my_score.json").read_text())["rows"]
    samis_row = next(row for row in rows if row["score"] == "samis_loss")
    assert samis_row["spearman"] == pytest.approx(table["samis_loss"]["my_score"]["spearman"])
    succeed(*evaluate, "--reference", "samis_loss", "--modes", "my_score")
    rows = json.loads((tmp_path / "scores" / world.name / "against_samis_loss.json").read_text())["rows"]
    assert [(row["score"], row["cost"]) for row in rows] == [("my_score", 2.5)]
    refuse(*evaluate, "--reference", "my_scores", status=FLAG, says="registered score")
    for script in ("plot_images.py", "plot_proxies.py", "evaluate_scores.py"):
        refuse(script, *flags, "--modes", "my_scores", status=FLAG, says="did you mean my_score")


@pytest.mark.parametrize(("mode", "keep"), [("large", slice(-10, None)), ("few_shot", slice(10))])
def test_selection_keeps_its_extremes(world, registered, tmp_path, mode, keep):
    flags = (world.dataset, "--model=small_mlp", f"--metrics_folder={registered}",
             *folders(tmp_path, "models", "log", "resume_ckpts"))  # fmt: skip
    out = tmp_path / "chosen.npz"
    succeed("select_coreset.py", *flags, "--coreset_func=min_my_score", "--coreset_fraction=0.5", "--per_class=1",
            f"--coreset_mode={mode}", f"--out={out}")  # fmt: skip
    labels = np.load(world.base / "blobs.npz")["y_train"]
    assert np.bincount(labels).tolist() == [20, 20, 20]
    orders = (sorted(np.flatnonzero(labels == label), key=lambda i: -VALUES[i]) for label in range(3))
    expected = sorted(i for order in orders for i in order[keep])
    assert read_npz(out)["indices"].tolist() == expected
    refuse("select_coreset.py", *flags, "--coreset_func=min_my_scor", status=FLAG, says="--coreset_func.*my_score")
    refuse("compare_pruning.py", *flags, "--funcs=min_my_scor", "--fractions=0.5", status=FLAG, says="--funcs")


def test_training_and_comparing_take_min_name(world, registered, tmp_path):
    flags = (world.dataset, "--model=small_mlp", f"--metrics_folder={registered}", "--coreset_epochs=1",
             "--lr_sched=const", "--batch_size=16", *folders(tmp_path, "models", "log", "resume_ckpts"))  # fmt: skip
    done = succeed("train_prune.py", *flags, "--coreset_func=min_my_score", "--coreset_fraction=0.5", "--seed=1")
    assert "--funcs random min_my_score" in done.out
    run = f"min_my_score_static_coreset_large_0.5_small_mlp_over_{world.name}"
    assert (tmp_path / "models" / run / "seed_1" / "results.json").exists()
    table = succeed("compare_pruning.py", *flags, "--funcs", "min_my_score", "--fractions=0.5", "--seeds", "1",
                    f"--plots_folder={tmp_path}").out  # fmt: skip
    assert "min_my_score" in table
    assert find_method("min_my_score").needs.stored == "my_score"


def test_geometry_takes_the_name(world, registered, tmp_path):
    flags = (world.dataset, "--model=small_mlp", f"--datasets_folder={world.base}", f"--metrics_folder={registered}",
             f"--models_folder={world.base / 'models'}")  # fmt: skip
    succeed("compute_ntk.py", *flags, "--ntk_chosen_metric=my_score", "--seeds", "1", "--m_samples=2",
            "--lower_index", "0", "58", "--ntk_velocity_epoch", "1", f"--ntk_folder={tmp_path}")  # fmt: skip
    figure = ("plot_ntk.py", world.dataset, "--model=small_mlp", f"--ntk_folder={tmp_path}",
              f"--plots_folder={tmp_path}")  # fmt: skip
    assert "my_score, epoch 1" in succeed(*figure, "--metrics", "my_score").out
    refuse(*figure, "--metrics", "my_scor", status=FLAG, says="--metrics my_scor")
    spectrum = ("compute_hessian_eigen.py", *flags, "--optimizer=sgd", "--epochs=3", "--top_n=1", "--lanczos_steps=5",
                "--max_steps=5", "--trace_probes=2", f"--hessian_folder={tmp_path}")  # fmt: skip
    out = succeed(*spectrum, "--high_low_spec=my_score:high:0.3").out
    assert "train_my_score:high:0.3_small_mlp" in out
    refuse(*spectrum, "--high_low_spec=my_scor:high:0.3", status=FLAG, says="--high_low_spec.*unknown score")
    succeed("plot_hessian.py", world.dataset, "--model=small_mlp", "--optimizers", "sgd", "--high_low_specs",
            "my_score:high:0.3", f"--hessian_folder={tmp_path}", f"--plots_folder={tmp_path}")  # fmt: skip
