"""Paths of all files. Folder and file names are defined only here."""

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
    """The folders that scripts read and write."""

    datasets_folder: Path = option(ROOT / "data", "folder for data sets and validation splits", Path, metavar="DIR")
    splits_folder: Path | None = option(
        None, "folder for validation splits (default: splits in --datasets_folder)", Path, metavar="DIR"
    )
    models_folder: Path = option(ROOT / "ckpts", "folder for checkpoints", Path, metavar="DIR")
    metrics_folder: Path = option(ROOT / "metrics", "folder for scores and recorded dynamics", Path, metavar="DIR")
    plots_folder: Path = option(ROOT / "plots", "folder for figures", Path, metavar="DIR")
    log_folder: Path = option(ROOT / "logs", "folder for log files", Path, metavar="DIR")
    resume_ckpts_folder: Path = option(ROOT / "resume_ckpts", "folder for resume states", Path, metavar="DIR")
    hessian_folder: Path = option(ROOT / "hessian_eigenvalues", "folder for Hessian spectra", Path, metavar="DIR")
    ntk_folder: Path = option(
        ROOT / "ntks", "folder for neural tangent kernels and their velocities", Path, metavar="DIR"
    )

    @property
    def splits(self) -> Path:
        """The folder of validation splits."""
        return self.splits_folder or self.datasets_folder / "splits"


TRAINING_FOLDERS = ("datasets_folder", "models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder")
"""The folders that every training script reads and writes."""


def standard_experiment(model: str, dataset: str, optimizer: str, lr_sched: str) -> str:
    """The name of a run on the full training set."""
    return f"standard_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}"


def split_experiment(model: str, dataset: str, optimizer: str, lr_sched: str, index: int | str) -> str:
    """The name of a run that holds out validation split ``index``."""
    return f"split_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_val_split_{index}"


def pretrain_experiment(dataset: str, model: str, key: str) -> str:
    """The name of a pretraining run; ``key`` is a hash of all its settings except the seed."""
    return f"pretrain/{dataset}/{model}/{key}"


def coreset_experiment(func: str, mode: str, share: float | str, model: str, dataset: str) -> str:
    """The name of a run on a subset of the training set; ``share`` is the fraction, or another size specification."""
    return f"{func}_static_coreset_{mode}_{share}_{model}_over_{dataset}"


def mpe_experiment(name: str, kind: str) -> str:
    """The name of the base run of a sensitivity experiment; ``kind`` is the same as for ``pickle_path``."""
    return f"mpe/{name}_{kind}"


def pickle_path(pickles_folder: str | Path, name: str, kind: str) -> Path:
    """A result of a sensitivity experiment; ``kind`` is a key of ``mpe.plots.SCRIPTS``."""
    return Path(pickles_folder) / f"{name}_{kind}.pkl"


def selection_path(models_folder: str | Path, experiment: str, seed: int) -> Path:
    """The selected indices and weights of a run on a subset of the training set."""
    return experiment_folder(models_folder, experiment, seed) / "selection.npz"


def comparison_stem(plots_folder: str | Path, dataset: str, model: str, name: str) -> Path:
    """A comparison of selection methods: table (csv, json, md) and figure (png, pdf), without the extension."""
    return Path(plots_folder) / "pruning" / f"{model}_over_{dataset}" / name


def evaluation_stem(plots_folder: str | Path, dataset: str, reference: str) -> Path:
    """Scores against a reference: table (csv, json, md) and figure (png, pdf), without the extension."""
    return Path(plots_folder) / "scores" / dataset / f"against_{reference}"


def lds_stem(plots_folder: str | Path, dataset: str) -> Path:
    """The table of linear datamodeling scores (csv, json, md), without the extension."""
    return Path(plots_folder) / "scores" / dataset / "lds"


def experiment_folder(models_folder: str | Path, experiment: str, seed: int | str) -> Path:
    """The folder of a run's checkpoints."""
    return Path(models_folder) / experiment / f"seed_{seed}"


def checkpoint_path(models_folder: str | Path, experiment: str, seed: int, which: int | str) -> Path:
    """A run's checkpoint; ``which`` is an epoch (from 1), ``"best"``, or ``"last"``."""
    return experiment_folder(models_folder, experiment, seed) / checkpoint_name(which)


def resume_folder(resume_ckpts_folder: str | Path, experiment: str, seed: int) -> Path:
    """The folder of a run's resume states."""
    return Path(resume_ckpts_folder) / experiment / f"seed_{seed}"


def checkpoint_name(which: int | str) -> str:
    """The file name of a checkpoint; ``which`` is an epoch (from 1), ``"best"``, or ``"last"``."""
    return f"epoch_{which}.pt" if isinstance(which, int) else f"{which}.pt"


def resume_name(epoch: int | str) -> str:
    """The file name of the resume state after an epoch, or the pattern for all epochs with ``"*"``."""
    return f"epoch={epoch}.pth.tar"


def weights_name(epoch: int | str) -> str:
    """The file name of the weights next to a resume state, or the pattern for all epochs with ``"*"``."""
    return f"weights_epoch={epoch}.pt"


def dynamics_row_name(epoch: int) -> str:
    """The file name of one epoch's recorded dynamics, next to the resume states."""
    return f"dynamics_epoch={epoch}.npz"


def splits_folder(splits_folder: str | Path, dataset: str, seed: int) -> Path:
    """The folder of the ten validation splits ``val_{1..10}.txt``."""
    return Path(splits_folder) / dataset / f"seed_{seed}"


def dynamics_folder(metrics_folder: str | Path, experiment: str, seed: int) -> Path:
    """The folder of a run's recorded dynamics and per-seed proxies."""
    return Path(metrics_folder) / experiment / f"seed_{seed}"


def members_folder(metrics_folder: str | Path, dataset: str, model: str, seed: int) -> Path:
    """The folder of what models trained on random subsets predict; see ``src.metrics.memorization``."""
    return Path(metrics_folder) / "memorization" / "members" / dataset / model / f"seed_{seed}"


def memorization_path(metrics_folder: str | Path, name: str) -> Path:
    """A file in the folder of memorization scores."""
    return Path(metrics_folder) / "memorization" / name


def report_path(plots_folder: str | Path, dataset: str) -> Path:
    """The page about a data set and its scores."""
    return Path(plots_folder) / "report" / f"{dataset}.html"


def label_issues_path(metrics_folder: str | Path, dataset: str) -> Path:
    """The table of label issues of a data set."""
    return Path(metrics_folder) / "label_errors" / dataset / "label_issues.csv"


def duplicates_stem(metrics_folder: str | Path, dataset: str) -> Path:
    """The table, record and figure of a data set's duplicates, without their suffixes."""
    return Path(metrics_folder) / "duplicates" / dataset / "duplicates"


def samis_path(metrics_folder: str | Path, dataset: str, model: str, seed: int, which: str) -> Path:
    """The SAMIS scores of one seed; ``which`` is ``"loss"`` or ``"prob"``."""
    return Path(metrics_folder) / dataset / model / str(seed) / f"nn_{which}_diff_score.npz"


def hessian_path(
    hessian_folder: str | Path, part: str, spec: str, experiment: str, norm: str, seed: int, which: str, mode: str
) -> Path:
    """The Hessian spectrum of one model.

    Args:
        hessian_folder: The folder of spectra.
        part: ``"train"`` or ``"test"``.
        spec: The subset of examples, such as ``mem:low:0.3``; ``"all"`` for all examples.
        experiment: The model's run.
        norm: ``"bn"`` for models with BatchNorm, ``"nobn"`` for others.
        seed: The run's seed.
        which: ``epoch_{e}`` or ``checkpoint_{hash of its content}``.
        mode: The method that computed the eigenvalues, see ``eigen_name``.
    """
    run = experiment.removeprefix("standard_").replace("/", "_")
    return Path(hessian_folder) / f"{part}_{spec}_{run}_{norm}" / str(seed) / which / f"pyhessian_eigen_{mode}.pkl"


def eigen_name(eigen_mode: str, operator: str) -> str:
    """The name of an eigenvalue method in file names; the operator is omitted if it is the Hessian."""
    return eigen_mode if operator == "hessian" else f"{eigen_mode}_{operator}"


def ntk_run(model: str, optimizer: str, lr_sched: str) -> str:
    """The name of a run in the paths of kernels."""
    return f"{model}_with_{optimizer}_sched_{lr_sched}"


def ntk_run_folder(folder: str | Path, dataset: str, run: str, metric: str) -> Path:
    """The kernels of one run, for all seeds and epochs, with groups ordered by one score."""
    return Path(folder) / dataset / run / metric


def ntk_folder(folder: str | Path, dataset: str, run: str, metric: str, epoch: int, seed: int) -> Path:
    """The kernels and velocities of one model."""
    return ntk_run_folder(folder, dataset, run, metric) / f"epoch_{epoch}" / f"seed_{seed}"


def spectrum_figure_stem(plots_folder: str | Path, dataset: str, name: str) -> Path:
    """Spectral densities of several runs (png, pdf) and their table (csv, md, json), without the extension."""
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
    """The name of a figure of spectra, built from the selected runs; the keyword arguments appear only if given.

    Args:
        model: The model.
        optimizers: The optimizers of the runs.
        part: ``"train"`` or ``"test"``.
        epoch: The epoch of the checkpoints.
        mode: See ``eigen_name``.
        specs: The subsets of examples.
        lr_sched: The learning rate schedule, if selected.
        seeds: The seeds, if selected.
    """
    chosen = [model, *optimizers, part, *([] if list(specs) == ["all"] else specs), f"epoch_{epoch}", mode]
    chosen += [] if lr_sched is None else [f"sched_{lr_sched}"]
    chosen += [] if seeds is None else ["seeds", *map(str, seeds)]
    return "_".join(chosen)


def velocity_figure_stem(
    plots_folder: str | Path, dataset: str, run: str, metrics: Sequence[str], logarithmic: bool
) -> Path:
    """The figure of a run's velocities, without the extension."""
    name = f"velocity_{run}_{'_'.join(metrics)}" + ("_log" if logarithmic else "")
    return Path(plots_folder) / "ntk" / dataset / name


def kernel_path(folder: str | Path, lower: int, size: int) -> Path:
    """The kernel of the ``size`` examples starting at rank ``lower``; ``folder`` is ``ntk_folder``."""
    return Path(folder) / f"l_index_{lower}" / f"m_{size}" / "k.pkl"


def velocity_path(folder: str | Path) -> Path:
    """The velocities of all groups; ``folder`` is ``ntk_folder``."""
    return Path(folder) / "vs.pkl"
