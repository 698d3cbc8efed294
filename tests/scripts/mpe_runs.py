"""Small runs of the experiments that train many models: scripts 2, 3 and 5."""

import numpy as np
from refusals import check
from support import call, folders, succeed

from src.artifacts.io import read_pickle

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
    """Check that results are equal except for the flags: exactly, or up to rounding."""
    assert first.keys() == second.keys()
    for name in first.keys() - {"args", "settings"}:
        if isinstance(first[name], str):
            assert first[name] == second[name], name
            continue
        np.testing.assert_allclose(first[name], second[name], rtol=rtol, atol=1e-9 if rtol else 0, err_msg=name)


def finished(folder_of):
    """A finished run of each script: its folder and result, by script."""
    base = {script: folder_of(KIND[script]) for script in SCRIPTS}
    return {script: (folder, run(script, folder)) for script, folder in base.items()}


def refuse(status, script, base, *more, says):
    """Run a script that must fail with a one-line message."""
    return check(call(script, *flags(script, base, *more)), script.split("/")[1], status, *says)


def retraining(base):
    return next(base.glob("resume_ckpts/**/retraining"))


PLOTS = {L2REG: "plot_loo_l2reg", VALIDATION: "plot_validation_sensitivities", LOCO: "plot_loco"}


def draw(script, base, *more):
    name = ("--names_exp", "t", "--plot_name", "t") if script == LOCO else ("--name_exp", "t")
    return succeed(f"examples/{PLOTS[script]}.py", *name, *folders(base, "pickles", "plots"), *more)
