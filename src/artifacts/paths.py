"""Where every file is: the one place that knows folder and file names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.cli import option

ROOT = Path(__file__).resolve().parents[2]
PACKAGED_SCORES = ROOT / "src" / "metrics"
PICKLES = ROOT / "examples" / "pickles"
PICKLE_PLOTS = ROOT / "examples" / "plots"

LOCK_NAME = "claim.lock"


@dataclass(frozen=True)
class Folders:
    """Where scripts read and write."""

    datasets_folder: Path = option(ROOT / "data", "folder of data sets and validation splits", Path, metavar="DIR")
    splits_folder: Path | None = option(
        None, "folder of validation splits (default: splits in the folder of data sets)", Path, metavar="DIR"
    )
    models_folder: Path = option(ROOT / "ckpts", "folder of checkpoints", Path, metavar="DIR")
    metrics_folder: Path = option(ROOT / "metrics", "folder of scores and recorded dynamics", Path, metavar="DIR")
    plots_folder: Path = option(ROOT / "plots", "folder of figures", Path, metavar="DIR")
    log_folder: Path = option(ROOT / "logs", "folder of logs", Path, metavar="DIR")
    resume_ckpts_folder: Path = option(ROOT / "resume_ckpts", "folder of resume states", Path, metavar="DIR")
    hessian_folder: Path = option(ROOT / "hessian_eigenvalues", "folder of spectra of Hessians", Path, metavar="DIR")
    ntk_folder: Path = option(
        ROOT / "ntks", "folder of neural tangent kernels and their velocities", Path, metavar="DIR"
    )

    @property
    def splits(self) -> Path:
        """The folder of validation splits."""
        return self.splits_folder or self.datasets_folder / "splits"


TRAINING_FOLDERS = ("datasets_folder", "models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder")
"""Those that every training script reads and writes."""


def standard_experiment(model: str, dataset: str, optimizer: str, lr_sched: str) -> str:
    """The name of a run on the full training set."""
    return f"standard_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}"


def split_experiment(model: str, dataset: str, optimizer: str, lr_sched: str, index: int | str) -> str:
    """The name of a run that leaves validation split ``index`` out."""
    return f"split_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_val_split_{index}"


def pretrain_experiment(dataset: str, model: str, key: str) -> str:
    """The name of a pre-training run, in which ``key`` stands for all its settings but the seed."""
    return f"pretrain/{dataset}/{model}/{key}"


def coreset_experiment(func: str, mode: str, share: float | str, model: str, dataset: str) -> str:
    """The name of a run on a chosen part of the training set; ``share`` is the fraction, or what says how much."""
    return f"{func}_static_coreset_{mode}_{share}_{model}_over_{dataset}"


def mpe_experiment(name: str, kind: str) -> str:
    """The name of the base run of a sensitivity experiment; ``kind`` is that of its pickle."""
    return f"mpe/{name}_{kind}"


def pickle_path(pickles_folder: str | Path, name: str, kind: str) -> Path:
    """A result of a sensitivity experiment; ``kind`` is iter, cv, scores, retrain, evolving or leaveclassout."""
    return Path(pickles_folder) / f"{name}_{kind}.pkl"


def selection_path(models_folder: str | Path, experiment: str, seed: int) -> Path:
    """The chosen indices and weights of a run on a part of the training set."""
    return experiment_folder(models_folder, experiment, seed) / "selection.npz"


def comparison_stem(plots_folder: str | Path, dataset: str, model: str, name: str) -> Path:
    """A comparison of selection methods: its table (csv, json, md) and figure (png, pdf), without the ending."""
    return Path(plots_folder) / "pruning" / f"{model}_over_{dataset}" / name


def experiment_folder(models_folder: str | Path, experiment: str, seed: int | str) -> Path:
    """The folder of a run's checkpoints."""
    return Path(models_folder) / experiment / f"seed_{seed}"


def checkpoint_path(models_folder: str | Path, experiment: str, seed: int, which: int | str) -> Path:
    """A run's checkpoint: of an epoch (a number from 1), ``"best"`` or ``"last"``."""
    return experiment_folder(models_folder, experiment, seed) / checkpoint_name(which)


def resume_folder(resume_ckpts_folder: str | Path, experiment: str, seed: int) -> Path:
    """The folder of a run's resume states."""
    return Path(resume_ckpts_folder) / experiment / f"seed_{seed}"


def checkpoint_name(which: int | str) -> str:
    """The file of a checkpoint: of an epoch (a number from 1), ``"best"`` or ``"last"``."""
    return f"epoch_{which}.pt" if isinstance(which, int) else f"{which}.pt"


def resume_name(epoch: int | str) -> str:
    """The file of the resume state after an epoch, or the pattern of all with ``"*"``."""
    return f"epoch={epoch}.pth.tar"


def weights_name(epoch: int | str) -> str:
    """The file of the weights that a resume state refers to, beside it, or the pattern of all with ``"*"``."""
    return f"weights_epoch={epoch}.pt"


def dynamics_row_name(epoch: int) -> str:
    """The file of one epoch's recorded dynamics, beside the resume states."""
    return f"dynamics_epoch={epoch}.npz"


def splits_folder(splits_folder: str | Path, dataset: str, seed: int) -> Path:
    """The folder of the ten validation splits ``val_{1..10}.txt``."""
    return Path(splits_folder) / dataset / f"seed_{seed}"


def dynamics_folder(metrics_folder: str | Path, experiment: str, seed: int) -> Path:
    """The folder of a run's recorded dynamics and per-seed proxies."""
    return Path(metrics_folder) / experiment / f"seed_{seed}"


def samis_path(metrics_folder: str | Path, dataset: str, model: str, seed: int, which: str) -> Path:
    """The SAMIS scores of one seed; ``which`` is ``"loss"`` or ``"prob"``."""
    return Path(metrics_folder) / dataset / model / str(seed) / f"nn_{which}_diff_score.npz"


def hessian_path(
    hessian_folder: str | Path, part: str, spec: str, experiment: str, norm: str, seed: int, which: str, mode: str
) -> Path:
    """The spectrum of the loss of one model.

    Args:
        hessian_folder: Where spectra are kept.
        part: ``"train"`` or ``"test"``.
        spec: Which of its examples, such as ``mem:low:0.3``; ``"all"`` for all of them.
        experiment: The model's run.
        norm: ``"bn"`` for models with BatchNorm, ``"nobn"`` for others.
        seed: The run's seed.
        which: ``epoch_{e}``, or ``checkpoint_{digits of its content}``.
        mode: How the eigenvalues were found, see ``eigen_name``.
    """
    run = experiment.removeprefix("standard_").replace("/", "_")
    return Path(hessian_folder) / f"{part}_{spec}_{run}_{norm}" / str(seed) / which / f"pyhessian_eigen_{mode}.pkl"


def eigen_name(eigen_mode: str, operator: str) -> str:
    """What file names call a way to measure a spectrum; the Hessian's is not named."""
    return eigen_mode if operator == "hessian" else f"{eigen_mode}_{operator}"


def ntk_run(model: str, optimizer: str, lr_sched: str) -> str:
    """What paths of kernels call a run."""
    return f"{model}_with_{optimizer}_sched_{lr_sched}"


def ntk_run_folder(folder: str | Path, dataset: str, run: str, metric: str) -> Path:
    """The kernels of one run, of all its seeds and epochs, for groups in the order of one score."""
    return Path(folder) / dataset / run / metric


def ntk_folder(folder: str | Path, dataset: str, run: str, metric: str, epoch: int, seed: int) -> Path:
    """The kernels of one model, and its velocities."""
    return ntk_run_folder(folder, dataset, run, metric) / f"epoch_{epoch}" / f"seed_{seed}"


def spectrum_figure_stem(plots_folder: str | Path, dataset: str, name: str) -> Path:
    """Spectral densities of several runs (png, pdf) and their table (csv, md, json), without the ending."""
    return Path(plots_folder) / "hessian" / dataset / name


def spectrum_figure_name(
    model: str,
    optimizers: Sequence[str],
    part: str,
    epoch: int | str,
    mode: str,
    *,
    specs: Sequence[str] = ("all",),
    lr_sched: str | None = None,
    seeds: Sequence[int] | None = None,
) -> str:
    """What a figure of spectra is called: all that was chosen; the last three where they are not the default.

    Args:
        model: The model.
        optimizers: The optimizers of the runs.
        part: ``"train"`` or ``"test"``.
        epoch: The epoch of the checkpoints.
        mode: See ``eigen_name``.
        specs: The parts of the examples.
        lr_sched: The schedule, where one was chosen.
        seeds: The seeds, where some were chosen.
    """
    chosen = [model, *optimizers, part, *([] if list(specs) == ["all"] else specs), f"epoch_{epoch}", mode]
    chosen += [] if lr_sched is None else [f"sched_{lr_sched}"]
    chosen += [] if seeds is None else ["seeds", *map(str, seeds)]
    return "_".join(chosen)


def velocity_figure_stem(
    plots_folder: str | Path, dataset: str, run: str, metrics: Sequence[str], logarithmic: bool
) -> Path:
    """The figure of a run's velocities, without the ending."""
    name = f"velocity_{run}_{'_'.join(metrics)}" + ("_log" if logarithmic else "")
    return Path(plots_folder) / "ntk" / dataset / name


def kernel_path(folder: str | Path, lower: int, size: int) -> Path:
    """The kernel of the ``size`` examples from rank ``lower`` on, below ``ntk_folder``."""
    return Path(folder) / f"l_index_{lower}" / f"m_{size}" / "k.pkl"


def velocity_path(folder: str | Path) -> Path:
    """The velocities of all groups, below ``ntk_folder``."""
    return Path(folder) / "vs.pkl"
