"""Scripts 2, 3 and 5 of the sensitivity experiments, as users run them."""

import shutil

import numpy as np
import pytest
import torch
from refusals import FILE, FLAG, assert_kept, check, snapshot
from support import call, folders, succeed

import mpe.retraining
from mpe.retraining import one_epoch
from mpe.retraining_files import RetrainingFiles
from src.artifacts import read_checkpoint, read_pickle
from src.datasets import load_dataset
from src.models import MODELS, build_model
from src.optimizers import rate

L2REG, VALIDATION, LOCO = (f"examples/{name}.py" for name in ("2_loo_l2reg", "3_validation_sensitivities", "5_loco"))
N, BATCH, EPOCHS, DELTA, CLASSES = 100, 24, 2, 1.0, 10
DATA = ("--dataset=digits", f"--subset={N}", f"--bs={BATCH}", "--bs_jacs=64", "--name_exp=t")
BASE = (*DATA, "--model=small_mlp", f"--epochs={EPOCHS}", "--lr=0.05", "--lrmin=0.01")
RETRAINED = (*BASE, f"--delta={DELTA}", "--epochs_retrain=3", "--lr_retrain=0.05", "--lrmin_retrain=0.02")
FLAGS = {
    L2REG: (*BASE, "--n_exp=5", "--deltas_start=-1", "--deltas_stop=3", "--ensemble_size=2"),
    VALIDATION: (*RETRAINED, "--n_retrain=4", "--ensemble_size=2"),
    LOCO: (*RETRAINED, "--ensemble_size=4"),
}
KIND = {L2REG: "cv", VALIDATION: "retrain", LOCO: "leaveclassout"}
CHUNKS = {L2REG: "4_5", VALIDATION: "4_5", LOCO: "8_11"}  # the last of three
SCRIPTS = tuple(KIND)


def flags(script, base, *more):
    return (*FLAGS[script], *folders(base, "datasets", "models", "log", "resume_ckpts", "pickles"), *more)


def result(script, base, kind=None):
    return read_pickle(base / "pickles" / f"t_{kind or KIND[script]}.pkl")


def run(script, base, *more):
    succeed(script, *flags(script, base, *more))
    return result(script, base)


def same(first, second, rtol=0.0):
    """Equal but for the flags: to the bit, or the numbers to rounding."""
    assert first.keys() == second.keys()
    for name in first.keys() - {"args", "settings"}:
        np.testing.assert_allclose(first[name], second[name], rtol=rtol, atol=1e-9 if rtol else 0, err_msg=name)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of each script; tests copy what they spoil."""
    base = {script: tmp_path_factory.mktemp(KIND[script]) for script in SCRIPTS}
    return {script: (folder, run(script, folder)) for script, folder in base.items()}


@pytest.fixture
def copy_of(done, tmp_path):
    def copy(script):
        return shutil.copytree(done[script][0], tmp_path / KIND[script])

    return copy


def refuse(status, script, base, *more, says):
    """Run a script that must answer with one line."""
    return check(call(script, *flags(script, base, *more)), script.split("/")[1], status, *says)


def retraining(base):
    return next(base.glob("resume_ckpts/**/retraining"))


# --------------------------------------------------------------------------------------- what the files hold


def test_the_file_of_script_2(done):
    found = done[L2REG][1]
    np.testing.assert_array_equal(found["deltas"], np.logspace(-1, 3, 5))
    assert found["deltas"].dtype == np.float64
    assert [type(value) for value in found["estimated_nll"]] == [np.float64] * 5
    assert [type(value) for value in found["test_accs"]] == [float] * 5
    assert [type(value) for value in found["test_nlls"]] == [np.float32] * 5
    assert (found["args"]["model"], found["args"]["n_exp"]) == ("small_mlp", 5)
    np.testing.assert_array_equal(found["estimated_nll"], found["estimated_nll_diag"])
    assert (np.array(found["estimated_nll"]) > found["train_nll"]).all()
    assert np.ptp(found["test_nlls"]) > 0.05


def test_the_files_of_script_3(done):
    base, found = done[VALIDATION]
    scores = result(VALIDATION, base, "scores")
    assert scores["sensitivities"].shape == (N,)
    assert scores["sensitivities"].dtype == np.float64
    assert scores["args"]["name_exp"] == found["args"]["name_exp"] == "t"
    train = load_dataset("digits", base)[0]
    assert scores["labels"].tolist() == train.labels[scores["indices"]].tolist()

    positions = np.arange(N)
    np.random.seed(1)  # the legacy generator, as the paper's code uses it
    np.random.shuffle(positions)
    assert found["indices_retrain"].tolist() == positions[:4].tolist()
    assert found["indices_retrain"].dtype == np.int64
    assert found["softmax_deviations"].shape == (4,)
    assert found["softmax_deviations"].dtype == np.float64
    np.testing.assert_array_equal(found["indices_original"], scores["indices"][found["indices_retrain"]])
    assert not found["spread"].any()


def test_deviations_are_from_the_network_before_and_from_the_control(done):
    found = done[VALIDATION][1]
    moved = found["base_probabilities"] + found["probability_deviations"]
    assert moved.shape == (4, CLASSES)
    np.testing.assert_allclose(moved.sum(1), 1, rtol=1e-6)
    other = found["control_probabilities"] + found["probability_deviations_corrected"]
    np.testing.assert_allclose(other, moved, rtol=1e-12)
    for suffix in ("", "_corrected"):
        wanted = np.abs(found[f"probability_deviations{suffix}"]).sum(1)
        np.testing.assert_allclose(found[f"softmax_deviations{suffix}"], wanted, rtol=1e-12)
    # a network so little trained moves by training on, not by what it lacks
    assert (found["softmax_deviations"] > 3 * found["softmax_deviations_corrected"]).all()


def test_the_file_of_script_5(done):
    found = done[LOCO][1]
    for name in ("est_nll", "perturb_nll", "perturb_acc"):
        assert found[name].shape == (CLASSES,)
        assert found[name].dtype == np.float64
        assert np.isfinite(found[name]).all()
    assert type(found["org_acc"]) is float
    assert (found["perturb_nll"] > found["control_nll"]).all()  # a class that is lacking is not recognised
    assert found["perturb_nll"].std() > 1e-3


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_form_of_class_covariance(script, done, tmp_path):
    found = run(script, tmp_path, "--class_cov=woodbury")
    key = {L2REG: "estimated_nll", VALIDATION: "sensitivities", LOCO: "est_nll"}[script]
    stored, base = (found, done[script][1]) if script != VALIDATION else (
        result(VALIDATION, tmp_path, "scores"), result(VALIDATION, done[VALIDATION][0], "scores")
    )  # fmt: skip
    np.testing.assert_array_equal(stored[key], stored[f"{key}_woodbury"])
    np.testing.assert_allclose(stored[f"{key}_diag"], base[key], rtol=1e-5)
    assert np.abs(np.array(stored[f"{key}_full"]) / stored[f"{key}_diag"] - 1).max() > 0.01
    same_keys = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    np.testing.assert_array_equal(found[same_keys], done[script][1][same_keys])


# -------------------------------------------------------------------------------- the same by a plain loop


def material(base, indices):
    """Images and labels of the training examples, normalised by hand, in float64."""
    train, test = load_dataset("digits", base)
    norm = train.entry.normalisations["mpe"]
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (norm.mean, norm.std))
    parts = (train.subset(torch.as_tensor(indices)), test)
    return [((part.fetch(torch.arange(len(part))).double() / 255 - mean) / deviation, part.labels) for part in parts]


def plainly(model, images, labels, batches, *, epochs, lr, lrmin, delta):
    """Train with torch's own SGD on fixed batches."""
    steps = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=delta / len(labels))
    for epoch in range(1, epochs + 1):
        steps.param_groups[0]["lr"] = rate("cosine", epoch, epochs, lr, lrmin)
        for batch in batches:
            steps.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            steps.step()
    return model


def drawn():
    """One number from torch's global generator, as a loader draws it."""
    return int(torch.empty((), dtype=torch.int64).random_())


def replayed(trained, images, labels, removed, extra):
    """Networks retrained one after another under the random numbers of the paper's code."""
    torch.manual_seed(1)
    MODELS["small_mlp"].build(CLASSES, 1, 8)
    for _ in range(6):
        drawn()
    for left in removed:
        kept = np.setdiff1d(np.arange(len(labels)), left)
        drawn()
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(drawn()))
        model = build_model("small_mlp", CLASSES, 1, 8, 1).double()
        model.load_state_dict(trained)
        yield plainly(
            model, images[kept], labels[kept], order.split(BATCH), epochs=3, lr=0.05, lrmin=0.02, delta=DELTA
        ).eval()
        for _ in range(extra):
            drawn()


EXACT = ("--precision=fp64", "--retrain_shuffle=replay")


@pytest.fixture
def global_generator():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def trained_weights(base):
    return read_checkpoint(next(base.glob("models/**/last.pt")))["model_state"]


def test_script_3_retrains_as_a_plain_loop(tmp_path, global_generator):
    found = run(VALIDATION, tmp_path, *EXACT)
    scores = result(VALIDATION, tmp_path, "scores")
    (images, labels), _ = material(tmp_path, scores["indices"])
    removed = found["indices_retrain"]
    weights = trained_weights(tmp_path)
    for row, model in enumerate(replayed(weights, images, labels, removed, extra=0)):
        example = images[[removed[row]]]
        moved = model(example).softmax(1)[0]
        model.load_state_dict(weights)
        wanted = (moved - model(example).softmax(1)[0]).detach().numpy()
        np.testing.assert_allclose(found["probability_deviations"][row], wanted, rtol=1e-9, atol=1e-13)


def test_script_5_retrains_as_a_plain_loop(tmp_path, global_generator):
    found = run(LOCO, tmp_path, *EXACT)
    (images, labels), (test_images, test_labels) = material(tmp_path, subset_of_digits(tmp_path))
    removed = [np.flatnonzero(labels == c) for c in range(4)]
    for c, model in enumerate(replayed(trained_weights(tmp_path), images, labels, removed, extra=1)):
        logits = model(test_images)
        wanted = torch.nn.functional.cross_entropy(logits, test_labels).item()
        assert found["perturb_nll"][c] == pytest.approx(wanted, rel=1e-10)
        assert found["perturb_acc"][c] == (logits.argmax(1) == test_labels).double().mean().item()


def subset_of_digits(base):
    """The original indices of ``--subset``, from a small run of script 3."""
    succeed(VALIDATION, *flags(VALIDATION, base / "s", "--epochs=1", "--epochs_retrain=1", "--n_retrain=1"))
    return result(VALIDATION, base / "s", "scores")["indices"]


def test_script_2_trains_as_a_plain_loop(tmp_path):
    found = run(L2REG, tmp_path, "--precision=fp64")
    (images, labels), (test_images, test_labels) = material(tmp_path, subset_of_digits(tmp_path))
    for number in (0, 4):
        model = build_model("small_mlp", CLASSES, 1, 8, 1).double()
        batches = torch.arange(N).split(BATCH)  # in the order of the data
        rates = {"epochs": EPOCHS, "lr": 0.05, "lrmin": 0.01}
        plainly(model, images, labels, batches, delta=found["deltas"][number], **rates)
        wanted = torch.nn.functional.cross_entropy(model(test_images), test_labels).item()
        assert found["test_nlls"][number] == np.float32(wanted)
        wanted = torch.nn.functional.cross_entropy(model(images), labels).item()
        assert found["train_nll"][number] == pytest.approx(wanted, rel=1e-10)


# ----------------------------------------------------------------------------------------------- interruption


class Stop:
    """Ends the process after so many epochs of networks, as Ctrl-C does; states are written at every epoch."""

    def __init__(self, monkeypatch, epochs):
        self.left = epochs
        monkeypatch.setattr(mpe.retraining, "one_epoch", self)
        monkeypatch.setattr(
            mpe.retraining, "RetrainingFiles", lambda folder, key, seconds: RetrainingFiles(folder, key, 0.0)
        )

    def __call__(self, *args):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return one_epoch(*args)


@pytest.mark.parametrize(
    ("script", "more", "rows"),
    [
        (L2REG, (), 2),
        (L2REG, ("--optimizer=adam", "--base_shuffle=epoch"), 2),
        (L2REG, ("--optimizer=adamw", "--ensemble=sequential"), 2),
        (VALIDATION, (), 1),
        (VALIDATION, ("--retrain_shuffle=replay", "--ensemble=sequential"), 1),
        (VALIDATION, ("--retrain_shuffle=shared", "--class_cov=full"), 1),
        (LOCO, (), 3),
        (LOCO, ("--model=lenet", "--bs=50", "--retrain_shuffle=replay"), 3),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, script, more, rows):
    """The interruption: inside the second chunk of three, after its first epoch."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wanted = run(script, whole, *more)
    epochs = EPOCHS if script == L2REG else 3
    with monkeypatch.context() as patch:
        Stop(patch, epochs + 1)
        ended = call(script, *flags(script, broken, *more))
    assert ended.status == 130
    assert "--resume goes on with it" in ended.complaint
    half = result(script, broken)  # what was done is there
    key = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    np.testing.assert_array_equal(half[key][:rows], wanted[key][:rows])
    assert np.isfinite(half[key]).sum() == rows
    resumed = succeed(script, *flags(script, broken, *more, "--resume"))
    assert "networks were retrained before" in resumed.err
    assert f"going on after epoch 1 of {epochs}" in resumed.err
    same(wanted, result(script, broken))
    if script == VALIDATION:
        same(result(script, whole, "scores"), result(script, broken, "scores"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_whose_last_networks_and_result_are_gone(script, done, copy_of):
    base = copy_of(script)
    chunks = sorted(path.name for path in retraining(base).glob("networks_*.npz"))
    assert len(chunks) == 3
    (retraining(base) / f"networks_{CHUNKS[script]}.npz").unlink()
    (base / "pickles" / f"t_{KIND[script]}.pkl").unlink()
    resumed = succeed(script, *flags(script, base, "--resume"))
    assert "networks were retrained before" in resumed.err
    assert "going on after epoch" not in resumed.err
    same(done[script][1], result(script, base))
    assert sorted(path.name for path in retraining(base).glob("networks_*.npz")) == chunks


@pytest.mark.parametrize("script", [VALIDATION, LOCO])
def test_a_run_interrupted_in_its_base_training(script, done, copy_of):
    base = copy_of(script)
    shutil.rmtree(retraining(base))
    shutil.rmtree(base / "pickles")
    next(base.glob(f"resume_ckpts/**/epoch={EPOCHS}.pth.tar")).unlink()
    resumed = succeed(script, *flags(script, base, "--resume"))
    assert f"continuing after epoch {EPOCHS - 1}" in resumed.err
    same(done[script][1], result(script, base))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_is_not_trained_again(script, done, copy_of, monkeypatch):
    base = copy_of(script)
    Stop(monkeypatch, 0)
    succeed(script, *flags(script, base, "--resume"))
    same(done[script][1], result(script, base))
    assert call(script, *flags(script, base)).status == 130  # which without --resume it is


def test_networks_of_another_base_run_are_not_taken(copy_of):
    """The base run's states are gone and it is trained anew, under another name's weights."""
    base = copy_of(VALIDATION)
    settings = retraining(base) / "settings.json"
    text = settings.read_text()
    start = text.index('"base_weights": "') + len('"base_weights": "')
    settings.write_text(text[:start] + "0" * 16 + text[start + 16 :])
    refuse(FILE, VALIDATION, base, "--resume", says=("retraining: ", "base_weights", "--overwrite"))


# --------------------------------------------------------------------------------- choices of how to retrain


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """Script 3 in float64, by shuffle."""

    def once(shuffle, *more):
        base = tmp_path_factory.mktemp(shuffle)
        return run(VALIDATION, base, "--precision=fp64", f"--retrain_shuffle={shuffle}", *more)

    return {shuffle: once(shuffle) for shuffle in ("seeded", "replay", "shared")}


def test_shuffles_differ(exact):
    found = [exact[shuffle]["softmax_deviations"] for shuffle in ("seeded", "replay", "shared")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(found[first] / found[second] - 1) > 1e-4).all()
    base = [exact[shuffle]["base_probabilities"] for shuffle in exact]
    np.testing.assert_array_equal(base[0], base[1])
    # networks that share a shuffle differ by the example left out alone
    noise = {shuffle: exact[shuffle]["softmax_deviations_corrected"].mean() for shuffle in exact}
    assert noise["shared"] < noise["seeded"]


@pytest.mark.parametrize(
    ("shuffle", "more"),
    [
        ("seeded", ("--ensemble_size=1",)),
        ("seeded", ("--ensemble_size=50",)),
        ("replay", ("--ensemble_size=3",)),
        ("shared", ("--ensemble_size=50", "--ensemble=sequential")),
        ("seeded", ("--ensemble=sequential",)),
        ("replay", ("--ensemble=sequential", "--ensemble_size=50")),
    ],
)
def test_how_networks_are_grouped_and_trained_changes_roundings_alone(tmp_path, exact, shuffle, more):
    flag = f"--retrain_shuffle={shuffle}"
    same(exact[shuffle], run(VALIDATION, tmp_path, "--precision=fp64", flag, *more), rtol=1e-8)


def test_a_network_of_convolutions_vectorised_and_in_turn(tmp_path):
    more = ("--precision=fp64", "--model=lenet", "--subset=40", "--epochs_retrain=2", "--n_retrain=2")
    found = [run(VALIDATION, tmp_path / how, *more, f"--ensemble={how}") for how in ("vectorised", "sequential")]
    same(*found, rtol=1e-8)


def test_seeded_networks_do_not_depend_on_which_others_there_are(tmp_path, exact):
    found = run(VALIDATION, tmp_path, "--precision=fp64", "--n_retrain=2", "--ensemble_size=50")
    first = exact["seeded"]["probability_deviations"][:2]
    np.testing.assert_allclose(found["probability_deviations"], first, rtol=1e-8, atol=1e-12)


def test_another_size_of_ensemble_can_go_on(copy_of, done):
    base = copy_of(VALIDATION)
    for name in ("networks_2_4.npz", "networks_4_5.npz"):
        (retraining(base) / name).unlink()
    found = run(VALIDATION, base, "--resume", "--ensemble_size=50")
    same(done[VALIDATION][1], found, rtol=1e-4)


@pytest.mark.parametrize("drawn", [2, 0])
def test_examples_spread_over_the_range_of_the_estimates(tmp_path, drawn):
    found = run(VALIDATION, tmp_path, f"--n_retrain={drawn}", "--n_spread=3")
    scores = result(VALIDATION, tmp_path, "scores")["sensitivities"]
    assert found["spread"].tolist() == [False] * drawn + [True] * 3
    random, spread = np.split(found["indices_retrain"], [drawn])
    assert len({*random, *spread}) == drawn + 3
    free = np.setdiff1d(np.arange(N), random)
    top, middle, low = scores[spread]
    assert (top, low) == (scores[free].max(), scores[free].min())
    wanted = (scores.max() + scores.min()) / 2
    assert abs(middle - wanted) == np.abs(scores[free] - wanted).min()
    assert np.isfinite(found["softmax_deviations"]).all()


def test_every_example_can_be_left_out(tmp_path):
    more = ("--subset=12", "--n_retrain=12", "--epochs_retrain=1", "--epochs=1", "--ensemble_size=50")
    found = run(VALIDATION, tmp_path, *more)
    assert sorted(found["indices_retrain"]) == list(range(12))


def test_a_class_that_the_subset_lacks_is_left_open(tmp_path):
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    chosen = np.concatenate([np.flatnonzero(labels == c)[:8] for c in (0, 3, 7)])
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, chosen)))
    found = run(LOCO, tmp_path, f"--subset={tmp_path / 'chosen.txt'}")
    there = np.isin(np.arange(CLASSES), (0, 3, 7))
    for name in ("est_nll", "perturb_nll", "perturb_acc"):
        np.testing.assert_array_equal(np.isfinite(found[name]), there)
    draw(LOCO, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_with_batch_norm_are_trained_in_turn(script, tmp_path):
    more = {L2REG: ("--n_exp=2",), VALIDATION: ("--n_retrain=1",), LOCO: ()}[script]
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    chosen = np.concatenate([np.flatnonzero(labels == c)[:8] for c in (1, 6)])
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, chosen)))
    short = (f"--subset={tmp_path / 'chosen.txt'}", "--model=resnet8", "--epochs=1", "--bs=8")
    short += () if script == L2REG else ("--epochs_retrain=1",)
    found = run(script, tmp_path, *short, *more)
    key = {L2REG: "test_nlls", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    values = np.array(found[key])
    assert np.isfinite(values).sum() == {L2REG: 2, VALIDATION: 1, LOCO: 2}[script]
    assert np.nanmin(values) > 0


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_of_other_settings_are_kept_or_replaced(script, done, copy_of):
    base = copy_of(script)
    other = "--deltas_stop=2" if script == L2REG else "--lr_retrain=0.04"
    says = (
        rf"t_{KIND[script]}\.pkl|t_scores\.pkl",
        r"deltas_stop \(3\.0 there, 2\.0 here\)|lr_retrain \(0\.05 there",
    )
    before = snapshot(base)
    for more in ((), ("--resume",)):
        refuse(FILE, script, base, other, *more, says=(*says, "--overwrite"))
        assert_kept(before, base)
    found = run(script, base, other, "--overwrite")
    key = {L2REG: "deltas", VALIDATION: "softmax_deviations", LOCO: "perturb_nll"}[script]
    assert not np.array_equal(found[key], done[script][1][key])
    assert found["settings"] != done[script][1]["settings"]


def test_more_retrainings_can_use_the_base_run(copy_of, done):
    base = copy_of(VALIDATION)
    answer = succeed(VALIDATION, *flags(VALIDATION, base, "--n_retrain=6", "--overwrite", "--resume"))
    assert f"continuing after epoch {EPOCHS}" in answer.err
    found, before = result(VALIDATION, base), done[VALIDATION][1]
    assert len(found["softmax_deviations"]) == 6
    np.testing.assert_allclose(found["softmax_deviations"][:4], before["softmax_deviations"], rtol=1e-4)


TOGETHER = r"give 1 to 100 together"
CANNOT = {
    "nothing to leave out": (VALIDATION, ("--n_retrain=0",), ("--n_retrain 0", "--n_spread 0", TOGETHER)),
    "more than there are": (VALIDATION, ("--n_retrain=101",), ("--n_retrain 101", "100 training examples", TOGETHER)),
    "more in all": (VALIDATION, ("--n_retrain=60", "--n_spread=41"), ("--n_spread 41", "101 of 100", TOGETHER)),
    "a negative number": (VALIDATION, ("--n_spread=-1",), ("--n_spread", "-1 is not an integer of at least 0")),
    "a floor above the rate, 3": (
        VALIDATION,
        ("--lrmin_retrain=0.06",),
        ("--lrmin_retrain 0.06", "--lr_retrain 0.05", "at most"),
    ),
    "a floor above the rate, 5": (
        LOCO,
        ("--lr_retrain=0.01",),
        ("--lrmin_retrain 0.02", "--lr_retrain 0.01", "at most"),
    ),
    "a floor above the base rate": (LOCO, ("--lrmin=0.06",), ("--lrmin 0.06", "--lr 0.05", "at most")),
    "an unknown shuffle": (LOCO, ("--retrain_shuffle=random",), ("--retrain_shuffle", "seeded", "replay", "shared")),
    "no networks side by side": (LOCO, ("--ensemble_size=0",), ("--ensemble_size", "at least 1")),
    "descending deltas": (L2REG, ("--deltas_stop=-2",), ("--deltas_stop -2", "--deltas_start -1", "at least")),
    "half an experiment": (L2REG, ("--n_exp=2.5",), ("--n_exp", "2.5 is not a whole number")),
    "no experiment": (L2REG, ("--n_exp=0",), ("--n_exp", "at least 1")),
    "no delta": (LOCO, ("--delta=0",), ("--delta", "above 0")),
    "an optimiser without a place here": (L2REG, ("--optimizer=iblr",), ("--optimizer", "sgd", "adam", "adamw")),
    **{
        f"an unknown network, {script}": (script, ("--model=lenet6",), ("--model", "lenet6", "lenet"))
        for script in SCRIPTS
    },
    **{
        f"batch norm vectorised, {script}": (
            script,
            ("--ensemble=vectorised", "--model=resnet8"),
            ("--ensemble vectorised", "running statistics", "--model resnet8", "auto or sequential"),
        )
        for script in SCRIPTS
    },
}


@pytest.mark.parametrize("case", CANNOT)
def test_flags_that_cannot_be_followed_are_refused_before_training(case, tmp_path):
    script, more, says = CANNOT[case]
    refuse(FLAG, script, tmp_path, *more, says=says)
    assert not list(tmp_path.glob("models/**/*.pt"))
    assert not list(tmp_path.glob("pickles/*.pkl"))
    assert not list(tmp_path.glob("resume_ckpts/**/*"))


@pytest.mark.parametrize(("script", "examples"), [(LOCO, 9), (VALIDATION, 1)])
def test_examples_of_one_class_are_refused(script, examples, tmp_path):
    labels = load_dataset("digits", tmp_path)[0].labels.numpy()
    (tmp_path / "chosen.txt").write_text("\n".join(map(str, np.flatnonzero(labels == 4)[:examples])))
    more = ("--n_retrain=1",) if script == VALIDATION else ()
    says = (rf"--subset .*chosen\.txt: its {examples} training examples are of one class", "two classes")
    refuse(FLAG, script, tmp_path, f"--subset={tmp_path / 'chosen.txt'}", *more, says=says)
    assert not list(tmp_path.glob("models/**/*.pt"))


def test_a_whole_number_may_be_written_with_a_point(tmp_path):
    assert len(run(L2REG, tmp_path, "--n_exp=3.0")["deltas"]) == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_rate_at_which_training_diverges_is_named(script, tmp_path):
    flag = "--lr" if script == L2REG else "--lr_retrain"
    answer = call(script, *flags(script, tmp_path, f"{flag}=1e30"))
    assert answer.status == 1
    assert f"a smaller {flag} may help" in answer.complaint


# --------------------------------------------------------------------------------------------------- figures


PLOTS = {L2REG: "plot_loo_l2reg", VALIDATION: "plot_validation_sensitivities", LOCO: "plot_loco"}


def draw(script, base, *more):
    name = ("--names_exp", "t", "--plot_name", "t") if script == LOCO else ("--name_exp", "t")
    return succeed(f"examples/{PLOTS[script]}.py", *name, *folders(base, "pickles", "plots"), *more)


@pytest.mark.parametrize(
    ("script", "more", "name"),
    [
        (L2REG, (), "t_cv"),
        (L2REG, ("--window=2", "--test_error"), "t_cv_error"),
        (VALIDATION, (), "t_validation"),
        (VALIDATION, ("--corrected",), "t_validation_corrected"),
        (LOCO, (), "t_leaveclassout"),
    ],
)
def test_the_results_can_be_drawn(script, more, name, copy_of):
    base = copy_of(script)
    draw(script, base, *more)
    assert sorted(path.name for path in (base / "plots").iterdir()) == [f"{name}.pdf", f"{name}.png"]
