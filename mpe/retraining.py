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

from mpe.config import ORDERS
from mpe.experiment import Experiment
from mpe.schedules import (
    Orders,
    as_positions,
    own_orders,
    replay_generator,
    seeded_permutation,
    shared_orders,
    shuffle_seeds,
)
from src.artifacts import (
    CLAIM_NAME,
    differences,
    read_checkpoint,
    read_json,
    read_npz,
    refuse_other_settings,
    require_writable,
    sole,
    write_checkpoint,
    write_json,
    write_npz,
)
from src.errors import FileError, FlagError, TrainingError
from src.models import MODELS
from src.models.base import trains_on_one
from src.optimizers import rate
from src.rng import derived_seed
from src.training.ensemble import Ensemble, vectorised_is_faster, why_not_vectorised

STATE_FORMAT = "retraining-1"

_KEEP_STATES = 2  # the newest, and the one before it in case that one is damaged
_CHUNK = re.compile(r"networks_(\d+)_(\d+)\.npz")
_STATE = re.compile(r"state_(\d+)_(\d+)_epoch_(\d+)\.pt")

_NUMBERS = "model_numbers"  # the entry that says which models a file is of; files of older versions lack it


def _refuse_another(path: Path, said: Any, numbers: range) -> None:
    """Stop at a file that was copied or renamed, and is of other models than its name says."""
    if said is not None and not np.array_equal(said, [numbers.start, numbers.stop]):
        raise FileError(f"{path}: is of other models than its name says; it was copied or renamed")


class RetrainingFiles:
    """The folder of one run.

    It holds ``settings.json``, ``networks_{start}_{stop}.npz`` for each finished chunk (or network, where these are
    measured one by one), and ``state_{start}_{stop}_epoch_{e}.pt`` of the unfinished chunk. Networks are counted from
    0, ``stop`` is exclusive. All files are of the settings in ``settings.json``.

    Args:
        folder: The folder.
        settings: Everything that determines the results.
        save_seconds: States are written if so many seconds have passed since the last.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], save_seconds: float) -> None:
        self.folder, self.settings, self.save_seconds = folder, dict(settings), save_seconds
        self._saved = time.monotonic()

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder.

        Raises:
            FileError: It holds results of other settings, or is damaged, and ``overwrite`` is off.
        """
        require_writable(self.folder)
        path = self.folder / "settings.json"
        mine = [file for file in self.folder.iterdir() if _CHUNK.fullmatch(file.name) or _STATE.fullmatch(file.name)]
        stored: Any = None
        if path.exists() or mine:
            try:
                stored = read_json(path)
                if not isinstance(stored, dict):
                    raise FileError(f"{path}: is damaged, it holds no settings; make it anew")
            except FileError as error:
                if not overwrite:
                    raise FileError(f"{error}; give --overwrite to retrain anew, or choose other folders") from error
        if stored is not None and not overwrite:
            refuse_other_settings(self.folder, stored, self.settings)
        if not resume or stored is None or differences(stored, self.settings):
            for file in mine:
                file.unlink()
        write_json(path, self.settings)

    @property
    def claim(self) -> Path:
        """The lock of the process that retrains."""
        return self.folder / CLAIM_NAME

    def finished(self, count: int) -> tuple[list[dict[str, np.ndarray]], int]:
        """The arrays of finished chunks, from network 0 on without a gap, and how many networks they are of.

        Damaged files are passed over, with a warning.
        """
        names = [_CHUNK.fullmatch(file.name) for file in self.folder.iterdir()]
        chunks = sorted((int(name[1]), int(name[2])) for name in names if name)
        parts: list[dict[str, np.ndarray]] = []
        reached = 0
        for start, stop in chunks:
            if start != reached or not start < stop <= count:
                continue
            path = self._chunk(range(start, stop))
            try:
                part = read_npz(path)
                _refuse_another(path, part.pop(_NUMBERS, None), range(start, stop))
                numbers = all(values.ndim and values.dtype.kind in "biuf" for values in part.values())
                if not numbers or max(map(len, part.values()), default=0) != stop - start:  # a control has fewer
                    raise FileError(f"{path}: does not have numbers for {stop - start} networks")
                if parts and _rows(part) != _rows(parts[0]):
                    raise FileError(f"{path}: does not have what the chunks before it have")
            except FileError as error:
                log.warning("%s; these networks are retrained", error)
                continue
            parts.append(part)
            reached = stop
        return parts, reached

    def chunk_around(self, number: int, count: int) -> range | None:
        """The chunk that was trained but not measured to its end, if ``number`` is the first that was not."""
        for file in self.folder.iterdir():
            name = _STATE.fullmatch(file.name)
            if name and int(name[1]) < number < int(name[2]) <= count:
                return range(int(name[1]), int(name[2]))
        return None

    def finish(self, numbers: range, part: Mapping[str, np.ndarray], *, last: bool = True) -> None:
        """Write what was measured; after a chunk's last networks, remove what only an unfinished one needs."""
        write_npz(self._chunk(numbers), **part, **{_NUMBERS: np.array([numbers.start, numbers.stop])})
        if last:
            self.forget_states()

    def forget_states(self) -> None:
        """Remove what only an unfinished chunk needs."""
        for file in self.folder.iterdir():
            if _STATE.fullmatch(file.name):
                file.unlink(missing_ok=True)

    def save(self, ensemble: Ensemble, numbers: range, epoch: int, epochs: int) -> None:
        """Write the state after an epoch, if it is time; after the last one always, as measuring may fail."""
        if epoch < epochs and time.monotonic() - self._saved < self.save_seconds:
            return
        state = {"format": STATE_FORMAT, "settings": self.settings, "epoch": epoch, "ensemble": ensemble.state()}
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
                if (state.get("format"), state.get("epoch")) != (STATE_FORMAT, epoch) or epoch > epochs:
                    raise FileError(f"{path}: is not the state of such a chunk")
                _refuse_another(path, state.get(_NUMBERS), numbers)
                if not isinstance(state.get("settings"), dict) or not isinstance(state.get("ensemble"), dict):
                    raise FileError(f"{path}: is not the state of such a chunk")
                if differences(state["settings"], self.settings):
                    raise FileError(f"{path}: is of other settings")
            except FileError as error:
                log.warning("%s; using the state before it", error)
                continue
            yield path, epoch, state["ensemble"]

    def _states(self, numbers: range) -> list[int]:
        """The epochs of a chunk's states, newest first."""
        names = [_STATE.fullmatch(file.name) for file in self.folder.iterdir()]
        chunk = (numbers.start, numbers.stop)
        return sorted(
            (int(name[3]) for name in names if name and (int(name[1]), int(name[2])) == chunk), reverse=True
        )

    def _chunk(self, numbers: range) -> Path:
        return self.folder / f"networks_{numbers.start}_{numbers.stop}.npz"

    def _state(self, numbers: range, epoch: int) -> Path:
        return self.folder / f"state_{numbers.start}_{numbers.stop}_epoch_{epoch}.pt"


def _rows(part: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """What each network has in a chunk: kind and shape by name."""
    return {name: (values.dtype.kind, values.shape[1:]) for name, values in part.items()}


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
        shuffle: One of ``mpe.schedules.SHUFFLES``.
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
        replay: For ``shuffle="replay"``, see ``mpe.schedules.shuffle_seeds``; so is ``extra_draws``.
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


Rows = dict[str, np.ndarray]


def check_retraining(experiment: Experiment) -> None:
    """Refuse flags of retraining that cannot be followed, before anything is trained.

    Raises:
        FlagError: Nothing would be left to retrain on, or the network cannot be
            vectorised and is to be.
    """
    args = experiment.args
    if len(experiment.labels.unique()) < 2:
        raise FlagError(
            f"--subset {args.subset}: its {experiment.count} training examples are of one class; give some of two "
            "classes or more"
        )
    vectorised(experiment)


def check_last_batches(experiment: Experiment, counts: Sequence[int]) -> None:
    """Refuse a batch size that leaves BatchNorm a last batch of one example, which it cannot normalise.

    Args:
        experiment: The experiment.
        counts: Of how many examples networks will be trained.

    Raises:
        FlagError: It does.
    """
    size, shape = experiment.args.bs, experiment.train.image_shape
    single = [count for count in counts if min(count, count % size or size) == 1]
    if single and not trains_on_one(experiment.model, shape):
        raise FlagError(
            f"--bs {size}: {single[0]} examples leave a last batch of one, which this network's BatchNorm cannot "
            "normalise; give another size"
        )


def vectorised(experiment: Experiment) -> bool:
    """Whether networks are trained as one batch of networks.

    Raises:
        FlagError: The network cannot be, and is to be.
    """
    args, reason = experiment.args, why_not_vectorised(experiment.model)
    if args.ensemble == "vectorised" and reason:
        raise FlagError(f"--ensemble vectorised: {reason} in --model {args.model}; give auto or sequential")
    if args.ensemble == "auto":
        return vectorised_is_faster(experiment.model, experiment.device, args.bs)
    return args.ensemble == "vectorised"


def retrain_without(
    experiment: Experiment,
    images: Tensor,
    removed: Sequence[np.ndarray],
    measure: Measure,
    write: Callable[[Rows], None],
    *,
    extra_draws: int = 0,
) -> Rows:
    """Retrain from ``experiment.model`` without some of the examples, many times, resumably.

    Args:
        experiment: The experiment, its network trained.
        images: All training images, normalised.
        removed: Positions that each network goes without.
        measure: See ``mpe.retraining.retrain``.
        write: Called with what was measured so far, after each chunk of networks.
        extra_draws: Numbers that the paper's script draws between two retrainings, for ``replay``.
    """
    args, entry = experiment.args, experiment.entry
    settings = RetrainSettings(
        epochs=args.epochs_retrain,
        batch_size=args.bs,
        learning_rate=args.lr_retrain,
        lr_min=args.lrmin_retrain,
        delta=args.delta,
        shuffle=args.retrain_shuffle,
        seed=args.seed,
    )
    replay = None
    if args.retrain_shuffle == "replay":
        build = partial(MODELS[args.model].build, entry.num_classes, entry.channels, entry.image_size)
        replay = replay_generator(build, seed=args.seed)
    key = experiment.shared_settings()  # with the base weights, all that determines the rows
    more = {"measure": measure, "replay": replay, "extra_draws": extra_draws}
    return _run(experiment, images, removed, settings, key, write, **more)


def train_with_deltas(
    experiment: Experiment,
    images: Tensor,
    deltas: Sequence[float],
    optimizer: str,
    measure: MeasureEach,
    write: Callable[[Rows], None],
) -> Rows:
    """Train one network for each L2 parameter from the same initial weights on the same batches, resumably.

    Args:
        experiment: The experiment, its network as it was built.
        images: All training images, normalised.
        deltas: The L2 parameters.
        optimizer: sgd, adam or adamw.
        measure: See ``measure_each`` of ``mpe.retraining.retrain``: curvature and variances of a network take long.
        write: Called with what was measured so far, after each network.
    """
    args = experiment.args
    settings = RetrainSettings(
        epochs=args.epochs,
        batch_size=args.bs,
        learning_rate=args.lr,
        lr_min=args.lrmin,
        delta=0.0,  # each has its own
        seed=args.seed,
        optimizer=optimizer,
    )
    nothing = [np.empty(0, np.int64)] * len(deltas)
    batches = experiment.batches(experiment.train, experiment.count, ORDERS[args.base_shuffle])
    more = {"deltas": list(deltas), "permutation": batches.visited, "rate_flag": "--lr"}
    return _run(experiment, images, nothing, settings, experiment.settings(), write, measure_each=measure, **more)


def _run(
    experiment: Experiment,
    images: Tensor,
    removed: Sequence[np.ndarray],
    settings: RetrainSettings,
    key: Mapping[str, Any],
    write: Callable[[Rows], None],
    **more: Any,
) -> Rows:
    args, at_once = experiment.args, vectorised(experiment)
    return retrain(
        experiment.model,
        images,
        experiment.labels,
        removed,
        settings,
        chunk=args.ensemble_size if at_once else 1,  # one after another: each is written when it is done
        folder=experiment.files.resume / "retraining",
        key=key,
        resume=args.resume,
        overwrite=args.overwrite,
        vectorised=at_once,
        after_chunk=lambda rows, done: write(rows),
        **more,
    )
