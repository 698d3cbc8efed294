"""Retraining a model without some of its examples, many times: in ensembles, chunk by chunk, and resumable."""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpe.config import RetrainingConfig
from mpe.experiment import Experiment
from mpe.schedules import (
    MemberSchedules,
    own_schedules,
    replay_generator,
    seeded_permutation,
    shared_schedules,
    shuffle_seeds,
)
from src.artifacts.io import (
    read_checkpoint,
    read_json,
    read_npz,
    require_writable,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME
from src.artifacts.store import REPLACE, check_identity, check_settings_match, load_result
from src.datasets import empty_images
from src.devices import upload
from src.errors import ArgumentError, FileError, TrainingError
from src.models import MODELS
from src.models.base import trains_on_one
from src.optimizers import rate
from src.rng import derived_seed
from src.training.ensemble import Ensemble, vectorised_is_faster, why_not_vectorised

log = logging.getLogger(__name__)

_STATE_FORMAT = "retraining-1"
_TOGETHER = 64  # steps whose labels are gathered, and whose losses are looked at, at once
_KEEP_STATES = 2  # the newest, and the one before it in case that one is damaged
_CHUNK = re.compile(r"networks_(\d+)_(\d+)\.npz")
_STATE = re.compile(r"state_(\d+)_(\d+)_epoch_(\d+)\.pt")

_NUMBERS = "model_numbers"  # the entry with the models that a file is of; files of older versions lack it


class RetrainingFiles:
    """The folder of one run.

    It holds ``settings.json``, ``networks_{start}_{stop}.npz`` for each finished chunk (or model, where these are
    measured one by one), and ``state_{start}_{stop}_epoch_{e}.pt`` of the unfinished chunk. Models are counted from
    0, ``stop`` is exclusive. All files are of the settings in ``settings.json``.

    Args:
        folder: The folder.
        settings: Everything that determines the results.
        save_seconds: The least time between two states.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], save_seconds: float) -> None:
        self.folder, self.settings, self.save_seconds = folder, dict(settings), save_seconds
        self._saved = time.monotonic()

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder; results that are damaged or have different settings go only with ``overwrite``."""
        require_writable(self.folder)
        path = self.folder / "settings.json"
        chunks = [self._chunk(range(*found)) for found in self._found(_CHUNK)]
        if (chunks or self._found(_STATE)) and not path.exists() and not overwrite:
            raise FileError(f"{path}: is missing beside results; {REPLACE}")
        if load_result(path, self.settings, _read_settings, overwrite=overwrite) is None or not resume:
            self.forget_states()
            for file in chunks:
                file.unlink()
        write_json(path, self.settings)

    def finished(self, count: int) -> tuple[list[dict[str, np.ndarray]], int]:
        """The arrays of finished chunks, from model 0 on without a gap, and how many models they are of.

        Damaged files are passed over, with a warning.
        """
        parts: list[dict[str, np.ndarray]] = []
        columns: dict[str, tuple[Any, ...]] = {}  # kind and shape by name
        reached = 0
        for start, stop in self._found(_CHUNK):
            if start != reached or not start < stop <= count:
                continue
            path = self._chunk(range(start, stop))
            try:
                part = read_npz(path)
                _check_numbers(path, part.pop(_NUMBERS, None), range(start, stop))
                numbers = all(values.ndim and values.dtype.kind in "biuf" for values in part.values())
                if not numbers or max(map(len, part.values()), default=0) != stop - start:  # a control has fewer
                    raise FileError(f"{path}: does not have numbers for {stop - start} models")
                these = {name: (values.dtype.kind, values.shape[1:]) for name, values in part.items()}
                if parts and these != columns:
                    raise FileError(f"{path}: does not have what the chunks before it have")
            except FileError as error:
                log.warning("%s; these models are retrained", error)
                continue
            parts.append(part)
            columns, reached = these, stop
        return parts, reached

    def chunk_around(self, number: int, count: int) -> range | None:
        """The chunk that was trained but not measured to its end, if ``number`` is the first that was not."""
        found = [range(start, stop) for start, stop, _ in self._found(_STATE) if start < number < stop <= count]
        return found[0] if found else None

    def finish(self, numbers: range, part: Mapping[str, np.ndarray], *, last: bool = True) -> None:
        """Write what was measured; after a chunk's last models, remove what only an unfinished one needs."""
        write_npz(self._chunk(numbers), **part, **{_NUMBERS: np.array([numbers.start, numbers.stop])})
        if last:
            self.forget_states()

    def forget_states(self) -> None:
        """Remove what only an unfinished chunk needs."""
        for start, stop, epoch in self._found(_STATE):
            self._state(range(start, stop), epoch).unlink(missing_ok=True)

    def save(self, ensemble: Ensemble, numbers: range, epoch: int, epochs: int) -> None:
        """Write the state after an epoch, if it is time; after the last one always, as measuring may fail."""
        if epoch < epochs and time.monotonic() - self._saved < self.save_seconds:
            return
        state = {"format": _STATE_FORMAT, "settings": self.settings, "epoch": epoch, "ensemble": ensemble.state()}
        state[_NUMBERS] = [numbers.start, numbers.stop]
        write_checkpoint(self._state(numbers, epoch), state)
        self._saved = time.monotonic()
        for old in self._states(numbers)[_KEEP_STATES:]:
            self._state(numbers, old).unlink(missing_ok=True)

    def states(self, numbers: range, epochs: int) -> Iterator[tuple[Path, int, dict[str, Any]]]:
        """The readable states of a chunk, newest first: path, epoch and the ensemble's state."""
        for epoch in self._states(numbers):
            path = self._state(numbers, epoch)
            try:
                state = read_checkpoint(path)
                foreign = (state.get("format"), state.get("epoch")) != (_STATE_FORMAT, epoch) or epoch > epochs
                if foreign or not all(isinstance(state.get(name), dict) for name in ("settings", "ensemble")):
                    raise FileError(f"{path}: is not the state of such a chunk")
                _check_numbers(path, state.get(_NUMBERS), numbers)
                check_settings_match(path, state["settings"], self.settings, remedy="it is not used")
            except FileError as error:
                log.warning("%s; using the state before it", error)
                continue
            yield path, epoch, state["ensemble"]

    def _found(self, pattern: re.Pattern) -> list[tuple[int, ...]]:
        """The numbers in the names of files, ascending."""
        names = [pattern.fullmatch(file.name) for file in self.folder.iterdir()]
        return sorted(tuple(map(int, name.groups())) for name in names if name)

    def _states(self, numbers: range) -> list[int]:
        """The epochs of a chunk's states, newest first."""
        found = reversed(self._found(_STATE))
        return [epoch for start, stop, epoch in found if (start, stop) == (numbers.start, numbers.stop)]

    def _chunk(self, numbers: range) -> Path:
        return self.folder / f"networks_{numbers.start}_{numbers.stop}.npz"

    def _state(self, numbers: range, epoch: int) -> Path:
        return self.folder / f"state_{numbers.start}_{numbers.stop}_epoch_{epoch}.pt"


def _read_settings(path: Path) -> tuple[Any, Any]:
    settings = read_json(path)
    return settings, settings if isinstance(settings, dict) else None


def _check_numbers(path: Path, recorded: Any, numbers: range) -> None:
    """Refuse a file that was copied or renamed, and is of other models than those in its name."""
    if recorded is not None:
        check_identity(path, {"models": np.asarray(recorded).tolist()}, models=[numbers.start, numbers.stop])


@dataclass(frozen=True)
class RetrainSettings:
    """How models are retrained.

    Attributes:
        epochs: Passes over the examples that are left.
        batch_size: Examples per step.
        learning_rate: Of the first epoch.
        lr_min: What the cosine schedule falls towards.
        delta: The L2 parameter: the objective is the batch's mean loss plus ``delta / (2 N) |w|^2``, N the number of
            examples that are left.
        shuffle: One of ``mpe.schedules.SHUFFLES``.
        seed: Of the shuffles, and of dropout where a model has it.
        optimizer: ``sgd`` (momentum 0.9), ``adam`` or ``adamw``.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    lr_min: float
    delta: float
    shuffle: str = "seeded"
    seed: int = 1
    optimizer: str = "sgd"


def weights_hash(model: nn.Module) -> str:
    """16 hex digits of a model's parameters and buffers: equal for equal bits."""
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """What all chunks have in common; the fields are arguments of ``retrain``, checked."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    removed: list[np.ndarray]
    settings: RetrainSettings
    seeds: list[int] | None
    permutation: Callable[[int], Tensor] | None
    deltas: list[float]
    vectorised: bool

    def facts(self) -> dict[str, Any]:
        """What determines the results, as plain values."""
        order = hashlib.sha256()
        for entry in self.removed:
            order.update(np.int64(len(entry)).tobytes() + entry.tobytes())
        if self.seeds is not None:
            order.update(np.asarray(self.seeds, dtype=np.int64).tobytes())
        if self.permutation is not None:
            order.update(self.permutation(1).cpu().numpy().astype(np.int64).tobytes())
        return {
            **asdict(self.settings),
            "networks": len(self.removed),
            "examples": len(self.images),
            "deltas": self.deltas if len(set(self.deltas)) > 1 else self.deltas[0],
            "order": order.hexdigest()[:16],
            "base_weights": weights_hash(self.model),
        }

    def schedules(self, numbers: range, epoch: int) -> MemberSchedules:
        """Which examples the models of a chunk see in an epoch."""
        removed, total = [self.removed[number] for number in numbers], len(self.images)
        if self.permutation is not None:
            found = shared_schedules(removed, self.permutation(epoch))
        elif self.settings.shuffle == "shared":
            found = shared_schedules(removed, seeded_permutation(total, self.seeds[0]))
        else:
            found = own_schedules(removed, [self.seeds[number] for number in numbers], total)
        device = next(self.model.parameters()).device
        return found.to(self.images.device, masks=device if self.vectorised else "cpu")

    def train(self, numbers: range, files: RetrainingFiles | None, bar: tqdm) -> Ensemble:
        """Train one chunk, from the newest state of it if there is one."""
        settings = self.settings
        ensemble, done = self._resumed(numbers, files)
        bar.update(done)
        schedules = None
        devices = [ensemble.device] if ensemble.device.type == "cuda" else []
        for epoch in range(done + 1, settings.epochs + 1):
            if schedules is None or self.permutation is not None:
                schedules = self.schedules(numbers, epoch)
            lr = rate("cosine", epoch, settings.epochs, settings.learning_rate, settings.lr_min)
            with torch.random.fork_rng(devices=devices):  # dropout can only draw from the global generators
                torch.manual_seed(derived_seed(settings.seed, epoch, f"retraining {numbers.start}"))
                finite = one_epoch(ensemble, self.images, self.labels, schedules, settings.batch_size, lr)
            self._check(finite, numbers, epoch)
            if files:
                files.save(ensemble, numbers, epoch, settings.epochs)
            bar.update()
        self._check(ensemble.finite(), numbers, settings.epochs)
        return ensemble

    def _resumed(self, numbers: range, files: RetrainingFiles | None) -> tuple[Ensemble, int]:
        """A chunk as it was left, and how many epochs it has done."""
        total = len(self.images)
        l2 = [self.deltas[number] / (total - len(self.removed[number])) for number in numbers]
        build = partial(
            Ensemble,
            self.model,
            len(numbers),
            l2=torch.tensor(l2, dtype=torch.float64),
            optimizer=self.settings.optimizer,
            vectorised=self.vectorised,
        )
        for path, epoch, state in files.states(numbers, self.settings.epochs) if files else ():
            ensemble = build()  # again: a state that does not fit may have been taken in part
            try:
                ensemble.restore(state)
            except ValueError as error:
                log.warning("%s: %s; using the state before it", path, error)
                continue
            log.info("retraining continues after epoch %d of %d", epoch, self.settings.epochs)
            return ensemble, epoch
        return build(), 0

    def _check(self, finite: Tensor, numbers: range, epoch: int) -> None:
        if bool(finite.all()):
            return
        number = numbers[int((~finite).nonzero()[0])]
        raise TrainingError(
            f"the loss is not finite in epoch {epoch} of retraining model {number + 1} of {len(self.removed)}; "
            f"a smaller learning rate may help (it is {self.settings.learning_rate:g})"
        )


def one_epoch(
    ensemble: Ensemble, images: Tensor, labels: Tensor, schedules: MemberSchedules, batch_size: int, lr: float
) -> Tensor:
    """Let all members take one pass over their examples; never more than one step's images are gathered.

    Args:
        ensemble: The members.
        images: All images ``(N, ...)``.
        labels: All labels ``(N,)``.
        schedules: The members' schedules, best on the images' device.
        batch_size: Examples per step.
        lr: The learning rate.

    Returns:
        Whether all losses of each member were finite, boolean ``(M,)``, on the ensemble's device.
    """
    device = ensemble.device
    finite = torch.ones(len(ensemble), dtype=torch.bool, device=device)
    space = None  # one step's images: memory that is had again in each step has to be mapped again
    steps = schedules.steps(batch_size)
    for first in range(0, steps, _TOGETHER):
        stop, losses = min(first + _TOGETHER, steps), []
        chosen = schedules.table[..., first * batch_size : stop * batch_size]  # (m, k) or (k,)
        targets = upload(labels[chosen.to(labels.device)], device).split(batch_size, dim=-1)
        for step, target in zip(range(first, stop), targets, strict=True):
            batch = schedules.batch(step, batch_size)
            flat = batch.index.reshape(-1).to(images.device)
            if space is None:
                space = empty_images(images, len(flat))
            with torch.no_grad():
                inputs = torch.index_select(images, 0, flat, out=space[: len(flat)])
            inputs = inputs.to(device).unflatten(0, batch.index.shape)
            losses.append(ensemble.step(inputs, target, batch.weights, lr, batch.active))
        finite &= torch.stack(losses).isfinite().all(0)
    return finite


Arrays = dict[str, np.ndarray]
Measure = Callable[[Ensemble, range], Mapping[str, np.ndarray]]
MeasureEach = Callable[[dict[str, Tensor], int], Mapping[str, float]]


def retrain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    removed: Sequence[Sequence[int] | np.ndarray],
    settings: RetrainSettings,
    *,
    measure: Measure | None = None,
    measure_each: MeasureEach | None = None,
    chunk: int = 100,
    folder: str | Path | None = None,
    key: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    vectorised: bool | None = None,
    after_chunk: Callable[[Arrays], None] = lambda arrays: None,
    replay: torch.Generator | None = None,
    extra_draws: int = 0,
    deltas: Sequence[float] | None = None,
    permutation: Callable[[int], Tensor] | None = None,
    save_seconds: float = 30.0,
) -> dict[str, np.ndarray]:
    """Train one model for each entry of ``removed``, all from the weights of ``model``, and measure them.

    Models are trained in chunks, each an ``Ensemble``. A resumed run returns the very bits of an uninterrupted one,
    on the same machine with the same chunks; others change roundings, and what dropout draws.

    Args:
        model: The trained model, on its device; left as it is.
        images: All N training images, normalized, ``(N, ...)``; on the model's device or another.
        labels: int64 ``(N,)``.
        removed: What each model goes without, as positions in ``images``. An empty entry is a control: retrained
            by the same rule on all examples, it tells what retraining alone changes.
        settings: How to train.
        measure: Called with each trained chunk and the numbers of its models (positions in ``removed``); returns
            arrays, those of the chunks to be joined along their first axis.
        measure_each: In its place, where measuring takes long: called with the weights of one trained model after
            the other and its number; returns numbers, which are kept before the next model is measured.
        chunk: Models trained side by side; memory grows with it.
        folder: Where to keep finished chunks, and the state of an unfinished one; None for nowhere.
        key: What determines the results beside the arguments (data set, base training): stored in ``folder``.
        resume: Whether to continue from what is in ``folder``.
        overwrite: Whether ``folder`` may contain results with different settings, which are then removed.
        vectorised: Whether chunks train all models at once; None for what is faster.
        after_chunk: Called with the arrays so far, whenever there are more.
        replay: For ``shuffle="replay"``, as ``extra_draws``; see ``mpe.schedules.shuffle_seeds``.
        extra_draws: Numbers drawn after each retraining of the replayed script.
        deltas: An L2 parameter for each model, in place of that of the settings.
        permutation: Gives the order of all N examples in an epoch (from 1), the same for all models, in place of
            the shuffle of the settings.
        save_seconds: The least time between two states of an unfinished chunk.

    Returns:
        The measured arrays of all chunks, joined along their first axis.

    Raises:
        FileError: ``folder`` contains results with different settings, cannot be written, or another process works
                in it.
        TrainingError: A loss is not finite.
    """
    left_out = [np.sort(np.asarray(entry, dtype=np.int64)) for entry in removed]
    seeds = None
    if permutation is None:
        seeds = shuffle_seeds(left_out, settings.shuffle, settings.seed, replay=replay, extra_draws=extra_draws)
    if vectorised is None:
        vectorised = vectorised_is_faster(model, next(model.parameters()).device, settings.batch_size)
    each = [settings.delta] * len(removed) if deltas is None else [float(delta) for delta in deltas]
    run = Run(model, images, labels, left_out, settings, seeds, permutation, each, vectorised)
    if folder is None:
        return _all_chunks(run, None, chunk, measure, measure_each, after_chunk)
    files = RetrainingFiles(Path(folder), {**(key or {}), **run.facts()}, save_seconds)
    with lock(files.folder / LOCK_NAME, "retraining these models"):
        files.start(resume=resume, overwrite=overwrite)
        return _all_chunks(run, files, chunk, measure, measure_each, after_chunk)


def _all_chunks(
    run: Run,
    files: RetrainingFiles | None,
    chunk: int,
    measure: Measure | None,
    measure_each: MeasureEach | None,
    after_chunk: Callable[[Arrays], None],
) -> Arrays:
    """Read what is finished, train the rest, measure what is not measured."""
    count, epochs = len(run.removed), run.settings.epochs
    parts, done = files.finished(count) if files else ([], 0)
    if done:
        log.info("%d of %d models were retrained before", done, count)
        after_chunk(_joined(parts))
    if files and done == count:
        files.forget_states()
    begun = files.chunk_around(done, count) if files and measure_each else None
    chunks = [begun] if begun else []
    start = begun.stop if begun else done
    chunks += [range(first, min(first + chunk, count)) for first in range(start, count, chunk)]
    with tqdm(total=len(chunks) * epochs, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for numbers in chunks:
            bar.set_description(f"models {numbers.start + 1} to {numbers.stop} of {count}")
            ensemble = run.train(numbers, files, bar)
            for these, part in _measured(ensemble, numbers, done, measure, measure_each):
                parts.append(part)
                done = these.stop
                if files:
                    files.finish(these, part, last=done == numbers.stop)
                after_chunk(_joined(parts))
            log.debug("%d of %d models are trained", numbers.stop, count)
    return _joined(parts)


def _measured(
    ensemble: Ensemble, numbers: range, done: int, measure: Measure | None, measure_each: MeasureEach | None
) -> Iterator[tuple[range, Arrays]]:
    """What is measured of a chunk: of all its models at once, or of one after the other from number ``done`` on."""
    if measure is not None:
        yield numbers, {name: np.asarray(values) for name, values in measure(ensemble, numbers).items()}
        return
    for number in range(max(done, numbers.start), numbers.stop):
        row = measure_each(ensemble.member(number - numbers.start), number)
        yield range(number, number + 1), {name: np.array([value]) for name, value in row.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_retraining(experiment: Experiment, retraining: RetrainingConfig, counts: Sequence[int]) -> None:
    """Refuse what cannot be retrained, before anything is trained.

    Args:
        experiment: The experiment.
        retraining: How models will be retrained.
        counts: The number of examples that each model will be trained on.

    Raises:
        ArgumentError: Examples of one class would be left out of examples of one class; the model cannot be
            vectorized and is to be; or BatchNorm would get a last batch of one example, which it cannot normalize.
    """
    config, record = experiment.config, experiment.record
    if min(counts) < experiment.count and len(experiment.train.labels.unique()) < 2:
        raise ArgumentError(
            "subset",
            f"{record['subset']}: its {experiment.count} training examples are of one class; give some of two "
            "classes or more",
        )
    _vectorised(experiment, retraining)
    single = [count for count in counts if min(count, count % config.bs or config.bs) == 1]
    if single and not trains_on_one(experiment.model, experiment.train.image_shape):
        raise ArgumentError(
            "bs",
            f"{config.bs}: {single[0]} examples leave a last batch of one, which this model's BatchNorm cannot "
            "normalize; give another size",
        )


def _vectorised(experiment: Experiment, retraining: RetrainingConfig) -> bool:
    """Whether models are trained as one batch of models."""
    config, reason = experiment.config, why_not_vectorised(experiment.model)
    if retraining.ensemble == "vectorised" and reason:
        raise ArgumentError("ensemble", f"vectorised: {reason} in model {config.model}; give auto or sequential")
    if retraining.ensemble == "auto":
        return vectorised_is_faster(experiment.model, experiment.context.device, config.bs)
    return retraining.ensemble == "vectorised"


def how_to_run(experiment: Experiment, retraining: RetrainingConfig) -> dict[str, Any]:
    """Arguments of ``retrain`` that an experiment determines: where files are, and how models train side by side."""
    config, vectorised = experiment.config, _vectorised(experiment, retraining)
    return {
        "chunk": retraining.ensemble_size if vectorised else 1,  # one after another: each is written when it is done
        "folder": experiment.files.resume / "retraining",
        "resume": config.resume,
        "overwrite": config.overwrite,
        "vectorised": vectorised,
    }


def retrain_without(
    experiment: Experiment,
    retraining: RetrainingConfig,
    images: Tensor,
    removed: Sequence[np.ndarray],
    measure: Measure,
    write: Callable[[Arrays], None],
    *,
    extra_draws: int = 0,
) -> Arrays:
    """Retrain from ``experiment.model`` without some of the examples, many times, resumably.

    Args:
        experiment: The experiment, its model trained.
        retraining: How to retrain.
        images: All training images, normalized.
        removed: Positions that each model goes without.
        measure: See ``retrain``.
        write: Called with what was measured so far, after each chunk of models.
        extra_draws: Numbers that the paper's script draws between two retrainings, for ``replay``.
    """
    config, entry = experiment.config, experiment.context.entry
    settings = RetrainSettings(
        epochs=retraining.epochs_retrain,
        batch_size=config.bs,
        learning_rate=retraining.lr_retrain,
        lr_min=retraining.lrmin_retrain,
        delta=config.delta,
        shuffle=retraining.retrain_shuffle,
        seed=config.seed,
    )
    replay = None
    if settings.shuffle == "replay":
        build = partial(MODELS[config.model].build, entry.num_classes, entry.channels, entry.image_size)
        replay = replay_generator(build, seed=config.seed)
    return retrain(
        experiment.model,
        images,
        experiment.train.labels,
        removed,
        settings,
        measure=measure,
        key=experiment.data_and_model(),  # with the base weights, all that determines the rows
        after_chunk=write,
        replay=replay,
        extra_draws=extra_draws,
        **how_to_run(experiment, retraining),
    )
