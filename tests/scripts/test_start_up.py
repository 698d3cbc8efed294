"""Help and the answers to bad flags need none of the large packages, which take seconds to import."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, folders
from support import TRAIN as TRAIN_FOLDERS

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "examples") for path in folder.glob("*.py"))

# Answers all command lines in one process, in which the large packages cannot be imported.
ANSWER = """
import contextlib, io, json, runpy, sys

absent, script, *lines = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
for line in lines:
    sys.argv = [script, *line]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


LARGE = ["torch", "torchvision", "matplotlib", "scipy", "sklearn", "pandas", "PIL"]


def answers(script: str, *lines: list[str], absent: list[str] = LARGE) -> list[tuple[int, str, str]]:
    """Exit status, output and error output of a script for each command line, without the ``absent`` packages."""
    words = [json.dumps(word) for word in (absent, str(ROOT / script), *lines)]
    ran = subprocess.run([sys.executable, "-c", ANSWER, *words], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_flags_import_no_large_package(script):
    helped, unknown = answers(script, ["--help"], ["--no_such_flag=1"])
    assert helped[0] == 0
    assert "--" in helped[1]
    assert helped[2] == ""
    assert unknown[0] == 2
    assert len(unknown[2].splitlines()) == 1


TRAIN = ["--dataset=digits", "--model=lenet"]
PRUNE = [*TRAIN, "--coreset_func=random"]

# Of each script, command lines that are wrong whatever the files hold, and the flag that the answer begins with.
WRONG = {
    "train_full.py": [
        ["--dataset=nothing"],
        ["--model=nothing"],
        ["--optimizer=nothing"],
        ["--lr_sched=nothing"],
        ["--precision=fp8"],
        ["--device=nothing"],
        ["--epochs=0"],
        [*TRAIN, "--save_epochs=1,7", "--epochs=6"],
        [*TRAIN, "--lr_min=1", "--learning_rate=0.1"],
        [*TRAIN, "--image_size=9"],
        [*TRAIN, "--channels=3"],
        [*TRAIN, "--pretrained"],
        [*TRAIN, "--cutout_holes=1"],
        ["--dataset=npz:"],
    ],
    "train_split.py": [
        ["--samis_validation_split_index=11"],
        [*TRAIN, "--save_epochs=7", "--epochs=6"],
    ],
    "train_prune.py": [
        [*TRAIN, "--coreset_func=nothing"],
        [*PRUNE, "--coreset_fraction=2"],
        [*PRUNE, "--save_epochs=7", "--coreset_epochs=6"],
        [*TRAIN, "--shots=1", "--coreset_func=infobatch_dynamic"],
        [*TRAIN, "--optimizer=iblr", "--coreset_func=infobatch_dynamic"],
    ],
    "select_coreset.py": [[*TRAIN, "--coreset_func=infobatch_dynamic"], [*PRUNE, "--channels=3"]],
    "compare_pruning.py": [
        [*TRAIN, "--funcs", "random", "nothing", "--fractions=0.1"],
        [*TRAIN, "--shots=1", "--funcs", "random", "infobatch_dynamic"],
    ],
    "compute_sam_sgd.py": [["--protocol=nothing"], ["--dataset=digits", "--image_size=9"]],
    "average_scores.py": [["--dataset=digits", "--seeds", "1", "1"], ["--seeds=1", "--modes", "nothing"]],
    "fetch_scores.py": [["--base_url=nothing"], ["--dataset=nothing"], ["--modes", "nothing"]],
    "compute_hessian_eigen.py": [
        ["--operator=nothing"],
        ["--basis=nothing"],
        ["--high_low_spec=mem:middle:0.3"],
        ["--eigen_split=test", "--subset=10"],
    ],
    "compute_ntk.py": [["--ntk_chosen_metric=nothing"], ["--ntk_classes=nothing"], ["--precision=bf16"]],
    "plot_hessian.py": [["--optimizers=nothing"], ["--high_low_specs=nothing"], ["--labels", "one", "two"]],
    "plot_images.py": [["--modes=nothing"]],
    "plot_ntk.py": [["--metrics=nothing"]],
    "plot_proxies.py": [["--modes=nothing"], ["--plot=nothing"]],
    "examples/1_loo_iterations.py": [["--lrmin=1", "--lr=0.1"], ["--optim_var", "--optimizer=sgd"]],
    "examples/2_loo_l2reg.py": [["--deltas_stop=0", "--deltas_start=1"], ["--compile"], ["--precision=bf16"]],
    "examples/3_validation_sensitivities.py": [["--retrain_shuffle=nothing"], ["--precision=bf16"]],
    "examples/4_evolving_sensitivities.py": [["--lrmin=1", "--lr=0.1"], ["--class_cov=nothing"]],
    "examples/5_loco.py": [["--lrmin_retrain=1", "--lr_retrain=0.1"], ["--base_shuffle=nothing"]],
    "examples/plot_evolving_sensitivities.py": [["--class_cov=nothing"]],
    "examples/plot_loco.py": [["--labels", "one", "--names_exp", "a", "b"]],
    "examples/plot_loo_iterations.py": [["--name_exp=a/b"]],
    "examples/plot_loo_l2reg.py": [["--window=0"]],
    "examples/plot_validation_sensitivities.py": [["--class_cov=nothing"]],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_are_wrong_whatever_the_files_hold_import_no_large_package(script):
    lines = WRONG[script]
    for line, (status, out, err) in zip(lines, answers(script, *lines), strict=True):
        assert (status, out) == (2, ""), (line, err)
        assert len(err.splitlines()) == 1, (line, err)
        assert any(word.split("=")[0] in err for word in line if word.startswith("--")), (line, err)


def test_training_imports_no_package_that_it_does_not_need(tmp_path):
    flags = ["--dataset=digits", "--model=lenet", "--subset=50", "--epochs=1", *folders(tmp_path, *TRAIN_FOLDERS)]
    absent = ["torchvision", "matplotlib", "scipy", "sklearn.base", "pandas"]
    ((status, out, err),) = answers("train_full.py", flags, absent=absent)
    assert status == 0, err
    assert "test accuracy" in out


PLOTTING = [
    "src.metrics.plots",
    "src.metrics.plots",
    "src.coresets.plots",
    "src.curvature.plots",
    "src.curvature.plots",
    "mpe.plots",
    "mpe.plots",
]

# What a notebook hands to the processes that it starts, and a back end that is installed nowhere.
BACKENDS = ["module://matplotlib_inline.backend_inline", "inline", "widget", "module://nonexistent.backend"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_figures_need_no_back_end(backend):
    code = f"import sys, {', '.join(PLOTTING)}; assert 'matplotlib.pyplot' not in sys.modules"
    environment = {**os.environ, "MPLBACKEND": backend}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_plot_script_runs_under_the_back_end_of_a_notebook(tmp_path):
    flags = ["--dataset=digits", "--modes", "forg", f"--plots_folder={tmp_path}"]
    environment = {**os.environ, "MPLBACKEND": BACKENDS[0]}
    ran = subprocess.run(
        [sys.executable, str(ROOT / "plot_proxies.py"), *flags], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "proxies" / "digits" / "comparison.png").stat().st_size > 0
