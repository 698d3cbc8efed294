"""Scores that are missing, damaged or of other data, for every script that reads or writes them."""

import io
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from refusals import FILE, FLAG, RunsCode, assert_kept, check, on_a_full_disk, refuse, snapshot, spoilt, unprivileged
from support import ROOT, TRAIN, call, folders, succeed

from src.metrics import SCORES

N = 60


def arrays_with(path, **changes):
    """The bytes of an npz file with other arrays in it; None removes one."""
    with np.load(path) as old:
        arrays = {**dict(old), **changes}
    file = io.BytesIO()
    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    return file.getvalue()


# ------------------------------------------------------------------------------------------------- average_scores


def test_seeds_that_are_missing(world):
    for flags, says in (
        (("--seeds", "1", "3"), (r"small_mlp/3/nn_loss_diff_score\.npz: seed 3", "compute_sam_sgd.py .*--seed 3")),
        (
            ("--seeds", "1", "3", "--optimizer=sgd"),
            (r"seed_3/dynamics\.npz: no dynamics", "--measure_proxies --seed 3"),
        ),
        (("--exp=nope",), ("no recorded dynamics of nope", "train_full.py .*--measure_proxies")),
    ):
        refuse("average_scores.py", *world.average(*flags), status=FILE, says=says, keep=world.base)


def test_several_runs_are_listed(world):
    says = ("--exp: 2 runs match", f"{world.run('sam')}, {world.run('sgd')}", "--optimizer and --lr_sched")
    refuse("average_scores.py", *world.average("--modes", "forg"), status=FLAG, says=says, keep=world.base)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epoch": 1}, r"differ in epoch \(1 there, 3 here\)"),
        ({"protocol": "split"}, r"differ in protocol \(split there, full here\)"),
        ({"label_hash": "0" * 16}, "differ in label_hash"),
        ({"settings": '{"lr_sched": "step"}'}, r"differ in .*lr_sched \(step there, const here\)"),
        ({"settings": "{broken"}, "settings cannot be read"),
        ({"arr_0": np.zeros(5)}, "differ in length"),
        ({"arr_0": np.full(N, np.nan)}, "not finite"),
        ({"arr_0": np.array(["a"] * N)}, "not numbers"),
        ({"indices": np.array([N])}, "indices do not fit"),
        ({"loss_sam": None}, "lacks loss_sam"),
    ],
)
def test_seeds_that_do_not_belong_together(world, changes, says):
    with spoilt(world.seed_file, arrays_with(world.seed_file, **changes)):
        refuse("average_scores.py", *world.average("--overwrite"), status=FILE, keep=world.base,
               says=(r"score\.npz: ", says, "anew|again|average seeds of one kind"))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": None}, "loss missing"),
        ({"loss": np.zeros((2, 5), np.float32)}, "differ in shape"),
        ({"labels": np.zeros(5, int)}, "no epochs of 5 examples"),
        ({"settings": "[1]"}, "settings cannot be read"),
    ],
)
def test_damaged_dynamics(world, changes, says):
    with spoilt(world.dynamics, arrays_with(world.dynamics, **changes)):
        refuse("average_scores.py", *world.average("--optimizer=sgd"), status=FILE, keep=world.base,
               says=(r"dynamics\.npz: ", says))  # fmt: skip


def test_a_folder_that_may_not_be_entered_is_not_called_empty():
    with tempfile.TemporaryDirectory() as base:  # not tmp_path, whose parents only the owner may enter
        closed = Path(base, "closed")
        closed.mkdir(mode=0)
        Path(base).chmod(0o755)
        call("plot_proxies.py", "--dataset=digits", "--modes=flat")  # modules that only root may read are imported
        with unprivileged():
            refuse("plot_proxies.py", "--dataset=digits", "--modes=flat", f"--scores_folder={closed}", status=FILE,
                   says=(f"{closed}.*: Permission denied",))  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": np.array(["a", "b"])},
        {"settings": np.zeros(3)},
        {"epoch": np.array("x")},
        {"seed": np.array([1, 2])},
        {"label_hash": np.array(5)},
        {"indices": np.arange(4)[None]},
        {"indices": np.array(0)},
    ],
)
def test_seed_files_that_do_not_say_how_they_were_made(world, changes):
    arrays = dict(np.load(world.seed_file))
    file = io.BytesIO()
    np.savez(file, **{**arrays, **changes})
    with spoilt(world.seed_file, file.getvalue()):
        refuse("average_scores.py", *world.average("--overwrite"), status=FILE, says=(r"score\.npz: ",))


def test_damaged_scores_of_a_run(world, tmp_path):
    path, proof = world.dynamics.with_name("hessian_flat_train.pkl"), tmp_path / "proof"
    record = path.with_name("end_of_training.json")  # older versions did not write it
    for bad, says in (
        (b"junk", "is damaged"),
        (path.read_bytes()[:200], "is damaged"),
        (pickle.dumps(RunsCode(proof)), "not plain data"),
        (pickle.dumps([1, 2]), "not a dict"),
        (pickle.dumps(dict.fromkeys(range(N), "a")), "not all numbers"),
        (pickle.dumps(dict.fromkeys(range(N + 5), 1.0)), "does not score examples 0 to 59"),
        (pickle.dumps(dict.fromkeys(range(N), float("nan"))), "no finite flat score"),
        (None, "is missing"),
    ):
        with spoilt(record, None), spoilt(path, bad):
            refuse("average_scores.py", *world.average("--optimizer=sgd", "--modes", "flat"), status=FILE,
                   says=(r"hessian_flat_train\.pkl: ", says), keep=world.base)  # fmt: skip
    assert not proof.exists()


# ---------------------------------------------------------------------------------------------------------- plots

GOOD = {index: index / N for index in range(N)}


@pytest.mark.parametrize("script", ["plot_proxies.py", "plot_images.py"])
def test_bad_score_files(world, tmp_path, script):
    proof = tmp_path / "proof"
    for content, says in (
        (dict.fromkeys(range(50), 0.5), ("for 50 examples, the data set has 60",)),
        (dict.fromkeys(range(70), 0.5), ("for 70 examples, the data set has 60",)),
        ({**GOOD, 3: float("nan")}, ("score of example 3 is nan", "again")),
        ({**GOOD, 3: "x"}, ("not all numbers", "again")),
        ({"a": 1.0}, ("not all integers", "again")),
        ({index: score for index, score in GOOD.items() if index != 7}, ("no score of example 7", "again")),
        ([1, 2], ("not a score file", "again")),
        (RunsCode(proof), ("not plain data", "recreate")),
    ):
        with spoilt(world.scores, pickle.dumps(content)), spoilt(world.scores.with_suffix(".json"), None):
            refuse(script, *world.plot(tmp_path), status=FILE, says=(r"samis_loss_.*\.pkl: ", *says), keep=world.base)
    for content, says in ((b"{broken", "is damaged"), (b"[]", "no settings"), (b'{"total": "x"}', "its total is x")):
        with spoilt(world.scores.with_suffix(".json"), content):
            refuse(
                script, *world.plot(tmp_path), status=FILE, says=(r"samis_loss_.*\.json: ", says, "again|recreate")
            )
    with spoilt(world.scores.with_suffix(".json"), b'{"label_hash": "0"}'):
        refuse(script, *world.plot(tmp_path), status=FILE, says=("made for other labels", "of this data set"))
    assert not list(tmp_path.iterdir()), "nothing was drawn, and no code ran"


@pytest.mark.parametrize("script", ["plot_proxies.py", "plot_images.py"])
def test_scores_that_nobody_made(world, tmp_path, script):
    for mode, command in (
        ("samis_prob", "compute_sam_sgd.py and average_scores.py --dataset npz:FILE"),
        ("csl", "train_full.py --measure_proxies and average_scores.py"),
        ("mem", "estimates of your own"),
        ("mpe", "examples/"),
    ):
        flags = (world.dataset, f"--metrics_folder={tmp_path}", f"--plots_folder={tmp_path}", "--modes", mode)
        refuse(script, *flags, status=FILE, says=(f"{mode}|infl_matrix", "no .* scores of", command), keep=tmp_path)


GIVEN = ("--dataset=digits", "--model=small_mlp")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("plot_images.py", ("--dataset=digits", "--modes", "samis_loss")),
        ("plot_proxies.py", ("--dataset=digits", "--modes", "samis_loss")),
        ("plot_proxies.py", ("--dataset=digits",)),
        ("train_prune.py", (*GIVEN, "--coreset_func=min_sam-sgd-loss")),
        ("select_coreset.py", (*GIVEN, "--coreset_func=min_sam-sgd-loss")),
        ("compare_pruning.py", (*GIVEN, "--funcs", "min_sam-sgd-loss", "--fractions", "0.5")),
        ("compute_ntk.py", (*GIVEN, "--ntk_chosen_metric=samis_loss", "--seeds", "1")),
        ("compute_hessian_eigen.py", (*GIVEN, "--high_low_spec=samis_loss:low:0.3", "--epochs=1")),
    ],
)
@pytest.mark.parametrize("given", ["--metrics_folder=", "--scores_folder=", "--scores_folder=samis_loss="])
def test_shipped_scores_are_not_taken_for_those_of_a_given_folder(digits_run, tmp_path, script, flags, given):
    others = [f"--{name}_folder={tmp_path / name}" for name in FOLDERS_OF[script] if name != "models"]
    more = [f"--models_folder={digits_run}"] if "models" in FOLDERS_OF[script] else []
    (tmp_path / "given").mkdir()
    says = (
        "samis_loss_digits",
        "no SAMIS-L scores",
        "average_scores.py --dataset digits",
        r"--scores_folder=\S*src/metrics ",
    )
    refuse(script, *flags, *others, *more, f"{given}{tmp_path / 'given'}", status=FILE, says=says)


FOLDERS_OF = {
    "plot_images.py": ("plots",),
    "plot_proxies.py": ("plots",),
    "train_prune.py": ("models", "log", "resume_ckpts"),
    "select_coreset.py": ("models", "log", "resume_ckpts"),
    "compare_pruning.py": ("models", "log", "resume_ckpts", "plots"),
    "compute_ntk.py": ("models", "ntk"),
    "compute_hessian_eigen.py": ("models", "hessian"),
}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A network trained on the digits."""
    base = tmp_path_factory.mktemp("digits")
    succeed("train_full.py", *GIVEN, "--epochs=2", "--lr_sched=const", "--batch_size=512", *folders(base, *TRAIN))
    return base / "models"


def test_the_file_that_is_read_is_named(tmp_path):
    flags = ("--dataset=digits", "--modes", "samis_loss", "--only_overview", "--n=1", f"--plots_folder={tmp_path}")
    shipped = ROOT / "src" / "metrics" / "sam_sgd" / "samis_loss_digits.pkl"
    given = tmp_path / "run=3"  # a folder, not the scores of a mode called "run"
    (given / "sam_sgd").mkdir(parents=True)
    own = given / "sam_sgd" / shipped.name
    own.write_bytes(shipped.read_bytes())
    own.with_suffix(".json").write_bytes(shipped.with_suffix(".json").read_bytes())
    for folder, path in ((ROOT / "src" / "metrics", shipped), (given, own), (f"samis_loss={given}", own)):
        assert f"read from {path}" in succeed("plot_images.py", *flags, f"--scores_folder={folder}").err
    refuse("plot_images.py", *flags, "--scores_folder=run=3", status=FLAG, says=("run=3: there is no such folder",))


def test_memorization_of_other_labels_or_not_where_it_was_asked_for(world, tmp_path):
    labels = np.arange(N) % 3
    path = SCORES["mem"].path(tmp_path / "scores", world.name)
    path.parent.mkdir(parents=True)
    scores = f"--scores_folder={tmp_path / 'scores'}"
    np.savez(path, tr_mem=np.arange(N) / N, tr_labels=labels)
    assert "and memori" in succeed("compute_sam_sgd.py", *world.compute("--overwrite", scores)).out
    np.savez(path, tr_mem=np.arange(N) / N, tr_labels=labels[::-1])
    says = (r"infl_matrix\.npz: was made for other labels",)
    plot = (world.dataset, "--modes", "mem", f"--plots_folder={tmp_path}", scores)
    for script, flags in (("compute_sam_sgd.py", world.compute("--overwrite", scores)), ("plot_images.py", plot),
                          ("plot_proxies.py", plot)):  # fmt: skip
        refuse(script, *flags, status=FILE, says=says, keep=world.base)
    path.unlink()
    refuse("compute_sam_sgd.py", *world.compute("--overwrite", scores), status=FILE, keep=world.base,
           says=("no memorization scores",))  # fmt: skip


def test_published_scores_by_data_set():
    line = refuse(
        "fetch_scores.py", "--dataset=digits", status=FLAG, says=("^fetch_scores.py: --dataset digits: no sc",)
    )
    shown = " ".join(succeed("fetch_scores.py", "--help").out.split())
    for text in ("cifar10: eps, flat, etl, forg, samis_loss, samis_prob; cifar100: eps", "forg, mem", "svhn: eps"):
        assert text in line
        assert text in shown


def test_figures_of_what_is_not_there(world, tmp_path):
    for script, flags, status, says in (
        (
            "plot_images.py",
            ("--classes", "nope"),
            FLAG,
            ("--classes: there is no class 'nope'", "choose from 0, 1, 2"),
        ),
        ("plot_images.py", ("--subset=0",), FLAG, ("--subset 0", "1 to 60")),
        ("plot_proxies.py", ("--reference=/none",), FLAG, ("--reference /none", "no such folder")),
        ("plot_proxies.py", (f"--reference={tmp_path}",), FLAG, ("--reference", "holds no scores", "that does")),
    ):
        refuse(script, *world.plot(tmp_path, *flags), status=status, says=says, keep=world.base)
    flags = (world.dataset, f"--metrics_folder={tmp_path}", f"--plots_folder={tmp_path}")
    refuse(
        "plot_proxies.py", *flags, status=FILE, says=("no .* scores of", "compute_sam_sgd.py and average_scores.py")
    )
    (tmp_path / "taken").write_text("")
    for script in ("plot_proxies.py", "plot_images.py"):
        refuse(script, *world.plot(tmp_path / "taken"), status=FILE, says=("could not be written", "another folder"))


# ------------------------------------------------------------------------------------- the network, and the disk


def test_published_scores_that_cannot_be_had(tmp_path):
    flags = ("--dataset=cifar10", "--modes=forg", f"--folder={tmp_path}")
    says = (r"forg_cifar10\.pkl: could not be downloaded", "check the connection or --base_url")
    refuse("fetch_scores.py", *flags, "--base_url=http://127.0.0.1:9", status=FILE, says=says, keep=tmp_path)
    path = SCORES["forg"].path(tmp_path, "cifar10")
    path.parent.mkdir(exist_ok=True)
    path.write_text("the user's own")
    says = (r"forg_cifar10\.pkl: holds other scores", "--overwrite", "--folder")
    refuse("fetch_scores.py", *flags, "--base_url=http://127.0.0.1:9", status=FILE, says=says, keep=tmp_path)


def test_a_disk_that_is_full_when_scores_are_written(world):
    for script, flags, limit in (
        ("compute_sam_sgd.py", world.compute("--overwrite"), 1000),
        ("average_scores.py", world.average("--overwrite"), 300),
    ):
        before = snapshot(world.base)
        done = on_a_full_disk(limit, script, *flags)
        check(done, script, FILE, f"{world.base / 'metrics'}/.*: could not be written", "make room")
        assert_kept(before, world.base)
