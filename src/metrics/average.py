"""Average per-seed scores into the published format. Seeds that differ in settings or data are refused."""

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src import training
from src.artifacts.io import file_digest, read_json, read_pickle
from src.artifacts.paths import dynamics_folder, samis_path, split_experiment, standard_experiment
from src.artifacts.store import check_consistent, check_identity
from src.cli import SEED, check_options, option
from src.datasets import dataset_flag, flips_images
from src.errors import ArgumentError, FileError
from src.metrics import samis
from src.metrics.compare import ranked
from src.metrics.dynamics import PAPERS_WINDOWS, RECORD_FILE, Windows, training_accuracy
from src.metrics.proxy import min_max
from src.metrics.registry import get_score, scores_from
from src.metrics.score import Score
from src.models import model_flag
from src.optimizers import OPTIMIZERS, SCHEDULES

log = logging.getLogger(__name__)

_AGAIN = "score this seed again"
_ONE_KIND = "average only seeds made with the same settings"

PAIR_MODES, RUN_MODES = scores_from("pair"), scores_from("dynamics", "end")


def wanted_modes(choice: Any) -> Sequence[str]:
    """The scores to average.

    Args:
        choice: An ``AverageConfig``, or the parsed flags.

    Returns:
        The requested scores. By default, all scores of a run if a flag selects a run, otherwise all scores of a pair.
    """
    of_run = any(value is not None for value in (choice.optimizer, choice.lr_sched, choice.exp))
    return choice.modes or (RUN_MODES if of_run else PAIR_MODES)


def _of_run(args: Any) -> bool:
    return bool(set(wanted_modes(args)) & set(RUN_MODES))


_CHOOSES_RUN = (_of_run, f"on {', '.join(PAIR_MODES)}, because it selects a training run")
_UNNAMED = (lambda args: args.exp is None, "with --exp, which names the run")


@dataclass(frozen=True)
class AverageConfig:
    """Which per-seed scores to average.

    Attributes:
        model: The model's name.
        seeds: The seeds.
        modes: The scores. None for all scores of the run if one of the next three fields is set, otherwise all
            scores of the pair.
        optimizer: Restrict the search to runs with this optimizer.
        lr_sched: Restrict the search to runs with this learning rate schedule.
        exp: The name of the run.
        overwrite: Whether to replace scores that were averaged with different settings.

    Raises:
        ArgumentError: A seed is repeated, or a value is out of range.
    """

    model: str
    seeds: Sequence[int] = option((), "the seeds to average", SEED, nargs="+")
    modes: Sequence[str] | None = option(
        None,
        f"scores to average; from a pair of models: {', '.join(PAIR_MODES)} (the default); from a training run: "
        f"{', '.join(RUN_MODES)} (the default if a flag below selects a run)",
        choices=PAIR_MODES + RUN_MODES,
        nargs="+",
        metavar="MODE",
    )
    optimizer: str | None = option(
        None,
        "search only runs with this optimizer (default: any)",
        choices=tuple(OPTIMIZERS),
        acts=(_CHOOSES_RUN, _UNNAMED),
    )
    lr_sched: str | None = option(
        None,
        "search only runs with this learning rate schedule (default: any)",
        choices=tuple(SCHEDULES),
        acts=(_CHOOSES_RUN, _UNNAMED),
    )
    exp: str | None = option(
        None,
        "name of the run, which is also its folder under --metrics_folder (default: the only run found)",
        metavar="NAME",
        acts=_CHOOSES_RUN,
    )
    overwrite: bool = option(False, "replace scores that were averaged with different settings")

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ArgumentError(
                "seeds", f"{' '.join(map(str, self.seeds))}: contains a duplicate; list each seed once"
            )


@dataclass(frozen=True)
class SeedScores:
    """The raw scores of one seed.

    Files written by the papers' code do not record how the scores were made. For these, ``facts`` has only an empty
    ``settings``.

    Attributes:
        seed: The seed.
        values: float64 ``(total,)``, oriented so that high means atypical.
        scored: bool ``(total,)``: which examples this seed scores; ``values`` is NaN for all others.
        facts: What must be identical across the seeds of an average: epoch, protocol, label hash, settings.
        source: The file that the scores were read from.
        cost: The cost in epoch-equivalents; None if it is not recorded.
        training_accuracy: The training accuracy of the run's last epoch in [0, 1]; None if it is not recorded.
    """

    seed: int
    values: np.ndarray
    scored: np.ndarray
    facts: Mapping[str, Any]
    source: Path
    cost: float | None = None
    training_accuracy: float | None = None

    @property
    def recorded(self) -> bool:
        """Whether the file records how the scores were made."""
        return "label_hash" in self.facts


# ------------------------------------------------------------------------------------------------ one seed's scores


def read_pair_seed(
    modes: Sequence[str], metrics_folder: str | Path, dataset: str, model: str, seed: int
) -> dict[str, SeedScores]:
    """Read one seed of the scores that compare a pair of models.

    Raises:
        FileError: The seed has not been scored yet, or its files are damaged.
    """
    wanted: dict[str, list[Score]] = {}
    for mode in modes:
        score = get_score(mode)
        wanted.setdefault(score.seed_file or "loss", []).append(score)  # every file has both losses
    result = {}
    for which, scores in wanted.items():
        path = samis_path(metrics_folder, dataset, model, seed, which)
        if not path.exists():
            raise FileError(
                f"{path}: seed {seed} has not been scored yet; run compute_sam_sgd.py "
                f"--dataset {dataset_flag(dataset)} --model {model_flag(model)} --seed {seed} --epochs EPOCH"
            )
        content = samis.read_seed(path)
        scored = np.zeros(len(content["arr_0"]), dtype=bool)
        scored[content["indices"]] = True
        if content["settings"] is not None:
            facts = {name: content[name] for name in ("epoch", "protocol", "label_hash", "data_hash", "settings")}
            stored = {**facts["settings"], "seed": content["seed"], "score": content["score"] or which}
            check_identity(path, stored, _AGAIN, dataset=dataset, model=model, seed=seed, score=which)
        else:
            for score in scores:
                if not score.seed_file:
                    raise FileError(
                        f"{path}: has no losses, which {score.name} needs; remove {score.name} from --modes"
                    )
            log.warning("%s: does not record how it was made (epoch, protocol, labels, settings)", path)
            facts = {"settings": {}}
        for score in scores:
            values = content["arr_0"] if score.seed_file else score.compute(*(content[name] for name in score.reads))
            known = content.get("cost"), content.get("training_accuracy")
            result[score.name] = SeedScores(seed, values, scored, _without_seed(facts), path, *known)
    return result


def read_run_seed(
    modes: Sequence[str],
    metrics_folder: str | Path,
    experiment: str,
    seed: int,
    windows: Windows = PAPERS_WINDOWS,
    skip_missing: bool = False,
) -> dict[str, SeedScores]:
    """Read one seed of the scores that a training run with ``--measure_proxies`` records.

    Args:
        modes: The scores.
        metrics_folder: The folder of recorded dynamics.
        experiment: The run's name.
        seed: The seed.
        windows: The epochs that the windowed scores use.
        skip_missing: Whether to leave out scores that the run is too short for or did not record, instead of raising.

    Returns:
        The scores of the seed, by mode.

    Raises:
        FileError: The run has no recorded dynamics for this seed, or its files are damaged.
        ArgumentError: The run is too short for a score, or did not record what it needs.
    """
    folder = dynamics_folder(metrics_folder, experiment, seed)
    path = folder / training.DYNAMICS_FILE
    if not path.exists():
        raise FileError(
            f"{path}: no recorded dynamics for seed {seed}; train it with --measure_proxies --seed {seed}"
        )
    run = training.read_dynamics(path)
    check_identity(path, run["settings"], _AGAIN, seed=seed)
    _check_run(path, run["settings"], experiment)
    visited = ~np.isnan(run["correct"]).all(axis=0)
    facts = {"epoch": len(run["correct"]), "label_hash": run["label_hash"], "settings": run["settings"]}
    facts["data_hash"] = run["settings"].get("images")

    def read(mode: str) -> SeedScores:
        score = get_score(mode)
        scored, source, used = visited, path, score.settings(windows)
        if score.combines:
            parts = [read(part) for part in score.combines]
            values = np.mean([_ranks(part.values) for part in parts], axis=0)
            used = {
                name: value for part in score.combines for name, value in get_score(part).settings(windows).items()
            }
        elif score.source == "dynamics":
            values = score.from_dynamics(run, windows)
        else:
            source = folder / score.seed_file
            record = folder / RECORD_FILE
            if not source.exists() and record.exists() and source.name not in read_json(record):
                raise ArgumentError("modes", f"{mode}: was not measured for seed {seed}; train it with --end_scores")
            if not source.exists():
                raise FileError(f"{source}: is missing; finish training seed {seed} with --measure_proxies")
            _check_digest(source)
            values, scored = _end_scores(source, len(visited))
            values = -values if score.negated else values
        cost = _run_cost(score, run["costs"], windows, scored.mean(), run["settings"].get("dataset", ""))
        accuracy = training_accuracy(run["correct"])
        return SeedScores(seed, values, scored, _without_seed({**facts, **used}), source, cost, accuracy)

    result = {}
    for mode in modes:
        try:
            result[mode] = read(mode)
        except ArgumentError:
            if not skip_missing:
                raise
    return result


def _run_cost(score: Score, costs: np.ndarray | None, windows: Windows, scored: float, dataset: str) -> float | None:
    """Cost of one seed of a score in epoch-equivalents: the epochs that it needs, and its own passes.

    Args:
        score: The score.
        costs: The cost of each epoch; None if unknown.
        windows: ``el2n`` needs no epoch after the last one that it averages over.
        scored: The scored fraction of the full training set.
        dataset: The data set's name in file names.
    """
    if costs is None:
        return None
    epochs = windows.el2n_epochs[1] if "el2n_epochs" in score.options else None
    views = 2 if score.mirrored and flips_images(dataset) else 1
    return float(costs[:epochs].sum() + views * score.passes * scored)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 to 1, ties averaged; NaN where ``values`` is NaN. float64 ``(n,)``."""
    known, found = ~np.isnan(values), np.full(len(values), np.nan)
    found[known] = (ranked(values[known]) - 1) / max(1, known.sum() - 1)
    return found


def _end_scores(path: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Read an end-of-training file: the scores by index, and a mask of the scored examples."""
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(key, int | np.integer) for key in content):
        raise FileError(f"{path}: is not a dict index -> score; train again with --measure_proxies")
    if not content or min(content) < 0 or max(content) >= total:
        raise FileError(f"{path}: does not score examples 0 to {total - 1}; train again with --measure_proxies")
    values, scored = np.full(total, np.nan), np.zeros(total, dtype=bool)
    keys = np.fromiter(content.keys(), np.int64, len(content))
    try:
        values[keys] = np.fromiter(content.values(), np.float64, len(content))
    except (TypeError, ValueError) as error:
        raise FileError(f"{path}: some scores are not numbers; train again with --measure_proxies") from error
    scored[keys] = True
    return values, scored


def _check_run(path: Path, settings: Mapping[str, Any], experiment: str) -> None:
    """Refuse recorded dynamics that belong to a different run than the one their folder is named after."""
    run = [settings.get(name) for name in ("model", "dataset", "optimizer", "lr_sched")]
    if not experiment.startswith(("standard_", "split_")) or None in run:
        return
    split = settings.get("validation_split")
    name = standard_experiment(*run) if split is None else split_experiment(*run, split)
    if name != experiment:
        raise FileError(f"{path}: belongs to run {name}; it was copied or renamed; train {experiment} again")


def _check_digest(path: Path) -> None:
    """Refuse an end-of-training file whose digest differs from the one its run recorded, if it recorded one."""
    record = path.with_name(RECORD_FILE)
    if not record.exists():
        return
    digests = read_json(record)
    if not isinstance(digests, dict) or digests.get(path.name) != file_digest(path):
        raise FileError(
            f"{path}: was changed after the run wrote it (its digest differs from {RECORD_FILE}); "
            "train this seed again"
        )


def _without_seed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without the seed, the only setting in which seeds differ."""
    settings = facts.get("settings", {})
    return {
        **{name: value for name, value in facts.items() if name != "settings"},
        "settings": {name: value for name, value in settings.items() if name != "seed"},
    }


# ---------------------------------------------------------------------------------------------------- the average


def average(mode: str, seeds: Sequence[SeedScores]) -> tuple[np.ndarray, dict[str, Any]]:
    """Average a score over seeds and scale it like the published files.

    Args:
        mode: A key of ``SCORES``.
        seeds: The scores of each seed.

    Returns:
        float64 ``(total,)`` (NaN for examples without a score), and the record of how it was made.

    Raises:
        FileError: The seeds differ in epoch, protocol, data, settings, or scored examples, or a score is not finite.
    """
    score = get_score(mode)
    flat = [(s.source, {**s.facts["settings"], **s.facts, "settings": None}) for s in seeds if s.recorded]
    check_consistent(flat, what="cannot be averaged with", remedy=_ONE_KIND)
    for seed in seeds[1:]:
        if not np.array_equal(seed.scored, seeds[0].scored):
            here, there = len(seed.scored), len(seeds[0].scored)
            found = "it scores different examples" if here == there else f"examples ({there} vs. {here})"
            raise FileError(f"{seed.source}: cannot be averaged with {seeds[0].source}: {found}; {_ONE_KIND}")
    unrecorded = [seed.seed for seed in seeds if not seed.recorded]
    if 0 < len(unrecorded) < len(seeds):
        log.warning(
            "%s: seeds %s do not record how they were made; they are averaged with those that do",
            mode,
            ", ".join(map(str, unrecorded)),
        )
    first = max(seeds, key=lambda seed: len(seed.facts["settings"]))  # the most complete record
    for seed in seeds:
        wrong = seed.scored & ~np.isfinite(seed.values)
        if score.missing is None and wrong.any():
            example = np.flatnonzero(wrong)[0]
            raise FileError(
                f"{seed.source}: the {mode} score of example {example} is not finite; train or score it again"
            )
    costs = [seed.cost for seed in seeds]
    accuracies = [seed.training_accuracy for seed in seeds]
    epochs = first.facts["epoch"] if score.share_of_epochs else 1
    raw = np.mean([seed.values / epochs for seed in seeds], axis=0)
    if score.missing is not None:
        raw = np.where(first.scored & np.isnan(raw), score.missing, raw)
    raw = np.where(first.scored, raw, np.nan)
    record = {
        "mode": mode,
        "seeds": [seed.seed for seed in seeds],
        **({"unrecorded_seeds": unrecorded} if unrecorded else {}),
        **first.facts,
        **({} if None in costs else {"cost": sum(costs)}),
        **({"training_accuracy": accuracies} if any(known is not None for known in accuracies) else {}),
        "orientation": "high is atypical",
        "negated": score.negated,
        "scaling": "mean over seeds, divided by the epochs"
        if score.share_of_epochs
        else "min-max of the mean over seeds",
        "raw_min": float(np.nanmin(raw)),
        "raw_max": float(np.nanmax(raw)),
    }
    return (raw if score.share_of_epochs else min_max(raw)), record


# ---------------------------------------------------------------------------------------------------- which run


def find_run(metrics_folder: str | Path, dataset: str, config: AverageConfig) -> str:
    """Find the training run with recorded dynamics that the configuration selects.

    Args:
        metrics_folder: The folder of recorded dynamics.
        dataset: The data set's name in paths.
        config: Which run to find.

    Returns:
        The run's name.

    Raises:
        FileError: No run matches.
        ArgumentError: Several runs match; the message lists them.
    """
    model, experiment = config.model, config.exp
    folder = Path(metrics_folder)
    if experiment is not None:
        patterns = [experiment]
    else:
        names = (glob.escape(model), glob.escape(dataset), config.optimizer or "*", config.lr_sched or "*")
        patterns = [standard_experiment(*names), split_experiment(*names, "*")]
    runs = [folder / experiment] if experiment is not None else [run for p in patterns for run in folder.glob(p)]
    found = sorted({run.name for run in runs if any(run.glob(f"seed_*/{training.DYNAMICS_FILE}"))})
    if len(found) == 1:
        return found[0]
    if found:
        raise ArgumentError(
            "exp",
            f": {len(found)} runs in {folder} match; choose one, or narrow them with --optimizer and --lr_sched: "
            f"{', '.join(found)}",
        )
    raise FileError(
        f"{folder}: no recorded dynamics for {' or '.join(patterns)}; record them with train_full.py --dataset "
        f"{dataset_flag(dataset)} --model {model_flag(model)} --measure_proxies"
    )
