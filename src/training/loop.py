"""The training loop: epochs of steps, evaluation, schedule, dynamics."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.datasets import Batch, Batches
from src.devices import PRECISIONS, computing
from src.draws import derived_seed
from src.errors import FlagError, TrainingError
from src.optimizers import OPTIMIZERS, build_optimizer, rate
from src.training.config import TrainingConfig
from src.training.dynamics import Dynamics
from src.training.evaluation import evaluate
from src.training.group import Group
from src.training.steps import plain_step, sam_step, sampled_step
from src.training.sync_batchnorm import synchronised_batchnorm

log = logging.getLogger(__name__)

_CHECK_EVERY = 64  # steps between looks at whether the loss is finite: a look waits for the device


class Trainer:
    """Trains a network; files are the business of ``run_training``.

    Args:
        model: The network, on its device and of the precision's type.
        train: Training batches (their weights enter the loss as sum(w l) / sum(w)).
        test: Un-augmented test batches.
        config: The settings.
        weights: Sample weights, one per example of the training set; default 1.
        dynamics: Where to record per-example dynamics, or None.
        group: The processes that share each batch.
        sync_batchnorm: Whether BatchNorm normalises over the batches of all processes.
        compile_model: Whether to run the network through ``torch.compile``.
        after_step: Called as ``f(trainer, epoch, step)`` after each step, steps counted from 1 over the run.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        test: Batches,
        config: TrainingConfig,
        *,
        weights: torch.Tensor | None = None,
        dynamics: Dynamics | None = None,
        group: Group | None = None,
        sync_batchnorm: bool = False,
        compile_model: bool = False,
        after_step: Sequence[Callable[["Trainer", int, int], None]] = (),
    ) -> None:
        self.model, self.train_batches, self.test_batches = model, train, test
        self.config, self.weights, self.dynamics = config, weights, dynamics
        self.group = group or Group()
        self.after_step = tuple(after_step)
        self.sync_batchnorm = sync_batchnorm and self.group.world > 1
        self.forward = torch.compile(model) if compile_model else model
        self.precision = PRECISIONS[config.precision]
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(
            config.optimizer,
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            rho=config.rho,
            adaptive=config.adaptive,
            num_examples=len(train.images),
            delta=config.delta,
            hess_init=config.hess_init,
        )
        entry = OPTIMIZERS[config.optimizer]
        self._step = sampled_step if entry.needs_sampling else sam_step if entry.passes == 2 else plain_step
        if self.group.world > 1 and entry.needs_sampling:
            raise FlagError(f"--optimizer {config.optimizer}: its noise is not shared; train it in one process")
        self.history: list[dict[str, Any]] = []
        self._rate(1)  # a wrong floor is found before anything is written
        self._check_last_batch()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)

    def fit(self, after_epoch: Callable[["Trainer"], None] = lambda trainer: None) -> None:
        """Train from the epoch after the last finished one to the end; ``after_epoch`` saves."""
        steps = len(self.train_batches)
        with tqdm(
            total=steps * self.config.epochs,
            initial=steps * self.epoch,
            unit="step",
            disable=None if self.group.leads else True,
            dynamic_ncols=True,
        ) as bar:
            for epoch in range(self.epoch + 1, self.config.epochs + 1):
                self.history.append(self._one_epoch(epoch, bar))
                after_epoch(self)

    def _rate(self, epoch: int) -> float:
        config = self.config
        return rate(config.lr_sched, epoch, config.epochs, config.learning_rate, config.lr_min)

    def _one_epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        """Train and test once; returns the epoch's record."""
        started = time.perf_counter()
        config, current = self.config, self._rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = current
        bar.set_description(f"epoch {epoch}/{config.epochs}")
        train_loss, train_accuracy = self._train_pass(epoch, bar)
        trained = time.perf_counter()
        test_loss, test_accuracy = evaluate(
            self.model, self.test_batches, precision=config.precision, forward=self.forward, group=self.group
        )
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss is not finite after epoch {epoch}; {self._advice()}")
        if self.dynamics is not None:
            self.dynamics.end_epoch(epoch, self.group)
        bar.set_postfix(loss=f"{train_loss:.4f}", test=f"{100 * test_accuracy:.2f}%")
        return {
            "epoch": epoch,
            "learning_rate": current,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }

    def _train_pass(self, epoch: int, bar: tqdm) -> tuple[float, float]:
        """All steps of an epoch; returns mean loss and accuracy of the first passes, before each step."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # weighted loss, weight, correct
        bad = torch.zeros((), dtype=torch.int64, device=self.device)  # first step with a loss that is not finite
        devices = [self.device] if self.device.type == "cuda" else []
        count, step = len(self.train_batches.images), 0
        self.model.train()
        synchronised = synchronised_batchnorm(self.model) if self.sync_batchnorm else nullcontext()
        with torch.random.fork_rng(devices=devices), synchronised:
            # What can only draw from torch's global generators (dropout, iBLR's noise) draws from these.
            # Processes draw differently: the same dropout for all would tie their examples together.
            purpose = "global" if self.group.leads else f"global {self.group.rank}"
            torch.manual_seed(derived_seed(self.config.seed, epoch, purpose))
            for step, batch in enumerate(self.train_batches.epoch(epoch, weights=self.weights), start=1):
                losses, logits = self._step(self.optimizer, self.model, lambda batch=batch: self._one_pass(batch))
                weighted = (losses * batch.weights).sum()
                sums += torch.stack(
                    [weighted, batch.weights.sum(), (logits.argmax(1) == batch.labels).sum()]
                ).double()
                bad = torch.where((bad == 0) & ~weighted.isfinite(), step, bad)
                if self.dynamics is not None:
                    self.dynamics.record(logits, batch.labels, batch.indices, losses)
                for call in self.after_step:
                    call(self, epoch, (epoch - 1) * len(self.train_batches) + step)
                if step % _CHECK_EVERY == 0:
                    self._check_finite(bad, epoch)
                bar.update()
        self.group.sum_([sums])
        self.group.share_(self.model.buffers())  # running statistics, where each process keeps its own
        self._check_finite(bad, epoch)
        loss, weight, correct = sums.tolist()
        return loss / weight, correct / count

    def _one_pass(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward over this process's share; gradients end as those of the whole batch's loss."""
        if not len(batch.labels) and not self.sync_batchnorm:
            return self._empty_pass(batch)
        with computing(self.device, self.precision):
            logits = self.forward(batch.images)
        logits = logits.to(self.precision.dtype)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        # Dividing by the whole batch's weight makes the sum over processes the gradient of sum(w l) / sum(w).
        ((losses * batch.weights).sum() / batch.total_weight).backward()
        self._share_gradients()
        return losses.detach(), logits.detach()

    def _empty_pass(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The pass of a process without a share: zero gradients, and its part in the exchange."""
        self._share_gradients()
        return batch.weights.new_zeros(0), batch.weights.new_zeros((0, 1))

    def _share_gradients(self) -> None:
        """Sum the gradients over the processes."""
        if self.group.world == 1:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.group.sum_([parameter.grad for parameter in parameters])

    def _check_finite(self, bad: torch.Tensor, epoch: int) -> None:
        bad = bad.clone()
        if self.group.world > 1:
            bad = torch.where(bad == 0, torch.iinfo(torch.int64).max, bad)
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MIN)
            bad = torch.where(bad == torch.iinfo(torch.int64).max, 0, bad)
        if step := int(bad):
            raise TrainingError(f"the loss is not finite in epoch {epoch}, batch {step}; {self._advice()}")

    def _advice(self) -> str:
        return f"a smaller --learning_rate may help (it is {self.config.learning_rate:g})"

    def _check_last_batch(self) -> None:
        """Refuse a last batch that leaves a process one example where BatchNorm cannot normalise it."""
        last, world = self.train_batches.last_batch_size, self.group.world
        if last >= 2 * world if not self.sync_batchnorm else last > 1:  # every share has two, or none needs them
            return
        probe = next(iter(self.train_batches.epoch(1))).images[:1]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.train()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.model(probe)
        except ValueError as error:
            raise FlagError(
                f"--batch_size: {len(self.train_batches.images)} examples leave a last batch of one"
                + (", " if world == 1 else " for a process, ")
                + "which this network's BatchNorm cannot normalise; give another size"
            ) from error
        finally:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, but the settings and the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "dynamics": None if self.dynamics is None else self.dynamics.state(),
        }

    def restore(self, state: dict[str, Any], rows: dict[int, np.ndarray]) -> None:
        """Go on from a state; ``rows`` are the dynamics of its epochs (empty without dynamics)."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])
        if self.dynamics is not None:
            self.dynamics.restore(state["dynamics"], rows)
