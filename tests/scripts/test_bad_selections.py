"""Shares, methods, scores and selections that cannot be."""

import io

import numpy as np
import pytest
from refusals import FILE, FLAG, assert_kept, refuse, snapshot
from support import TRAIN, folders, succeed, write_blobs

from src.artifacts import write_pickle
from src.datasets import load_dataset
from src.metrics import SCORES

N = 60
SHORT = ("--coreset_epochs=1", "--batch_size=16", "--learning_rate=0.05")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=N)


@pytest.fixture(scope="module")
def name(blobs):
    return load_dataset(f"npz:{blobs}", blobs.parent)[0].entry.name


def flags(blobs, base, *more):
    chooses = not any(str(flag).startswith("--selection=") for flag in more)
    short = (*SHORT, "--coreset_pretrain_epochs=1") if chooses else SHORT
    return (f"--dataset=npz:{blobs}", "--model=small_mlp", *short, *more, *folders(base, *TRAIN))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--coreset_func=nope",), ("--coreset_func", "unknown method 'nope'", "random.*craig.*infobatch_dynamic")),
        ((), ("--coreset_func --selection is required",)),
        (("--coreset_func=random", "--selection=a.npz"), ("not allowed with",)),
        (("--coreset_func=random", "--coreset_fraction=0"), ("--coreset_fraction", "above 0 and at most 1")),
        (("--coreset_func=random", "--coreset_fraction=-0.1"), ("--coreset_fraction", "above 0")),
        (("--coreset_func=random", "--coreset_fraction=1.01"), ("--coreset_fraction", "at most 1")),
        (("--coreset_func=random", "--coreset_fraction=nan"), ("--coreset_fraction", "finite")),
        (("--coreset_func=random", "--shots=0"), ("--shots", "at least 1")),
        (("--coreset_func=random", "--shots=21"), ("--shots 21", "class '0' has only 20", "--shots_up_to 21")),
        (("--coreset_func=random", "--shots=2", "--per_class=0"), ("--shots", "leave per_class on")),
        (("--coreset_func=random", "--shots=2", "--coreset_fraction=0.5"), ("not allowed with",)),
        (
            ("--coreset_func=random", "--coreset_fraction=0.001", "--per_class=no"),
            ("--coreset_fraction", "none of 60"),
        ),
        (("--coreset_func=random", "--per_class=maybe"), ("--per_class", "'maybe'", "give 1 or 0")),
        (("--coreset_func=tdds",), ("--coreset_pretrain_epochs 1", "too few for tdds", "at least 3")),
        (("--coreset_func=dual",), ("--coreset_pretrain_epochs 1", "too few for dual", "at least 2")),
        (("--coreset_func=infobatch_dynamic", "--shots=2"), ("--shots", "infobatch_dynamic", "--coreset_fraction")),
        (("--coreset_func=infobatch_dynamic", "--shots_up_to=2"), ("--shots_up_to", "infobatch_dynamic")),
        (("--coreset_func=random", "--shots=2", "--shots_up_to=2"), ("not allowed with",)),
        (("--coreset_func=ccs", "--ccs_cutoff=1"), ("--ccs_cutoff", "at least 0 and below 1")),
        (("--coreset_func=dual", "--dual_c=0"), ("--dual_c", "above 0")),
        (("--coreset_func=grand", "--coreset_networks=0"), ("--coreset_networks", "at least 1")),
        (("--coreset_func=random", "--epochs=3"), ("--epochs=3", "did you mean")),
    ],
)
def test_flags(blobs, tmp_path, more, says):
    refuse("train_prune.py", *flags(blobs, tmp_path, *more), status=FLAG, says=says)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_missing_score_names_the_command(blobs, tmp_path):
    for func, says in (
        ("min_sam-sgd-loss", ("no SAMIS-L scores", "compute_sam_sgd.py and average_scores.py")),
        ("min_forg", ("no forgetting events scores", "train_full.py --measure_proxies")),
        ("min_mem", ("no memorization scores", "estimates of your own")),
    ):
        refuse("train_prune.py", *flags(blobs, tmp_path, f"--coreset_func={func}"), status=FILE, says=says)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (dict.fromkeys(range(50), 0.5), "50"),
        ({i: float("nan") if i == 7 else 0.1 for i in range(N)}, "example 7 is nan"),
        ({i: float("inf") if i == 7 else 0.1 for i in range(N)}, "example 7 is inf"),
        (list(range(N)), "not a score file"),
    ],
)
def test_scores_that_do_not_fit(blobs, name, tmp_path, scores, says):
    write_pickle(SCORES["csl"].path(tmp_path / "metrics", name), scores)
    refuse("train_prune.py", *flags(blobs, tmp_path, "--coreset_func=min_csl"), status=FILE, says=(says,))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"picks": [1]}, "no array 'indices'.*select_coreset.py"),
        ({"indices": [1, 2, 2]}, "has an index twice"),
        ({"indices": [1, 60]}, "outside 0 to 59"),
        ({"indices": [-1, 5]}, "outside 0 to 59"),
        ({"indices": [0.5]}, "array 'indices' has"),
        ({"indices": np.zeros((2, 2), int)}, "array 'indices' has"),
        ({"indices": [1, 2], "weights": [1.0]}, "array 'weights' "),
        ({"indices": [1, 2], "weights": [1.0, -1.0]}, "array 'weights' "),
        ({"indices": [1, 2], "weights": [np.nan, 1.0]}, "array 'weights' "),
        ({"indices": [1, 2], "weights": [0.0, 0.0]}, "array 'weights' "),
        ({"indices": [1, 2], "label_hash": "0" * 16}, "made for other labels"),
        ({"indices": [1, 2], "settings": "{broken"}, "settings cannot be read"),
    ],
)
def test_selections(blobs, tmp_path, arrays, says):
    np.savez(tmp_path / "chosen.npz", **arrays)
    refuse(
        "train_prune.py", *flags(blobs, tmp_path, f"--selection={tmp_path / 'chosen.npz'}"), status=FILE, says=(says,)
    )


def test_a_selection_that_is_missing_or_no_npz(blobs, tmp_path):
    path = tmp_path / "chosen.npz"
    refuse("train_prune.py", *flags(blobs, tmp_path, f"--selection={path}"), status=FILE, says=("chosen.npz",))
    path.write_text("no archive")
    refuse("train_prune.py", *flags(blobs, tmp_path, f"--selection={path}"), status=FILE, says=("npz",))


def test_a_selection_outside_the_subset(blobs, tmp_path):
    np.savez(tmp_path / "chosen.npz", indices=[1, 40])
    (tmp_path / "subset.txt").write_text("\n".join(map(str, range(30))))
    more = (f"--selection={tmp_path / 'chosen.npz'}", f"--subset={tmp_path / 'subset.txt'}")
    refuse("train_prune.py", *flags(blobs, tmp_path, *more), status=FILE, says=("example 40", "--subset leaves out"))


def test_other_settings_are_not_overwritten(blobs, tmp_path):
    run = flags(blobs, tmp_path, "--coreset_func=random", "--coreset_fraction=0.5")
    succeed("train_prune.py", *run)
    before = snapshot(tmp_path)
    says = (r"per_class \(True there, False here\)", "--overwrite")
    refuse("train_prune.py", *run, "--per_class=0", status=FILE, says=says, keep=tmp_path)
    refuse("select_coreset.py", f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=random",
           "--coreset_fraction=0.5", "--per_class=0", *folders(tmp_path, *TRAIN), status=FILE, says=says,
           keep=tmp_path)  # fmt: skip
    says = (r"learning_rate \(0.05 there, 0.1 here\)", "--overwrite")
    refuse("train_prune.py", *run, "--learning_rate=0.1", status=FILE, says=says, keep=tmp_path)
    assert_kept(before, tmp_path)
    succeed("train_prune.py", *run, "--per_class=0", "--overwrite")


@pytest.mark.parametrize("seconds", ["long", np.zeros(3)])
def test_a_damaged_stored_selection_is_replaced_on_request(blobs, tmp_path, seconds):
    run = flags(blobs, tmp_path, "--coreset_func=random", "--coreset_fraction=0.5")
    succeed("train_prune.py", *run)
    (path,) = tmp_path.rglob("selection.npz")
    before = path.read_bytes()
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "seconds": seconds})
    refuse("train_prune.py", *run, status=FILE, says=("array 'seconds' has", "--overwrite"))
    succeed("train_prune.py", *run, "--overwrite")
    with np.load(path) as after, np.load(io.BytesIO(before)) as wanted:
        np.testing.assert_array_equal(after["indices"], wanted["indices"])


def test_damaged_pretraining_is_made_anew(blobs, tmp_path):
    run = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=herding", "--coreset_pretrain_epochs=1",
           *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("select_coreset.py", *run, f"--out={tmp_path / 'first.npz'}")
    (folder,) = (tmp_path / "models" / "pretrain").rglob("seed_1")
    for number, spoil in enumerate((lambda: (folder / "results.json").write_text("{"), (folder / "last.pt").unlink)):
        spoil()
        for name in ("logits", "embeddings"):
            (folder / f"{name}.npz").unlink()
        out = tmp_path / f"{number}.npz"
        succeed("select_coreset.py", *run, f"--out={out}")
        assert (folder / "last.pt").exists()
        with np.load(out) as again, np.load(tmp_path / "first.npz") as first:
            np.testing.assert_array_equal(again["indices"], first["indices"])


def test_dynamic_pruning_is_no_selection(blobs, tmp_path):
    run = (
        f"--dataset=npz:{blobs}",
        "--model=small_mlp",
        "--coreset_func=infobatch_dynamic",
        *folders(tmp_path, *TRAIN),
    )
    refuse("select_coreset.py", *run, status=FLAG, says=("infobatch_dynamic", "use train_prune.py"))


def test_the_settings_of_another_pretraining_are_named(blobs, tmp_path):
    run = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=forget", "--coreset_pretrain_epochs=1",
           *folders(tmp_path, *TRAIN))  # fmt: skip
    succeed("select_coreset.py", *run, "--coreset_pretrain_lr=0.05")
    says = (r"pretraining learning_rate \(0.05 there, 0.06 here\)", "--overwrite")
    refuse("select_coreset.py", *run, "--coreset_pretrain_lr=0.06", status=FILE, says=says, keep=tmp_path)
    succeed("select_coreset.py", *run, "--coreset_pretrain_lr=0.06", "--overwrite")


@pytest.mark.parametrize(
    "flag", ["--shots=2", "--shots_up_to=2", "--coreset_fraction=0.5", "--coreset_mode=few_shot"]
)
def test_flags_that_a_selection_file_leaves_no_place_for(blobs, tmp_path, flag):
    np.savez(tmp_path / "chosen.npz", indices=[1, 2])
    more = (f"--selection={tmp_path / 'chosen.npz'}", flag)
    refuse("train_prune.py", *flags(blobs, tmp_path, *more), status=FLAG, says=(flag.split("=")[0], "leave it out"))


def test_dynamic_pruning_without_a_posterior(blobs, tmp_path):
    more = ("--coreset_func=infobatch_dynamic", "--optimizer=iblr")
    refuse(
        "train_prune.py", *flags(blobs, tmp_path, *more), status=FLAG, says=("--optimizer iblr", "infobatch_dynamic")
    )
