"""Averaging per-seed scores: the mean over seeds in the published format, refusing what does not belong together."""

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
from src.datasets import dataset_flag
from src.errors import ArgumentError, FileError
from src.metrics import samis
from src.metrics.dynamics import PAPERS_WINDOWS, RECORD_FILE, Windows
from src.metrics.proxy import min_max
from src.metrics.registry import get_score, scores_from
from src.metrics.score import Score
from src.optimizers import OPTIMIZERS, SCHEDULES

log = logging.getLogger(__name__)

_AGAIN = "score the seed again"
_ONE_KIND = "average seeds of one kind"

PAIR_MODES, RUN_MODES = scores_from("pair"), scores_from("dynamics", "end")


def wanted_modes(choice: Any) -> Sequence[str]:
    """The scores to average, of an ``AverageConfig`` or of its flags: those asked for, or all of the run or pair."""
    of_run = any(value is not None for value in (choice.optimizer, choice.lr_sched, choice.exp))
    return choice.modes or (RUN_MODES if of_run else PAIR_MODES)


def _of_run(args: Any) -> bool:
    return bool(set(wanted_modes(args)) & set(RUN_MODES))


_CHOOSES_RUN = (_of_run, f"on {', '.join(PAIR_MODES)}: it chooses a training run")
_UNNAMED = (lambda args: args.exp is None, "beside --exp, which names the run")


@dataclass(frozen=True)
class AverageConfig:
    """Which per-seed scores are averaged.

    Attributes:
        model: The name of the model.
        seeds: The seeds.
        modes: The scores; None for all of the run that the next three choose, or else of the pair.
        optimizer: Only runs of this optimizer.
        lr_sched: Only runs of this schedule.
        exp: The name of the run.
        overwrite: Whether scores that were averaged otherwise are replaced.

    Raises:
        ArgumentError: A seed is named twice, or a value is out of its range.
    """

    model: str
    seeds: Sequence[int] = option((), "the seeds to average", SEED, nargs="+")
    modes: Sequence[str] | None = option(
        None,
        f"of a pair of models: {', '.join(PAIR_MODES)} (the default); of a training run: {', '.join(RUN_MODES)} "
        "(the default where a flag below chooses a run)",
        choices=PAIR_MODES + RUN_MODES,
        nargs="+",
        metavar="MODE",
    )
    optimizer: str | None = option(
        None,
        "only runs of this optimizer (default: any)",
        choices=tuple(OPTIMIZERS),
        acts=(_CHOOSES_RUN, _UNNAMED),
    )
    lr_sched: str | None = option(
        None, "only runs of this schedule (default: any)", choices=tuple(SCHEDULES), acts=(_CHOOSES_RUN, _UNNAMED)
    )
    exp: str | None = option(
        None,
        "the run's name, its folder under --metrics_folder (default: the only one there is)",
        metavar="NAME",
        acts=_CHOOSES_RUN,
    )
    overwrite: bool = option(False, "replace scores that were averaged with different settings")

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.seeds)) < len(self.seeds):
            raise ArgumentError("seeds", f"{' '.join(map(str, self.seeds))}: names a seed twice; name each once")


@dataclass(frozen=True)
class SeedScores:
    """The raw scores of one seed.

    Where a file of the papers' code does not say how they were made, ``facts`` holds empty ``settings`` alone.

    Attributes:
        seed: The seed.
        values: float64 ``(total,)``, oriented so that HIGH means atypical.
        scored: bool ``(total,)``: which examples this seed scores (NaN in ``values`` elsewhere).
        facts: What all seeds of an average must share: epoch, protocol, label hash, settings.
        source: The file the scores come from.
    """

    seed: int
    values: np.ndarray
    scored: np.ndarray
    facts: Mapping[str, Any]
    source: Path

    @property
    def recorded(self) -> bool:
        """Whether the file says how the scores were made."""
        return "label_hash" in self.facts


# ------------------------------------------------------------------------------------------------ one seed's scores


def read_pair_seed(
    modes: Sequence[str], metrics_folder: str | Path, dataset: str, model: str, seed: int
) -> dict[str, SeedScores]:
    """One seed of the scores that a pair of models gives.

    Raises:
        FileError: The seed was not scored yet, or its files are damaged.
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
                f"{path}: seed {seed} is not scored yet; run compute_sam_sgd.py --dataset {dataset_flag(dataset)} "
                f"--model {model} --seed {seed} --epochs EPOCH"
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
                        f"{path}: contains no losses, so there is no {score.name}; leave it out of the modes"
                    )
            log.warning("%s: does not say how it was made (epoch, protocol, labels, settings)", path)
            facts = {"settings": {}}
        for score in scores:
            values = content["arr_0"] if score.seed_file else score.compute(*(content[name] for name in score.reads))
            result[score.name] = SeedScores(seed, values, scored, _without_seed(facts), path)
    return result


def read_run_seed(
    modes: Sequence[str], metrics_folder: str | Path, experiment: str, seed: int, windows: Windows = PAPERS_WINDOWS
) -> dict[str, SeedScores]:
    """One seed of the modes that a training run with ``--measure_proxies`` gives.

    Raises:
        FileError: The run has no dynamics of this seed, or its files are damaged.
    """
    folder = dynamics_folder(metrics_folder, experiment, seed)
    path = folder / training.DYNAMICS_FILE
    if not path.exists():
        raise FileError(f"{path}: no dynamics of seed {seed}; train it with --measure_proxies --seed {seed}")
    run = training.read_dynamics(path)
    check_identity(path, run["settings"], _AGAIN, seed=seed)
    _check_run(path, run["settings"], experiment)
    visited = ~np.isnan(run["correct"]).all(axis=0)
    facts = {"epoch": len(run["correct"]), "label_hash": run["label_hash"], "settings": run["settings"]}
    facts["data_hash"] = run["settings"].get("images")
    result = {}
    for mode in modes:
        score = get_score(mode)
        if score.source == "dynamics":
            values, scored, source = score.from_dynamics(run, windows), visited, path
        else:
            source = folder / score.seed_file
            if not source.exists():
                raise FileError(f"{source}: is missing; train seed {seed} with --measure_proxies to its end")
            _check_digest(source)
            values, scored = _end_scores(source, len(visited))
        result[mode] = SeedScores(seed, values, scored, _without_seed({**facts, **score.settings(windows)}), source)
    return result


def _end_scores(path: Path, total: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores of an end-of-training file by index, and which examples it scores."""
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
        raise FileError(f"{path}: its scores are not all numbers; train again with --measure_proxies") from error
    scored[keys] = True
    return values, scored


def _check_run(path: Path, settings: Mapping[str, Any], experiment: str) -> None:
    """Stop if a run's recorded dynamics are of another run than their folder is named after."""
    run = [settings.get(name) for name in ("model", "dataset", "optimizer", "lr_sched")]
    if not experiment.startswith(("standard_", "split_")) or None in run:
        return
    split = settings.get("validation_split")
    name = standard_experiment(*run) if split is None else split_experiment(*run, split)
    if name != experiment:
        raise FileError(f"{path}: is of the run {name}; it was copied or renamed; train {experiment} again")


def _check_digest(path: Path) -> None:
    """Stop if an end-of-training file is not the one that its run wrote, where the run recorded its digest."""
    record = path.with_name(RECORD_FILE)
    if not record.exists():
        return
    digests = read_json(record)
    if not isinstance(digests, dict) or digests.get(path.name) != file_digest(path):
        raise FileError(
            f"{path}: is not what the run wrote (its digest is not the one in {RECORD_FILE}); train the seed again"
        )


def _without_seed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with settings flattened, but for the one thing that seeds differ in."""
    settings = facts.get("settings", {})
    return {
        **{name: value for name, value in facts.items() if name != "settings"},
        "settings": {name: value for name, value in settings.items() if name != "seed"},
    }


# ---------------------------------------------------------------------------------------------------- the average


def average(mode: str, seeds: Sequence[SeedScores]) -> tuple[np.ndarray, dict[str, Any]]:
    """The mean over seeds, scaled as the published files are.

    Args:
        mode: A name of ``SCORES``.
        seeds: The seeds' scores.

    Returns:
        float64 ``(total,)`` (NaN where nothing was scored), and how it was made.

    Raises:
        FileError: The seeds differ in epoch, protocol, data, settings or scored examples, or a score is not finite.
    """
    score = get_score(mode)
    flat = [(s.source, {**s.facts["settings"], **s.facts, "settings": None}) for s in seeds if s.recorded]
    check_consistent(flat, what="cannot be averaged with", remedy=_ONE_KIND)
    for seed in seeds[1:]:
        if not np.array_equal(seed.scored, seeds[0].scored):
            here, there = len(seed.scored), len(seeds[0].scored)
            found = "it scores other examples" if here == there else f"examples ({there} there, {here} here)"
            raise FileError(f"{seed.source}: cannot be averaged with {seeds[0].source}: {found}; {_ONE_KIND}")
    unrecorded = [seed.seed for seed in seeds if not seed.recorded]
    if 0 < len(unrecorded) < len(seeds):
        log.warning("%s: seeds %s do not say how they were made; they are averaged with those that do",
                    mode, ", ".join(map(str, unrecorded)))  # fmt: skip
    first = max(seeds, key=lambda seed: len(seed.facts["settings"]))  # the one that says most
    for seed in seeds:
        wrong = seed.scored & ~np.isfinite(seed.values)
        if score.missing is None and wrong.any():
            example = np.flatnonzero(wrong)[0]
            raise FileError(f"{seed.source}: example {example} has no finite {mode} score; train or score it again")
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
    """The one training run with recorded dynamics that is meant.

    Args:
        metrics_folder: Where dynamics are kept.
        dataset: The data set's name in paths.
        config: Which run.

    Returns:
        The run's name.

    Raises:
        FileError: There is no such run.
        ArgumentError: There are several; they are listed.
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
            f": {len(found)} runs in {folder} match; choose one, or give --optimizer and --lr_sched: "
            f"{', '.join(found)}",
        )
    raise FileError(
        f"{folder}: no recorded dynamics of {' or '.join(patterns)}; "
        f"make them with train_full.py --dataset {dataset_flag(dataset)} --model {model} --measure_proxies"
    )
