"""Retrain a model many times, each time without some of its examples: in ensembles, in chunks, and resumable."""

import hashlib
import logging
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
from mpe.posterior import sgd_time
from mpe.retraining_files import RetrainingFiles, part_folder
from mpe.schedules import (
    MemberSchedules,
    own_schedules,
    replay_generator,
    seeded_permutation,
    shared_schedules,
    shuffle_seeds,
)
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME
from src.datasets import empty_images
from src.devices import upload
from src.errors import ArgumentError, TrainingError
from src.models import model_entry
from src.models.base import trains_on_one, two_images
from src.optimizers import rate
from src.rng import derived_seed
from src.training.ensemble import Ensemble, vectorised_is_faster, why_not_vectorised

log = logging.getLogger(__name__)

_TOGETHER = 64  # number of steps whose labels are gathered, and whose losses are checked, at once


@dataclass(frozen=True)
class RetrainSettings:
    """How models are retrained.

    Attributes:
        epochs: Number of passes over the remaining examples.
        batch_size: Examples per step.
        learning_rate: Learning rate of the first epoch.
        lr_min: Final learning rate of the cosine schedule.
        delta: The L2 parameter. The objective is the batch's mean loss plus ``delta / (2 N) |w|^2``, where N is the
            number of remaining examples.
        shuffle: One of ``mpe.config.SHUFFLES``.
        seed: Seed for shuffling, and for dropout if the model has it.
        optimizer: ``sgd`` (momentum 0.9), ``adam``, or ``adamw``.
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
    """Hash a model's parameters and buffers bit by bit, as 16 hex digits."""
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """The data and settings shared by all chunks. The fields are the checked arguments of ``retrain``."""

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
        """All settings that determine the results, as plain values."""
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
        """The examples that the models of a chunk see in an epoch."""
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
        """Train one chunk, continuing from its newest state if there is one."""
        settings = self.settings
        ensemble, done = self._resumed(numbers, files)
        bar.update(done)
        schedules = None
        devices = [ensemble.device] if ensemble.device.type == "cuda" else []
        for epoch in range(done + 1, settings.epochs + 1):
            if schedules is None or self.permutation is not None:
                schedules = self.schedules(numbers, epoch)
            lr = rate("cosine", epoch, settings.epochs, settings.learning_rate, settings.lr_min)
            with torch.random.fork_rng(devices=devices):  # dropout always draws from the global generators
                torch.manual_seed(derived_seed(settings.seed, epoch, f"retraining {numbers.start}"))
                finite = one_epoch(ensemble, self.images, self.labels, schedules, settings.batch_size, lr)
            self._check(finite, numbers, epoch)
            if files:
                files.save(ensemble, numbers, epoch, settings.epochs)
            bar.update()
        self._check(ensemble.finite(), numbers, settings.epochs)
        return ensemble

    def _resumed(self, numbers: range, files: RetrainingFiles | None) -> tuple[Ensemble, int]:
        """Restore a chunk from its newest state, and return it with its number of finished epochs."""
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
            ensemble = build()  # rebuilt for each state, since a state that does not fit may be partly loaded
            try:
                ensemble.restore(state)
            except ValueError as error:
                log.warning("%s: %s; using the previous state", path, error)
                continue
            log.info("continuing retraining after epoch %d of %d", epoch, self.settings.epochs)
            return ensemble, epoch
        return build(), 0

    def _check(self, finite: Tensor, numbers: range, epoch: int) -> None:
        if bool(finite.all()):
            return
        number = numbers[int((~finite).nonzero()[0])]
        raise TrainingError(
            f"the loss is not finite in epoch {epoch} of retraining model {number + 1} of {len(self.removed)}; "
            f"try a lower learning rate (currently {self.settings.learning_rate:g})"
        )


def one_epoch(
    ensemble: Ensemble, images: Tensor, labels: Tensor, schedules: MemberSchedules, batch_size: int, lr: float
) -> Tensor:
    """Train all members for one epoch, gathering the images of only one step at a time.

    Args:
        ensemble: The members.
        images: All images ``(N, ...)``.
        labels: All labels ``(N,)``.
        schedules: The members' schedules, ideally on the images' device.
        batch_size: Examples per step.
        lr: The learning rate.

    Returns:
        Whether all losses of each member are finite, boolean ``(M,)``, on the ensemble's device.
    """
    device = ensemble.device
    finite = torch.ones(len(ensemble), dtype=torch.bool, device=device)
    space = None  # a reused buffer for one step's images: allocating it in every step would map its memory again
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
    part: range | None = None,
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
    """Train and measure one model for each entry of ``removed``, starting from the weights of ``model``.

    Models are trained in chunks, each an ``Ensemble``. On the same machine with the same chunks, a resumed run
    returns bit-identical results. Different chunks change rounding and the random numbers of dropout.

    Args:
        model: The trained model, on its device; unchanged.
        images: All N training images, normalized, ``(N, ...)``; on the model's device or another.
        labels: int64 ``(N,)``.
        removed: The positions in ``images`` that each model is trained without. An empty entry is a control:
            retrained on all examples in the same way, it shows the effect of retraining alone.
        settings: How to train.
        measure: Called with each trained chunk and the numbers of its models (positions in ``removed``). Returns
            arrays, which are concatenated over chunks along their first axis.
        measure_each: Replaces ``measure`` if measuring takes long. Called with the weights and the number of one
            trained model at a time. Returns numbers, which are saved before the next model is measured.
        chunk: Number of models trained in parallel; memory grows with it.
        folder: Folder for finished chunks and the state of an unfinished one; None to store nothing.
        part: The numbers of the models to train, in a subfolder of ``folder``. Several processes can train different
            parts at once. A run of all models with ``resume`` then starts from their results. None for all models.
        key: Other settings that determine the results (data set, base training); stored in ``folder``.
        resume: Whether to continue from the files in ``folder``.
        overwrite: Whether to remove results with different settings from ``folder``.
        vectorised: Whether to train all models of a chunk at once; None for whichever is faster.
        after_chunk: Called with all arrays so far whenever there are new ones.
        replay: For ``shuffle="replay"``, see ``mpe.schedules.shuffle_seeds``.
        extra_draws: For ``shuffle="replay"``, how many numbers the replayed script draws after each retraining.
        deltas: One L2 parameter per model, which replaces that of the settings.
        permutation: Returns the order of all N examples in an epoch (from 1), shared by all models; it replaces the
            shuffle of the settings.
        save_seconds: The minimum time between two states of an unfinished chunk, in seconds.

    Returns:
        The measured arrays of all chunks, concatenated along their first axis.

    Raises:
        FileError: ``folder`` has results with different settings, cannot be written, or is in use by another process.
        TrainingError: A loss is not finite.
    """
    left_out = [np.sort(np.asarray(entry, dtype=np.int64)) for entry in removed]
    seeds = None
    if permutation is None:
        seeds = shuffle_seeds(left_out, settings.shuffle, settings.seed, replay=replay, extra_draws=extra_draws)
    if vectorised is None:
        device = next(model.parameters()).device
        vectorised = not why_not_vectorised(model, images[:2]) and vectorised_is_faster(
            model, device, settings.batch_size
        )
    each = [settings.delta] * len(removed) if deltas is None else [float(delta) for delta in deltas]
    run = Run(model, images, labels, left_out, settings, seeds, permutation, each, vectorised)
    numbers = range(len(removed)) if part is None else part
    if folder is None:
        return _all_chunks(run, None, numbers, chunk, measure, measure_each, after_chunk)
    settings_of_all = {**(key or {}), **run.facts()}
    folder = Path(folder) if part is None else part_folder(Path(folder), part)
    files = RetrainingFiles(folder, settings_of_all, save_seconds)
    with lock(files.folder / LOCK_NAME, "retraining these models"):
        files.start(resume=resume, overwrite=overwrite)
        if part is None and resume:
            files.add_parts(overwrite=overwrite)
        return _all_chunks(run, files, numbers, chunk, measure, measure_each, after_chunk)


def _all_chunks(
    run: Run,
    files: RetrainingFiles | None,
    numbers: range,
    chunk: int,
    measure: Measure | None,
    measure_each: MeasureEach | None,
    after_chunk: Callable[[Arrays], None],
) -> Arrays:
    """Read finished chunks, train the remaining models, and measure those not measured yet."""
    stop, epochs = numbers.stop, run.settings.epochs
    parts, done = files.finished(numbers) if files else ([], numbers.start)
    if done > numbers.start:
        log.info("%d of %d models were retrained in an earlier run", done - numbers.start, len(numbers))
        after_chunk(_joined(parts))
    if files and done == stop:
        files.forget_states()
    begun = files.chunk_around(done, stop) if files and measure_each else None
    chunks = [begun] if begun else []
    start = begun.stop if begun else done
    chunks += [range(first, min(first + chunk, stop)) for first in range(start, stop, chunk)]
    with tqdm(total=len(chunks) * epochs, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for these in chunks:
            bar.set_description(f"models {these.start + 1} to {these.stop} of {len(run.removed)}")
            ensemble = run.train(these, files, bar)
            for measured, part in _measured(ensemble, these, done, measure, measure_each):
                parts.append(part)
                done = measured.stop
                if files:
                    files.finish(measured, part, last=done == these.stop)
                after_chunk(_joined(parts))
            log.debug("retrained %d of %d models", these.stop, len(run.removed))
    return _joined(parts)


def _measured(
    ensemble: Ensemble, numbers: range, done: int, measure: Measure | None, measure_each: MeasureEach | None
) -> Iterator[tuple[range, Arrays]]:
    """Measure a chunk: all its models at once, or one at a time starting at number ``done``."""
    if measure is not None:
        yield numbers, {name: np.asarray(values) for name, values in measure(ensemble, numbers).items()}
        return
    for number in range(max(done, numbers.start), numbers.stop):
        row = measure_each(ensemble.member(number - numbers.start), number)
        yield range(number, number + 1), {name: np.array([value]) for name, value in row.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def check_retraining(experiment: Experiment, retraining: RetrainingConfig, counts: Sequence[int]) -> None:
    """Refuse experiments that cannot be retrained, before anything is trained.

    Args:
        experiment: The experiment.
        retraining: How models will be retrained.
        counts: The number of examples that each model will be trained on.

    Raises:
        ArgumentError: All training examples belong to one class; vectorized training is requested but the model does
            not support it; or the last batch would have one example, which BatchNorm cannot normalize.
    """
    config, record = experiment.config, experiment.record
    if min(counts) < experiment.count and len(experiment.train.labels.unique()) < 2:
        raise ArgumentError(
            chosen := "exclude" if record["subset"] is None else "subset",
            f"{record[chosen]}: its {experiment.count} training examples belong to one class; give examples of at "
            "least two classes",
        )
    if frozen := [name for name, value in experiment.model.named_parameters() if not value.requires_grad]:
        raise ArgumentError("model", f"{config.model}: retraining trains all parameters, but {frozen[0]} is frozen")
    _vectorised(experiment, retraining)
    single = [count for count in counts if min(count, count % config.bs or config.bs) == 1]
    if single and not trains_on_one(experiment.model, experiment.train.image_shape):
        raise ArgumentError(
            "bs",
            f"{config.bs}: with {single[0]} examples, the last batch has one example, which this model's BatchNorm "
            "cannot normalize; give another batch size",
        )


def _vectorised(experiment: Experiment, retraining: RetrainingConfig) -> bool:
    """Whether models are trained in vectorized ensembles."""
    channels, size, _ = experiment.train.image_shape
    config, reason = experiment.config, why_not_vectorised(experiment.model, two_images(channels, size))
    if retraining.ensemble == "vectorised" and reason:
        raise ArgumentError("ensemble", f"vectorised: {reason} in model {config.model}; give auto or sequential")
    if retraining.ensemble == "auto":
        return not reason and vectorised_is_faster(experiment.model, experiment.context.device, config.bs)
    return retraining.ensemble == "vectorised"


def how_to_run(experiment: Experiment, retraining: RetrainingConfig) -> dict[str, Any]:
    """The arguments of ``retrain`` that an experiment determines: the folder, and how models train in parallel."""
    config, vectorised = experiment.config, _vectorised(experiment, retraining)
    return {
        "chunk": retraining.ensemble_size if vectorised else 1,  # sequential: write each model when it is finished
        "folder": experiment.files.resume / "retraining",
        "resume": config.resume,
        "overwrite": config.overwrite,
        "vectorised": vectorised,
    }


def retraining_time(experiment: Experiment, retraining: RetrainingConfig, count: int) -> float | None:
    """The ``time`` of ``laplace_posterior`` for retraining on ``count`` examples; None without ``--finite_time``."""
    if not experiment.config.finite_time:
        return None
    rates = retraining.lr_retrain, retraining.lrmin_retrain
    return sgd_time(retraining.epochs_retrain, *rates, count, experiment.config.bs)


def retrain_without(
    experiment: Experiment,
    retraining: RetrainingConfig,
    images: Tensor,
    removed: Sequence[np.ndarray],
    measure: Measure,
    write: Callable[[Arrays], None],
    *,
    extra_draws: int = 0,
    part: range | None = None,
) -> Arrays:
    """Retrain many times, each time without some of the examples, from ``experiment.model`` or from scratch.

    The run can be resumed.

    Args:
        experiment: The experiment, with a trained model.
        retraining: How to retrain.
        images: All training images, normalized.
        removed: The positions that each model is trained without.
        measure: See ``retrain``.
        write: Called with all measurements so far after each chunk of models.
        extra_draws: For ``replay``, how many numbers the paper's script draws between two retrainings.
        part: The numbers of the models to retrain; see ``retrain``.
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
        build = partial(model_entry(config.model).build, entry.num_classes, entry.channels, entry.image_size)
        replay = replay_generator(build, seed=config.seed)
    return retrain(
        experiment.model if retraining.retrain_from == "base" else experiment.build(),
        images,
        experiment.train.labels,
        removed,
        settings,
        measure=measure,
        key=experiment.data_and_model(),  # together with the base weights, these determine the rows
        after_chunk=write,
        part=part,
        replay=replay,
        extra_draws=extra_draws,
        **how_to_run(experiment, retraining),
    )
