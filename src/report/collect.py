"""Read everything that the page shows: a data set, its stored scores, and whatever other results exist for it.

Nothing is computed here that another script stores. A result that does not exist is None or empty, and the page
leaves out its section. Shapes: n training examples, C classes, E epochs.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.artifacts.io import label_hash, read_csv, read_json, read_npz
from src.artifacts.paths import (
    PICKLES,
    Folders,
    duplicates_stem,
    label_issues_path,
    memorization_path,
    mpe_experiment,
    pickle_path,
)
from src.artifacts.store import check_consistent, check_same_data, checked_array, parse_settings
from src.cli import check_options, number, option
from src.datasets import DataConfig
from src.errors import ArgumentError, FileError
from src.metrics.compare import mean_known
from src.metrics.duplicates import COLUMNS
from src.metrics.evaluation import find_scores, planted_mask
from src.metrics.label_errors import read_probabilities
from src.metrics.proxy import Proxy
from src.metrics.registry import SCORES, SENSITIVITY, score_entry, score_name

if TYPE_CHECKING:
    from src.curvature.results import StoredSpectrum, Velocities
    from src.datasets import ImageSet
    from src.metrics.score import Score

log = logging.getLogger(__name__)

_FIRST = ("mem", "samis_loss", "samis_prob", "aum", "csl", "mpe")  # scores with few ties, most relevant first

CURVE_EPOCHS = 12
"""The largest number of epochs of an example's learning curve."""


@dataclass(frozen=True)
class ReportConfig:
    """What the page shows.

    Attributes:
        modes: The scores; None for all that exist.
        run: A folder ``METRICS/EXPERIMENT`` with recorded dynamics; None for a run in the metrics folder.
        selection: A selection of training examples; None for none.
        planted: A file that says which labels are wrong; None if that is not known.
        name_exp: A sensitivity experiment in ``pickles_folder``; None for none.
        pickles_folder: The folder of sensitivity experiments.
        out: The page; None for ``{plots_folder}/report/{dataset}.html``.
        anonymize: Whether to leave out file names.
        examples: The largest number of examples on the page.
        overwrite: Whether to replace a file that is not such a page.
    """

    modes: Sequence[str] | None = option(
        None,
        f"scores to show: {', '.join(SCORES)}, or registered ones; the gallery starts with the first (default: all "
        "that exist)",
        score_name,
        nargs="+",
        metavar="MODE",
    )
    run: Path | None = option(
        None,
        "run whose learning curves are shown: its folder in --metrics_folder, written with --measure_proxies "
        "(default: a run on all training examples, if there is one)",
        Path,
        metavar="METRICS/EXPERIMENT",
    )
    selection: Path | None = option(
        None, "selection of select_coreset.py or train_prune.py to show (default: none)", Path, metavar="FILE"
    )
    planted: Path | None = option(
        None,
        "planted label noise to compare with, as for evaluate_scores.py (default: none)",
        Path,
        metavar="FILE",
    )
    name_exp: str | None = option(
        None, "sensitivity experiment of the scripts in examples/ to show (default: none)", metavar="NAME"
    )
    pickles_folder: Path = option(
        PICKLES,
        "folder of sensitivity experiments",
        Path,
        metavar="DIR",
        acts=(lambda args: args.name_exp is not None, "without --name_exp"),
    )
    out: Path | None = option(
        None, "the page (default: report/{dataset}.html in --plots_folder)", Path, metavar="FILE"
    )
    anonymize: bool = option(False, "leave out the names of files")
    examples: int = option(
        60_000,
        "largest number of examples on the page; of a larger data set, it has the extremes of each class and a "
        "uniform sample, and a csv.gz file with all examples is written beside it",
        number(int, 100, 100_000),
        metavar="N",
    )
    overwrite: bool = option(False, "replace --out even if it is not such a page")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class Dynamics:
    """The recorded dynamics of a run, averaged over its seeds.

    Attributes:
        name: The run's name.
        seeds: The seeds.
        settings: The settings of the first seed.
        results: The content of the ``results.json`` of each seed that has one.
        loss: Mean loss of each class and epoch ``(E, C)``.
        accuracy: Training accuracy of each class and epoch ``(E, C)``.
        test_loss: Mean test loss of each class and epoch ``(E, C)``; NaN if it was not recorded.
        margin: Mean margin over all epochs ``(n,)``.
        probability: Mean probability of the label over the second half of the epochs ``(n,)``.
        correct: Whether most seeds classify the example correctly in the last epoch, 1 or 0, or NaN ``(n,)``.
        epochs: The epochs of the curves, from 1 ``(k,)``.
        losses: Loss of each example at these epochs ``(k, n)``.
        probabilities: Probability of its label at these epochs ``(k, n)``.
    """

    name: str
    seeds: list[int]
    settings: Mapping[str, Any]
    results: list[dict[str, Any]]
    loss: np.ndarray
    accuracy: np.ndarray
    test_loss: np.ndarray
    margin: np.ndarray
    probability: np.ndarray
    correct: np.ndarray
    epochs: np.ndarray
    losses: np.ndarray
    probabilities: np.ndarray


@dataclass
class Sensitivity:
    """A sensitivity experiment.

    Attributes:
        name: Its name.
        settings: Its flags.
        epochs: The epochs of the leave-one-out estimates ``(k,)``; empty without such a file.
        estimates: The estimates ``(k,)``.
        test_nlls: The test loss after each epoch ``(E,)``.
        retrained: The original indices of examples without which a model was retrained ``(m,)``.
        estimated: Their estimated sensitivities ``(m,)``.
        deviations: The deviations after retraining ``(m,)``.
    """

    name: str
    settings: Mapping[str, Any]
    epochs: np.ndarray = field(default_factory=lambda: np.empty(0))
    estimates: np.ndarray = field(default_factory=lambda: np.empty(0))
    test_nlls: np.ndarray = field(default_factory=lambda: np.empty(0))
    retrained: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    estimated: np.ndarray = field(default_factory=lambda: np.empty(0))
    deviations: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class Contents:
    """What the page is made of.

    Attributes:
        train: The training set.
        test: The test set.
        labels: int64 ``(n,)``.
        scores: The values of each score ``(n,)``, NaN for examples without a score.
        entries: The registry's entry of each score.
        records: How each score was made.
        dynamics: The recorded dynamics, or None.
        runs: The content of the ``results.json`` of each run on this data set, by ``{experiment}/seed_{s}``.
        probabilities: Out-of-sample class probabilities ``(n, C)``, or None.
        fitted: Class probabilities by the model of the sensitivity experiment, which was trained on the example, or
            None.
        issues: The columns that ``audit_labels.py --cleanlab`` added for an example, by index.
        audit: The record of the audit; empty if there is none.
        duplicates: The rows of the table of duplicates, or None.
        kept: The weight of each selected example, 0 for those left out ``(n,)``; None without a selection.
        selection: The settings of the selection.
        planted: Which labels are wrong ``(n,)``, or None.
        sensitivity: The sensitivity experiment, or None.
        spectra: Hessian spectra of models trained on this data set, by name.
        velocities: Kernel velocities of models trained on this data set, by name.
    """

    train: ImageSet
    test: ImageSet
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    entries: dict[str, Score]
    records: dict[str, dict[str, Any]]
    dynamics: Dynamics | None = None
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    probabilities: np.ndarray | None = None
    fitted: np.ndarray | None = None
    issues: dict[int, dict[str, str]] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    duplicates: list[dict[str, str]] | None = None
    kept: np.ndarray | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    planted: np.ndarray | None = None
    sensitivity: Sensitivity | None = None
    spectra: dict[str, StoredSpectrum] = field(default_factory=dict)
    velocities: dict[str, list[Velocities]] = field(default_factory=dict)

    @property
    def used(self) -> np.ndarray:
        """The indices of the training examples, without those drawn for testing, ascending ``(m,)``."""
        everyone = np.arange(len(self.labels))
        return everyone if self.train.drawn is None else np.setdiff1d(everyone, self.train.drawn)

    @property
    def predictions(self) -> np.ndarray | None:
        """The class probabilities that predictions come from, out-of-sample ones if there are any ``(n, C)``."""
        return self.fitted if self.probabilities is None else self.probabilities

    @property
    def predictor(self) -> str:
        """A phrase for the models that make the predictions."""
        if self.probabilities is not None:
            return "models that were not trained on the example"
        return "the model, which was trained on the example"

    @property
    def class_names(self) -> Sequence[str]:
        """One name per class."""
        return self.train.class_names

    @property
    def files(self) -> Sequence[str] | None:
        """The file of each example; None if the images do not come from single files."""
        return self.train.files


def collect(
    data: DataConfig, scores_folder: Sequence[str], metrics_folder: Path, folders: Folders, config: ReportConfig
) -> Contents:
    """Read the data set and all results that exist for it.

    Args:
        data: The data set.
        scores_folder: Where to search for scores; see :func:`src.metrics.proxy.score_folders`.
        metrics_folder: The folder of scores, dynamics, audits and duplicates.
        folders: The other folders.
        config: What to show.

    Raises:
        FileError: A requested file is missing, a file is damaged or belongs to other data, or there are no scores.
    """
    selected = (config.modes, scores_folder, metrics_folder)
    if ":" not in data.dataset and config.name_exp is None:
        find_scores(data.dataset, *selected)  # fails before anything is downloaded
    train, test = data.load(folders.datasets_folder)
    name, labels = train.entry.name, train.labels.cpu().numpy()
    checks: dict[str, Any] = {"n": train.total, "label_hash": label_hash(labels), "data_hash": train.digest}
    found = Contents(train, test, labels, {}, {}, {})
    if config.name_exp is not None:
        _read_sensitivities(found, config)
    try:
        proxies = {
            mode: Proxy(mode, name, normalize=False, folder=places, **checks)
            for mode, places in find_scores(name, *selected).items()
        }
    except FileError:
        if config.modes is not None or not found.scores:
            raise
        proxies = {}
    found.scores = {mode: proxy.scores for mode, proxy in proxies.items()} | found.scores
    if config.modes is None:
        found.scores = dict(
            sorted(found.scores.items(), key=lambda item: _FIRST.index(item[0]) if item[0] in _FIRST else 9)
        )
    found.entries = {mode: score_entry(mode) for mode in found.scores}
    found.records |= {mode: proxy.record for mode, proxy in proxies.items()}

    found.dynamics = _find_dynamics(config.run, metrics_folder, folders.models_folder, name, checks)
    patterns = [f"*_over_{glob.escape(name)}", f"*_over_{glob.escape(name)}_with_*"]
    patterns += [] if config.name_exp is None else [mpe_experiment(glob.escape(config.name_exp), "*")]
    for pattern in patterns:
        for path in sorted(folders.models_folder.glob(f"{pattern}/seed_*/results.json")):
            found.runs[f"{path.parts[-3]}/{path.parts[-2]}"] = _read_results(path)
    path = memorization_path(metrics_folder, f"out_of_sample_{name}.npz")
    if path.exists():
        found.probabilities = read_probabilities(path, train.total, train.entry.num_classes, checks["label_hash"])
    path = label_issues_path(metrics_folder, name)
    if path.exists():
        found.audit = _read_audit(path.with_suffix(".json"), checks)
        found.issues = {
            int(row["index"]): row for row in _read_table(path, ("index", "suggested label"), train.total)
        }
    path = duplicates_stem(metrics_folder, name).with_suffix(".csv")
    if path.exists():
        _read_facts(path.with_suffix(".json"), checks)
        found.duplicates = _read_table(path, COLUMNS, train.total)
        if any(row["in"] not in ("train", "test") or not row["duplicate of"].isdecimal() for row in found.duplicates):
            raise FileError(f"{path}: is damaged: a row does not name the other example; recreate it")
    if config.selection is not None:
        found.kept, found.selection = _read_selection(config.selection, train.total, checks)
    if config.planted is not None:
        found.planted = planted_mask(config.planted, labels)
    _read_geometry(found, folders)
    return found


def _read_results(path: Path) -> dict[str, Any]:
    results = read_json(path)
    history = results.get("history") if isinstance(results, dict) else None
    if not isinstance(history, list) or not isinstance(results.get("settings"), dict):
        raise FileError(f"{path}: is damaged: it has no settings or no history; train again")
    return results


def _read_facts(path: Path, checks: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of a table, and check that it was made for this data set."""
    if not path.exists():
        return {}
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise FileError(f"{path}: is damaged: it has no facts about the table; recreate it")
    check_same_data(path, facts, label_hash=checks["label_hash"], data_hash=checks["data_hash"])
    return facts


def _read_audit(path: Path, checks: Mapping[str, Any]) -> dict[str, Any]:
    """Read the record of an audit, and check the numbers and names that the page shows."""
    facts = _read_facts(path, checks)
    counts = [facts.get(name, 0) for name in ("estimated_errors", "expected_count", "confident_count")]
    pairs, names = facts.get("most_common", []), {"suggested label", "given label", "examples"}
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in counts) or not (
        isinstance(pairs, list) and all(isinstance(pair, dict) and names <= pair.keys() for pair in pairs)
    ):
        raise FileError(f"{path}: is damaged: its estimates are not numbers; run audit_labels.py again")
    return facts


def _read_table(path: Path, columns: Sequence[str], total: int) -> list[dict[str, str]]:
    """Read the rows of a csv table that must have these columns, about examples 0 to ``total`` - 1."""
    rows = read_csv(path, stripped=False)
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        raise FileError(f"{path}: has no column {missing[0]!r}; recreate it")
    where = rows[0].index("index")
    if any(len(row) != len(rows[0]) or not row[where].isdecimal() or int(row[where]) >= total for row in rows[1:]):
        raise FileError(f"{path}: is damaged: a row has a missing cell or no index of an example; recreate it")
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def _read_selection(path: Path, total: int, checks: Mapping[str, Any]) -> tuple[np.ndarray, Mapping[str, Any]]:
    arrays = read_npz(path)
    stored: dict[str, Any] = {
        key: str(arrays[key]) for key in ("label_hash", "data_hash") if key in arrays and str(arrays[key])
    }
    check_same_data(path, stored, label_hash=checks["label_hash"], data_hash=checks["data_hash"])
    indices = checked_array(path, arrays, "indices", kinds="iu", remedy="create it with select_coreset.py")
    if not len(indices) or indices.min() < 0 or indices.max() >= total:
        raise FileError(f"{path}: an index is not from 0 to {total - 1}; create the file again")
    weights = np.ones(len(indices))
    if "weights" in arrays:
        weights = checked_array(path, arrays, "weights", kinds="fiu", length=len(indices))
    kept = np.zeros(total)
    kept[indices] = weights
    return kept, parse_settings(path, arrays["settings"]) if "settings" in arrays else {}


# -------------------------------------------------------------------------------------------------------- dynamics


def _find_dynamics(
    run: Path | None, metrics_folder: Path, models_folder: Path, name: str, checks: Mapping[str, Any]
) -> Dynamics | None:
    """Read the dynamics of the requested run, or of a run on all examples, if there is one."""
    if run is None:
        pattern = f"standard_*_over_{glob.escape(name)}_with_*/seed_*/dynamics.npz"
        found = sorted({path.parents[1] for path in metrics_folder.glob(pattern)})
        if not found:
            return None
        run = min(found, key=lambda folder: "_with_sgd_" not in folder.name)  # scores come from SGD runs
        if len(found) > 1:
            others = ", ".join(folder.name for folder in found if folder != run)
            log.info("learning curves are those of %s; choose another run with --run (%s)", run.name, others)
    paths = {path.parent.name.removeprefix("seed_"): path for path in sorted(run.glob("seed_*/dynamics.npz"))}
    if not paths:
        raise FileError(f"{run}: has no seed_*/dynamics.npz; give the folder of a run trained with --measure_proxies")
    return read_dynamics_of(run.name, paths, models_folder / run.name, checks)


def read_dynamics_of(name: str, paths: Mapping[str, Path], models: Path, checks: Mapping[str, Any]) -> Dynamics:
    """Read and average the dynamics of several seeds.

    Args:
        name: The run's name.
        paths: Each seed's file.
        models: The folder of the run's checkpoints, for ``results.json``.
        checks: The facts of the data set to compare.

    Raises:
        FileError: A file is damaged or belongs to other data, or the seeds were trained with different settings.
    """
    from src.training.dynamics import read_dynamics

    sums: dict[str, list[np.ndarray]] = {}
    settings, results = [], []
    for seed, path in paths.items():
        arrays = read_dynamics(path)
        check_same_data(
            path, {"label_hash": arrays["label_hash"], "total": len(arrays["labels"])},
            label_hash=checks["label_hash"], total=checks["n"],
        )  # fmt: skip
        settings.append((path, {key: value for key, value in arrays["settings"].items() if key != "seed"}))
        check_consistent(settings)
        count, labels = len(arrays["loss"]), arrays["labels"].astype(np.int64)
        if sums and count != len(sums["loss"][0]):
            raise FileError(
                f"{path}: has {count} epochs, but {next(iter(paths.values()))} has {len(sums['loss'][0])}; finish "
                "training, or give --run"
            )
        classes = max(arrays["class_test_loss"].shape[1], int(labels.max()) + 1)
        epochs = np.unique(np.linspace(0, count - 1, min(CURVE_EPOCHS, count)).round().astype(np.int64))
        last = arrays["probability"][count // 2 :]
        parts = {
            "loss": np.stack([class_means(row, labels, classes) for row in arrays["loss"]]),
            "accuracy": np.stack([class_means(row, labels, classes) for row in arrays["correct"]]),
            "test_loss": arrays["class_test_loss"],
            "margin": mean_known(arrays["margin"]),
            "probability": mean_known(last),
            "correct": arrays["correct"][-1],
            "losses": arrays["loss"][epochs],
            "probabilities": arrays["probability"][epochs],
        }
        for key, values in parts.items():
            sums.setdefault(key, []).append(values)
        stored = models / f"seed_{seed}" / "results.json"
        if stored.exists():
            results.append(_read_results(stored))
    means = {key: mean_known(np.stack(values)) for key, values in sums.items()}
    means["correct"] = np.where(np.isnan(means["correct"]), np.nan, means["correct"] >= 0.5)
    seeds = [int(seed) for seed in paths if seed.isdigit()]
    return Dynamics(name=name, seeds=seeds, settings=settings[0][1], results=results, epochs=epochs + 1, **means)


def class_means(values: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean of ``values`` ``(n,)`` in each class ``(C,)``, without NaN; NaN for a class without values."""
    known = ~np.isnan(values)
    counts = np.bincount(labels[known], minlength=classes)
    sums = np.bincount(labels[known], values[known], minlength=classes)
    return np.divide(sums, counts, out=np.full(classes, np.nan), where=counts > 0)


# ------------------------------------------------------------------------------------- sensitivities and geometry


def _read_sensitivities(found: Contents, config: ReportConfig) -> None:
    """Add the experiment ``config.name_exp``, and its sensitivities as a score."""
    from mpe.plots import StoredResult

    folder, name = config.pickles_folder, str(config.name_exp)
    there = [kind for kind in ("scores", "retrain", "iter") if pickle_path(folder, name, kind).exists()]
    if not there:
        raise ArgumentError(
            "name_exp",
            f"{name}: {folder} has no {name}_scores.pkl, {name}_retrain.pkl or {name}_iter.pkl; run the scripts in "
            "examples/ or give --pickles_folder",
        )
    results = {kind: StoredResult(folder, name, kind) for kind in there}
    arguments = next(iter(results.values())).values.get("args")
    experiment = Sensitivity(name, arguments if isinstance(arguments, dict) else {})
    trained_on = experiment.settings.get("dataset")
    if isinstance(trained_on, str) and trained_on.lower() != found.train.entry.name and ":" not in trained_on:
        raise ArgumentError(
            "name_exp", f"{name}: is an experiment on {trained_on}; give --dataset {trained_on.lower()}"
        )
    total = found.train.total
    if "scores" in results:
        stored = results["scores"]
        values = stored.array("sensitivities", low=0)
        indices = stored.integers("indices", 0, total - 1) if "indices" in stored else np.arange(len(values))
        stored.same_length(sensitivities=values, indices=indices)
        if len(values) > total:
            raise stored.error(f"has {len(values)} sensitivities, but the data set has {total} examples")
        full = np.full(total, np.nan)
        full[indices] = values
        found.scores[SENSITIVITY.name] = full
        found.records[SENSITIVITY.name] = {"model": experiment.settings.get("model")}
        if "probabilities" in stored:
            p = stored.array("probabilities", 2, low=0)
            stored.same_length(sensitivities=values, probabilities=p)
            if p.shape[1] == found.train.entry.num_classes:
                found.fitted = np.full((total, p.shape[1]), np.nan)
                found.fitted[indices] = p
        if "retrain" in results and not results["retrain"].is_empty("indices_retrain"):
            retrained = results["retrain"]
            retrained.same_run(stored)
            key = "softmax_deviations" + "_corrected" * ("softmax_deviations_corrected" in retrained)
            removed, deviations = (
                retrained.integers("indices_retrain", 0, len(values) - 1),
                retrained.array(key, low=0),
            )
            retrained.same_length(indices_retrain=removed, **{key: deviations})
            experiment.retrained, experiment.estimated = indices[removed], values[removed]
            experiment.deviations = deviations
    if "iter" in results:
        stored = results["iter"]
        experiment.test_nlls = stored.array("test_nlls")
        experiment.epochs = stored.integers("epochs", 1, len(experiment.test_nlls))
        experiment.estimates = stored.array("estimated_nll")
        stored.same_length(epochs=experiment.epochs, estimated_nll=experiment.estimates)
    found.sensitivity = experiment


def _read_geometry(found: Contents, folders: Folders) -> None:
    """Add the Hessian spectra and kernel velocities of models trained on this data set."""
    name = found.train.entry.name
    for path in sorted(folders.hessian_folder.glob(f"*_over_{glob.escape(name)}_with_*/*/*/pyhessian_eigen_*.pkl")):
        from src.curvature.results import StoredSpectrum

        run, seed, which, file = path.parts[-4:]
        kind = file.removeprefix("pyhessian_eigen_").removesuffix(".pkl")
        run = run.replace(f"_over_{name}_with_", ", ")
        found.spectra[f"{run}, seed {seed}, {which.replace('_', ' ')}, {kind}"] = StoredSpectrum.read(path)
    runs = {path.parents[2] for path in folders.ntk_folder.glob(f"{glob.escape(name)}/*/*/epoch_*/seed_*/vs.pkl")}
    for folder in sorted(runs):
        from src.curvature.results import read_velocities

        found.velocities[f"{folder.parent.name}, ordered by {folder.name}"] = read_velocities(folder)
