"""The commands in examples/README.md run as written, except on a few images and for one epoch."""

import re
import shlex

import pytest
from support import ROOT, folders, succeed, write_blobs

TEXT = (ROOT / "examples" / "README.md").read_text()
LINES = "".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)).splitlines()
COMMANDS = [shlex.split(line, comments=True)[1:] for line in LINES if line.startswith("python ")]
RUNS = [command for command in COMMANDS if not command[0].startswith("plot_")]
PLOTS = [command for command in COMMANDS if command[0].startswith("plot_")]
SHORT = {
    "1_loo_iterations.py": ["--epochs=1"],
    "2_loo_l2reg.py": ["--epochs=1", "--n_exp=4"],
    "3_validation_sensitivities.py": ["--epochs=1", "--epochs_retrain=1", "--n_retrain=2"],
    "4_evolving_sensitivities.py": ["--epochs=1"],
    "5_loco.py": ["--epochs=1", "--epochs_retrain=1"],
    "6_group_removal.py": ["--epochs=1", "--epochs_retrain=1", "--n_groups=1", "--group_size=1", "--subset=10"],
    "7_von_logistic.py": ["--updates=2", "--subset=10", "--bs=10"],
}
KINDS = {"1": "iter", "2": "cv", "3": "retrain", "4": "evolving", "5": "leaveclassout", "6": "group", "7": "von"}
DRAWN = {
    "plot_loo_iterations.py": "iter", "plot_loo_l2reg.py": "cv", "plot_validation_sensitivities.py": "retrain",
    "plot_evolving_sensitivities.py": "evolving", "plot_loco.py": "leaveclassout",
    "plot_group_removal.py": "group", "plot_von_logistic.py": "von",
}  # fmt: skip
FIGURES = (
    "1b",
    "2a",
    "2b",
    "2c",
    "3a",
    "3b",
    "4a",
    "4b",
    "4c",
    "5",
    "6",
    "7",
    "8",
    "9",
    "10",
    "11a",
    "11b",
    "11c",
    "11d",
)


def name_of(command):
    return command[command.index("--name_exp") + 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets with the papers' names and shapes, with twelve images each."""
    base = tmp_path_factory.mktemp("papers")
    for name, channels, size in (("mnist", 1, 28), ("fmnist", 1, 28), ("cifar10", 3, 32)):
        (base / "datasets").mkdir(exist_ok=True)
        write_blobs(base / "datasets" / f"{name}.npz", n=12, classes=10, size=size, channels=channels)
    return base


def kind_of(command):
    """The kind of a command: commands of one kind differ only in numbers and in data of the same shape."""
    flags = dict(zip(command[1::2], command[2::2], strict=False))
    return (command[0], *(flags.get(name) for name in ("--model", "--optimizer", "--var_version")), *sorted(flags))


ONE_OF_EACH_KIND = list({kind_of(command): command for command in RUNS}.values())


@pytest.mark.parametrize("command", ONE_OF_EACH_KIND, ids=lambda command: f"{command[0][0]} {name_of(command)}")
def test_a_command(data, tmp_path, command):
    script, *flags = command
    own = folders(tmp_path, "models", "log", "resume_ckpts", "pickles")
    succeed(f"examples/{script}", *flags, *SHORT[script], *folders(data, "datasets"), *own)
    kind = KINDS[script[0]]
    assert (tmp_path / "pickles" / f"{name_of(command)}_{kind}.pkl").exists()
    plots = f"--plots_folder={tmp_path / 'plots'}"
    for plot, *flags in PLOTS:  # the figures that the page draws from it
        if DRAWN[plot] == kind and "--names_exp" not in flags and name_of([plot, *flags]) == name_of(command):
            succeed(f"examples/{plot}", *flags, plots, *folders(tmp_path, "pickles"))
            assert list((tmp_path / "plots").glob("*.png"))


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_that_the_scripts_can_make_has_its_command(figure):
    assert re.search(rf"# Figure {figure}\b", TEXT)
