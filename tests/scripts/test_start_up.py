"""Help and flag errors import no large packages, which takes seconds; runs import only those they need."""

import json
import subprocess
import sys

from support import ROOT, TRAIN, folders

SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "examples") for path in folder.glob("*.py"))
LARGE = ["torch", "torchvision", "matplotlib", "scipy", "sklearn", "pandas", "PIL"]

# Runs all command lines in one process in which the large packages cannot be imported.
ANSWER = """
import contextlib, io, json, runpy, sys, traceback

absent, *lines = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
for line in lines:
    sys.argv = line
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(line[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = -1
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def answers(*lines: list[str], absent: list[str] = LARGE) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr for each command line (script and flags), without the ``absent`` packages."""
    words = [json.dumps(word) for word in (absent, *([str(ROOT / script), *flags] for script, *flags in lines))]
    ran = subprocess.run([sys.executable, "-c", ANSWER, *words], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def test_help_and_unknown_flags_import_no_large_package():
    helped = answers(*([script, "--help"] for script in SCRIPTS))
    for script, (status, out, err) in zip(SCRIPTS, helped, strict=True):
        assert (status, err) == (0, ""), script
        assert "--" in out
    unknown = answers(*([script, "--no_such_flag=1"] for script in SCRIPTS))
    for script, (status, _, err) in zip(SCRIPTS, unknown, strict=True):
        assert status == 2, script
        assert len(err.splitlines()) == 1, err


# Command lines of each script that are wrong whatever the files contain.
WRONG = {
    "train_full.py": [
        "--dataset=nothing",
        "--model=nothing",
        "--optimizer=nothing",
        "--lr_sched=nothing",
        "--precision=fp8",
        "--device=nothing",
        "--epochs=0",
        "--dataset=digits --model=lenet --save_epochs=1,7 --epochs=6",
        "--dataset=digits --model=lenet --lr_min=1 --learning_rate=0.1",
        "--dataset=digits --model=lenet --image_size=9",
        "--dataset=digits --model=lenet --channels=3",
        "--dataset=digits --model=lenet --pretrained",
        "--dataset=digits --model=lenet --cutout_holes=1",
        "--dataset=npz:",
        "--dataset=hf:",
        "--dataset=digits --test_fraction=0.3",
        "--dataset=folder:photos --test_fraction=1",
        "--dataset=folder:photos --test_seed=-1",
    ],
    "train_split.py": [
        "--samis_validation_split_index=11",
        "--dataset=digits --model=lenet --save_epochs=7 --epochs=6",
    ],
    "train_prune.py": [
        "--dataset=digits --model=lenet --coreset_func=nothing",
        "--dataset=digits --model=lenet --coreset_func=random --coreset_fraction=2",
        "--dataset=digits --model=lenet --coreset_func=random --save_epochs=7 --coreset_epochs=6",
        "--dataset=digits --model=lenet --shots=1 --coreset_func=infobatch_dynamic",
        "--dataset=digits --model=lenet --optimizer=iblr --coreset_func=infobatch_dynamic",
    ],
    "select_coreset.py": [
        "--dataset=digits --model=lenet --coreset_func=infobatch_dynamic",
        "--dataset=digits --model=lenet --coreset_func=random --channels=3",
        "--dataset=digits --model=lenet --coreset_func=random --out=x.csv",
    ],
    "compare_pruning.py": [
        "--dataset=digits --model=lenet --funcs random nothing --fractions=0.1",
        "--dataset=digits --model=lenet --shots=1 --funcs random infobatch_dynamic",
    ],
    "compute_sam_sgd.py": [
        "--protocol=nothing",
        "--dataset=digits --image_size=9",
    ],
    "compute_memorization.py": [
        "--members=5-3",
        "--members=3 --complementary",
        "--complementary --fraction=0.6",
        "--folds=5 --members=12",
        "--from_splits 1 1",
        "--from_splits 1 --learning_rate=0.1",
        "--from_splits 1 --init=x",
        "--splits_folder=x",
        "--merge x --target_se=0.1",
    ],
    "audit_labels.py": [
        "--dataset=digits --top=0",
        "--dataset=digits --combine nothing",
    ],
    "average_scores.py": [
        "--dataset=digits --seeds 1 1",
        "--seeds=1 --modes nothing",
    ],
    "evaluate_scores.py": [
        "--reference=nothing",
        "--resamples=1",
    ],
    "fetch_scores.py": [
        "--base_url=nothing",
        "--dataset=nothing",
        "--modes nothing",
    ],
    "find_duplicates.py": [
        "--dataset=digits --pixel_similarity=2",
        "--dataset=digits --feature_similarity=0.9",
    ],
    "make_report.py": [
        "--dataset=digits --modes nothing",
        "--dataset=digits --examples=1",
        "--dataset=digits --pickles_folder=x",
    ],
    "register_score.py": [
        "x.npy --dataset=digits --high=typical --mode=csl",
        "x.npy --dataset=digits --high=typical --mode=my-score",
    ],
    "compute_hessian_eigen.py": [
        "--operator=nothing",
        "--basis=nothing",
        "--high_low_spec=mem:middle:0.3",
        "--eigen_split=test --subset=10",
    ],
    "compute_ntk.py": [
        "--ntk_chosen_metric=nothing",
        "--ntk_classes=nothing",
        "--precision=bf16",
    ],
    "plot_hessian.py": [
        "--optimizers=nothing",
        "--high_low_specs=nothing",
        "--labels one two",
    ],
    "plot_images.py": [
        "--modes=nothing",
    ],
    "plot_ntk.py": [
        "--metrics=nothing",
    ],
    "plot_proxies.py": [
        "--modes=nothing",
        "--plot=nothing",
    ],
    "examples/1_loo_iterations.py": [
        "--lrmin=1 --lr=0.1",
        "--optim_var --optimizer=sgd",
    ],
    "examples/2_loo_l2reg.py": [
        "--deltas_stop=0 --deltas_start=1",
        "--finite_time --optimizer=adam",
        "--compile",
        "--precision=bf16",
    ],
    "examples/3_validation_sensitivities.py": [
        "--retrain_shuffle=nothing",
        "--finite_time --laplace_backend=laplace-torch",
        "--precision=bf16",
    ],
    "examples/4_evolving_sensitivities.py": [
        "--lrmin=1 --lr=0.1",
        "--class_cov=nothing",
    ],
    "examples/5_loco.py": [
        "--lrmin_retrain=1 --lr_retrain=0.1",
        "--base_shuffle=nothing",
    ],
    "examples/6_group_removal.py": [
        "--classes 3",
        "--retrain_shuffle=replay",
        "--class_cov=full",
    ],
    "examples/7_von_logistic.py": [
        "--checkpoints 5 126",
        "--lr_precision=2",
        "--compile",
        "--epochs=3",
    ],
    "examples/plot_evolving_sensitivities.py": [
        "--class_cov=nothing",
    ],
    "examples/plot_group_removal.py": [
        "--forms full nothing",
    ],
    "examples/plot_loco.py": [
        "--labels one --names_exp a b",
    ],
    "examples/plot_loo_iterations.py": [
        "--name_exp=a/b",
    ],
    "examples/plot_loo_l2reg.py": [
        "--window=0",
    ],
    "examples/plot_validation_sensitivities.py": [
        "--class_cov=nothing",
    ],
    "examples/plot_von_logistic.py": [
        "--class_cov=nothing",
    ],
}


def test_flags_that_are_wrong_whatever_the_files_hold_import_no_large_package():
    assert sorted(WRONG) == SCRIPTS
    lines = [[script, *line.split()] for script in SCRIPTS for line in WRONG[script]]
    wrong = []
    for line, (status, out, err) in zip(lines, answers(*lines), strict=True):
        named = any(word.split("=")[0] in err for word in line if word.startswith("--"))
        if (status, out, len(err.splitlines()), named) != (2, "", 1, True):
            wrong.append(f"{' '.join(line)}: {status} {err.splitlines()[-1:]}")
    assert not wrong, "\n".join(wrong)


def test_runs_on_the_digits_import_no_package_that_they_do_not_need(tmp_path):
    """Torch's compiler alone takes as long to import as torch, and torch's optimizers import it."""
    data = ["--dataset=digits", "--subset=50"]
    lenet = [*data, "--model=lenet"]
    full = ["train_full.py", *lenet, "--epochs=1", "--measure_proxies", *folders(tmp_path, *TRAIN)]
    selected = [*lenet, "--coreset_func=random", "--coreset_fraction=0.5", "--coreset_epochs=1"]
    scored = ["--epochs=1", "--protocol=full", *folders(tmp_path, "datasets", "models", "metrics")]
    estimated = [*data, "--model=small_mlp", "--epochs=1", "--bs=32", *folders(tmp_path, *TRAIN, "pickles")]
    runs = [
        *([*full, f"--optimizer={name}"] for name in ("sgd", "sam", "adamw", "iblr")),
        [*full, "--optimizer=sgd", "--epochs=2", "--resume", "--lr_sched=const"],
        ["train_prune.py", *selected, *folders(tmp_path, *TRAIN)],
        ["examples/1_loo_iterations.py", *estimated, "--optimizer=adam"],
    ]
    absent = [*(name for name in LARGE if name != "torch"), "torch._dynamo"]
    found = answers(*runs, absent=absent)
    runs.append(["compute_sam_sgd.py", *lenet, *scored])  # scipy.special gives p-values against memorization
    found += answers(runs[-1], absent=[*(name for name in absent if name != "scipy"), "scipy.stats"])
    for run, (status, out, err) in zip(runs, found, strict=True):
        assert status == 0, f"{run}: {err}"
        assert out


STEPS = """
import sys, torch
from src.devices import leave_compiler_out

def trained(kind, **settings):
    torch.manual_seed(0)
    model, images = torch.nn.Linear(5, 3), torch.randn(4, 5)
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.01, **settings)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
        loss = optimizer.step(lambda: model(images).sum())
        assert loss.requires_grad and torch.is_grad_enabled() and model.weight.is_leaf
    twin = kind(model.parameters(), lr=1.0)
    twin.load_state_dict(optimizer.state_dict())
    return [*model.parameters(), *(x for state in twin.state.values() for x in state.values() if x is not None)]

cases = (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (torch.optim.Adam, {}), (torch.optim.AdamW, {})
if sys.argv[1] == "torch":
    expected = [trained(kind, **settings) for kind, settings in cases]
    assert "torch._dynamo" in sys.modules
    torch.save(expected, sys.argv[2])
else:
    leave_compiler_out()
    leave_compiler_out()
    for (kind, settings), expected in zip(cases, torch.load(sys.argv[2]), strict=True):
        assert all(map(torch.equal, trained(kind, **settings), expected)), kind
    assert "torch._dynamo" not in sys.modules
"""


def test_optimizers_step_as_torch_s_without_the_compiler(tmp_path):
    for whose in ("torch", "ours"):
        command = [sys.executable, "-c", STEPS, whose, str(tmp_path / "expected.pt")]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr


PLOTTING = ["mpe.plots", "src.coresets.plots", "src.curvature.plots", "src.metrics.plots"]

# Backends that notebooks set for their child processes: a module that may be missing, a name that may be unknown.
BACKENDS = ["module://matplotlib_inline.backend_inline", "widget"]
DRAW = f"""
import os, runpy, sys, torch, scipy.stats

*backends, script = sys.argv[1].split()
for backend in backends:
    os.environ["MPLBACKEND"] = backend
    child = os.fork()
    if not child:
        import {", ".join(PLOTTING)}
        os._exit("matplotlib.pyplot" in sys.modules)
    if os.waitpid(child, 0)[1]:
        sys.exit(backend)
os.environ["MPLBACKEND"] = backends[0]
sys.argv[:2] = [script]
runpy.run_path(script, run_name="__main__")
"""


def test_figures_need_no_back_end(tmp_path):
    """Plotting modules can be imported with any backend name, and a script can plot with a notebook's backend."""
    words = [
        " ".join([*BACKENDS, "plot_proxies.py"]),
        "--dataset=digits",
        "--modes=forg",
        f"--plots_folder={tmp_path}",
    ]
    ran = subprocess.run([sys.executable, "-c", DRAW, *words], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    assert (tmp_path / "proxies" / "digits" / "comparison.png").stat().st_size > 0
