"""Retraining, one chunk of networks at a time: its settings, its orders, and the training of an ensemble."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpe.orders import Orders, own_orders, seeded_permutation, shared_orders
from mpe.retraining_files import RetrainingFiles
from src.draws import derived_seed
from src.errors import TrainingError
from src.optimizers import rate
from src.training.ensemble import Ensemble

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
