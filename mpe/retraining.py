"""Retraining a model without some of its examples, many times: in ensembles, chunk by chunk, and resumable."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpe.orders import Orders, as_positions, own_orders, seeded_permutation, shared_orders, shuffle_seeds
from mpe.retraining_files import RetrainingFiles
from src.artifacts import sole
from src.errors import TrainingError
from src.optimizers import rate
from src.rng import derived_seed
from src.training.ensemble import Ensemble, vectorised_is_faster

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetrainSettings:
    """How networks are retrained.

    Attributes:
        epochs: Passes over the examples that are left.
        batch_size: Examples per step.
        learning_rate: Of the first epoch.
        lr_min: What the cosine schedule falls towards.
        delta: The L2 parameter: the objective is the batch's mean loss plus ``delta / (2 N) |w|^2``, N the number of
            examples that are left.
        shuffle: One of ``mpe.orders.SHUFFLES``.
        seed: Of the shuffles, and of dropout where a network has it.
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
    """16 hex digits of a network's parameters and buffers: equal for equal bits."""
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]


class Run:
    """What all chunks have in common; its arguments are those of ``mpe.retraining.retrain``, checked."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        removed: list[np.ndarray],
        settings: RetrainSettings,
        seeds: list[int] | None,
        permutation: Callable[[int], Tensor] | None,
        deltas: Sequence[float] | None,
        vectorised: bool,
        rate_flag: str,
    ) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.removed, self.settings, self.seeds, self.permutation = removed, settings, seeds, permutation
        self.deltas = [settings.delta] * len(removed) if deltas is None else [float(delta) for delta in deltas]
        self.vectorised, self.rate_flag = vectorised, rate_flag

    def facts(self) -> dict[str, Any]:
        """What determines the results, as plain values."""
        orders = hashlib.sha256()
        for entry in self.removed:
            orders.update(np.int64(len(entry)).tobytes() + entry.tobytes())
        if self.seeds is not None:
            orders.update(np.asarray(self.seeds, dtype=np.int64).tobytes())
        if self.permutation is not None:
            orders.update(self.permutation(1).cpu().numpy().astype(np.int64).tobytes())
        return {
            **asdict(self.settings),
            "networks": len(self.removed),
            "examples": len(self.images),
            "deltas": self.deltas if len(set(self.deltas)) > 1 else self.deltas[0],
            "order": orders.hexdigest()[:16],
            "base_weights": weights_hash(self.model),
        }

    def orders(self, numbers: range, epoch: int) -> Orders:
        """Which examples the networks of a chunk see in an epoch."""
        removed, total = [self.removed[number] for number in numbers], len(self.images)
        if self.permutation is not None:
            permutation = self.permutation(epoch)
            if len(permutation) != total:
                raise ValueError(f"the order has {len(permutation)} entries for {total} examples")
            orders = shared_orders(removed, permutation)
        elif self.settings.shuffle == "shared":
            orders = shared_orders(removed, seeded_permutation(total, self.seeds[0]))
        else:
            orders = own_orders(removed, [self.seeds[number] for number in numbers], total)
        return orders.to(self.images.device)

    def train(self, numbers: range, files: RetrainingFiles | None, bar: tqdm) -> Ensemble:
        """Train one chunk, from the newest state of it if there is one."""
        settings = self.settings
        ensemble, done = self._resumed(numbers, files)
        bar.update(done)
        orders = None
        devices = [ensemble.device] if ensemble.device.type == "cuda" else []
        for epoch in range(done + 1, settings.epochs + 1):
            if orders is None or self.permutation is not None:
                orders = self.orders(numbers, epoch)
            lr = rate("cosine", epoch, settings.epochs, settings.learning_rate, settings.lr_min)
            with torch.random.fork_rng(devices=devices):  # dropout can only draw from the global generators
                torch.manual_seed(derived_seed(settings.seed, epoch, f"retraining {numbers.start}"))
                finite = one_epoch(ensemble, self.images, self.labels, orders, settings.batch_size, lr)
            self._check(finite, numbers, epoch)
            if files:
                files.save(ensemble, numbers, epoch, settings.epochs)
            bar.update()
        self._check(ensemble.finite(), numbers, settings.epochs)
        return ensemble

    def _resumed(self, numbers: range, files: RetrainingFiles | None) -> tuple[Ensemble, int]:
        """A chunk as it was left, and how many epochs it has done."""
        for path, epoch, state in files.states(numbers, self.settings.epochs) if files else ():
            ensemble = self._ensemble(numbers)  # afresh: a state that does not fit may have been taken in part
            try:
                ensemble.restore(state)
            except ValueError as error:
                log.warning("%s: %s; using the state before it", path, error)
                continue
            log.info("going on after epoch %d of %d", epoch, self.settings.epochs)
            return ensemble, epoch
        return self._ensemble(numbers), 0

    def _ensemble(self, numbers: range) -> Ensemble:
        total = len(self.images)
        l2 = [self.deltas[number] / (total - len(self.removed[number])) for number in numbers]
        return Ensemble(
            self.model,
            len(numbers),
            l2=torch.tensor(l2, dtype=torch.float64),
            optimizer=self.settings.optimizer,
            vectorised=self.vectorised,
        )

    def _check(self, finite: Tensor, numbers: range, epoch: int) -> None:
        if bool(finite.all()):
            return
        number = numbers[int((~finite).nonzero()[0])]
        raise TrainingError(
            f"the loss is not finite in epoch {epoch} of retraining network {number + 1} of {len(self.removed)}; "
            f"a smaller {self.rate_flag} may help (it is {self.settings.learning_rate:g})"
        )


def one_epoch(
    ensemble: Ensemble, images: Tensor, labels: Tensor, orders: Orders, batch_size: int, lr: float
) -> Tensor:
    """Let all members take one pass over their examples; never more than one step's images are gathered.

    Args:
        ensemble: The members.
        images: All images ``(N, ...)``.
        labels: All labels ``(N,)``.
        orders: The members' orders, best on the images' device.
        batch_size: Examples per step.
        lr: The learning rate.

    Returns:
        Whether all losses of each member were finite, boolean ``(M,)``, on the ensemble's device.
    """
    device = ensemble.device
    finite = torch.ones(len(ensemble), dtype=torch.bool, device=device)
    space = None  # one step's images: memory that is had anew in each step has to be mapped anew
    for step in range(orders.steps(batch_size)):
        batch = orders.batch(step, batch_size)
        flat = batch.index.reshape(-1).to(images.device)
        if space is None:
            space = images.new_empty((len(flat), *images.shape[1:]))
        with torch.no_grad():
            chosen = torch.index_select(images, 0, flat, out=space[: len(flat)])
        chosen = chosen.to(device).unflatten(0, batch.index.shape)
        targets = labels.index_select(0, flat.to(labels.device)).to(device).view(batch.index.shape)
        weights = None if batch.weights is None else batch.weights.to(device)
        finite &= ensemble.step(chosen, targets, weights, lr, batch.active).isfinite()
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
    after_chunk: Callable[[dict[str, np.ndarray], int], None] | None = None,
    replay: torch.Generator | None = None,
    extra_draws: int = 0,
    deltas: Sequence[float] | None = None,
    permutation: Callable[[int], Tensor] | None = None,
    rate_flag: str = "--lr_retrain",
    save_seconds: float = 30.0,
) -> dict[str, np.ndarray]:
    """Train one network for each entry of ``removed``, all from the weights of ``model``, and measure them.

    Networks are trained in chunks, each an ``Ensemble``. A resumed run returns the very bits of one that was not
    interrupted, on the same machine and with the same chunks. (Other chunks change the results by rounding, and by
    other draws where a network has dropout.)

    Args:
        model: The trained network, on its device; left as it is.
        images: All N training images, normalised, ``(N, ...)``; on the model's device or another.
        labels: int64 ``(N,)``.
        removed: What each network goes without, as positions in ``images``. An empty entry is a control: retrained
            by the same rule on all examples, it tells what retraining alone changes.
        settings: How to train.
        measure: Called with each trained chunk and the numbers of its networks (places in ``removed``); returns
            arrays, those of the chunks to be joined along their first axis.
        measure_each: In its place, where measuring takes long: called with the weights of one trained network after
            the other and its number; returns numbers, which are kept before the next network is measured.
        chunk: Networks trained side by side; memory grows with it.
        folder: Where to keep finished chunks, and the state of an unfinished one; None for nowhere.
        key: What determines the results beside the arguments (data set, base training): stored in ``folder``.
        resume: Whether to go on with what is in ``folder``.
        overwrite: Whether ``folder`` may hold results of other settings, which are then removed.
        vectorised: Whether chunks train all networks at once; None for what is faster.
        after_chunk: Called as ``f(arrays so far, networks done)`` after each chunk, or each network where these are
            measured one by one, and after finished ones were read.
        replay: For ``shuffle="replay"``, see ``mpe.orders.shuffle_seeds``; so is ``extra_draws``.
        extra_draws: Numbers drawn after each retraining of the replayed script.
        deltas: An L2 parameter for each network, in place of that of the settings.
        permutation: Gives the order of all N examples in an epoch (from 1), the same for all networks, in place of
            the shuffle of the settings.
        rate_flag: The flag of the learning rate, for messages.
        save_seconds: The state of an unfinished chunk is written after an epoch if so many seconds have passed since
            the last time.

    Returns:
        The measured arrays of all chunks, joined along their first axis.

    Raises:
        FileError: ``folder`` holds results of other settings, cannot be written, or another process works in it.
        TrainingError: A loss is not finite.
        ValueError: Arguments do not belong together.
    """
    total = len(images)
    if (measure is None) == (measure_each is None):
        raise ValueError("give either measure or measure_each")
    if chunk < 1 or settings.epochs < 1 or settings.batch_size < 1:
        raise ValueError("chunk, epochs and batch_size must be at least 1")
    if len(labels) != total or not len(removed):
        raise ValueError(f"{total} images, {len(labels)} labels, {len(removed)} networks to retrain")
    if deltas is not None and len(deltas) != len(removed):
        raise ValueError(f"{len(deltas)} values of delta for {len(removed)} networks")
    left_out = [as_positions(entry, total) for entry in removed]
    seeds = None
    if permutation is None:
        seeds = shuffle_seeds(left_out, settings.shuffle, settings.seed, replay=replay, extra_draws=extra_draws)
    if vectorised is None:
        vectorised = vectorised_is_faster(model, next(model.parameters()).device, settings.batch_size)
    run = Run(model, images, labels, left_out, settings, seeds, permutation, deltas, vectorised, rate_flag)
    after_chunk = after_chunk or (lambda arrays, done: None)
    if folder is None:
        return _all_chunks(run, None, chunk, measure, measure_each, after_chunk)
    files = RetrainingFiles(Path(folder), {**(key or {}), **run.facts()}, save_seconds)
    with sole(files.claim, "retraining these models"):
        files.start(resume=resume, overwrite=overwrite)
        return _all_chunks(run, files, chunk, measure, measure_each, after_chunk)


def _all_chunks(
    run: Run,
    files: RetrainingFiles | None,
    chunk: int,
    measure: Measure | None,
    measure_each: MeasureEach | None,
    after_chunk: Callable[[Arrays, int], None],
) -> Arrays:
    """Read what is finished, train the rest, measure what is not measured."""
    count, epochs = len(run.removed), run.settings.epochs
    parts, done = files.finished(count) if files else ([], 0)
    if done:
        log.info("%d of %d networks were retrained before", done, count)
        after_chunk(_joined(parts), done)
    if files and done == count:
        files.forget_states()
    begun = files.chunk_around(done, count) if files and measure_each else None
    chunks = [begun] if begun else []
    start = begun.stop if begun else done
    chunks += [range(first, min(first + chunk, count)) for first in range(start, count, chunk)]
    with tqdm(total=len(chunks) * epochs, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        for numbers in chunks:
            bar.set_description(f"networks {numbers.start + 1} to {numbers.stop} of {count}")
            ensemble = run.train(numbers, files, bar)
            for these, part in _measured(ensemble, numbers, done, measure, measure_each):
                parts.append(part)
                done = these.stop
                if files:
                    files.finish(these, part, last=done == numbers.stop)
                after_chunk(_joined(parts), done)
            log.info("%d of %d networks are trained", numbers.stop, count)
    return _joined(parts)


def _measured(
    ensemble: Ensemble, numbers: range, done: int, measure: Measure | None, measure_each: MeasureEach | None
) -> Iterator[tuple[range, Arrays]]:
    """What is measured of a chunk: of all its networks at once, or of one after the other from number ``done`` on."""
    if measure is not None:
        yield numbers, {name: np.asarray(values) for name, values in measure(ensemble, numbers).items()}
        return
    for number in range(max(done, numbers.start), numbers.stop):
        row = measure_each(ensemble.member(number - numbers.start), number)
        yield range(number, number + 1), {name: np.array([value]) for name, value in row.items()}


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
