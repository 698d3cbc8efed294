"""The training loop: epochs of steps, evaluation, schedule, dynamics."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.datasets import Batch, Batches
from src.devices import PRECISIONS, autocast_context
from src.errors import ArgumentError, TrainingError
from src.models.base import load_optimizer, load_weights, trains_on_one
from src.optimizers import OPTIMIZERS, build_optimizer, rate
from src.rng import derived_seed
from src.training.config import TrainingConfig
from src.training.distributed import ProcessGroup, synchronised_batchnorm
from src.training.dynamics import Dynamics
from src.training.evaluation import evaluate
from src.training.plan import EpochPlan
from src.training.steps import plain_step, sam_step, sampled_step

log = logging.getLogger(__name__)

_CHECK_EVERY = 64  # steps between looks at whether the loss is finite: a look waits for the device


class Trainer:
    """Trains a network; files are the business of ``run_training``.

    Args:
        model: The network, on its device and of the precision's type.
        train: Training batches (their weights enter the loss as sum(w l) / sum(w), which is 0 where all w are 0).
        test: Un-augmented test batches.
        config: The settings.
        weights: Sample weights, one per example of the training set; default 1.
        plan: Which examples each epoch visits, and with which weights; default all, with ``weights``.
        dynamics: Where to record per-example dynamics, or None.
        group: The processes that share each batch.
        sync_batchnorm: Whether BatchNorm normalises over the batches of all processes.
        compile_model: Whether to run the network through ``torch.compile``.
        after_step: Called as ``f(trainer, epoch, step)`` after each step, steps counted from 1 over the run.
        test_loss_cap: The most that one example may add to the test loss, in nats; default no limit.
        rate_flag: What the script calls the learning rate, for messages.
        size_flag: What it calls the batch size.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        test: Batches,
        config: TrainingConfig,
        *,
        weights: torch.Tensor | None = None,
        plan: EpochPlan | None = None,
        dynamics: Dynamics | None = None,
        group: ProcessGroup | None = None,
        sync_batchnorm: bool = False,
        compile_model: bool = False,
        after_step: Sequence[Callable[["Trainer", int, int], None]] = (),
        test_loss_cap: float | None = None,
        rate_flag: str = "--learning_rate",
        size_flag: str = "--batch_size",
    ) -> None:
        self.model, self.train_batches, self.test_batches = model, train, test
        self.config, self.weights, self.plan, self.dynamics = config, weights, plan, dynamics
        if plan is not None and weights is not None:
            raise ValueError("an epoch plan brings weights of its own; give one of the two")
        self.group = group or ProcessGroup()
        self.after_step = tuple(after_step)
        self.test_loss_cap = test_loss_cap
        self.rate_flag, self.size_flag = rate_flag, size_flag
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
            nesterov=config.nesterov,
        )
        entry = OPTIMIZERS[config.optimizer]
        self._step = sampled_step if entry.needs_sampling else sam_step if entry.passes == 2 else plain_step
        if self.group.world > 1 and entry.needs_sampling:
            raise ArgumentError("optimizer", f"{config.optimizer}: its noise is not shared; train it in one process")
        if plan is not None and plan.divide_by_size and entry.needs_sampling:
            # on average sum(w l) / b is n / k of the mean loss, for an epoch that visits k of n
            raise ArgumentError(
                "optimizer",
                f"{config.optimizer}: its posterior needs the mean loss, which dynamic pruning scales; "
                "choose another optimiser",
            )
        self.history: list[dict[str, Any]] = []
        self._rate(1)  # a wrong floor is found before anything is written
        self._check_last_batch()

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """Steps taken in the finished epochs."""
        return sum(record.get("steps", len(self.train_batches)) for record in self.history)

    @property
    def depends_on_epochs(self) -> bool:
        """Whether another number of epochs would have changed the epochs already trained."""
        return self.config.schedule_depends_on_epochs or (self.plan is not None and self.plan.depends_on_epochs)

    def fit(self, after_epoch: Callable[["Trainer"], None] = lambda trainer: None) -> None:
        """Train from the epoch after the last finished one to the end; ``after_epoch`` saves."""
        taken = self.steps
        with tqdm(
            total=taken + len(self.train_batches) * (self.config.epochs - self.epoch),
            initial=taken,
            unit="step",
            disable=None if self.group.is_main_process else True,
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
        positions, weights = (None, self.weights) if self.plan is None else self.plan.choose(epoch, self._fits)
        train_loss, train_accuracy, first_loss = self._train_pass(epoch, bar, positions, weights)
        if self.plan is not None:
            self.plan.end_epoch(self.group)
        trained = time.perf_counter()
        test_loss, test_accuracy = evaluate(
            self.model,
            self.test_batches,
            precision=config.precision,
            forward=self.forward,
            group=self.group,
            loss_cap=self.test_loss_cap,
        )
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss is not finite after epoch {epoch}; {self._advice()}")
        if self.dynamics is not None:
            self.dynamics.end_epoch(epoch, self.group)
        bar.set_postfix(loss=f"{train_loss:.4f}", test=f"{100 * test_accuracy:.2f}%")
        record = {
            "epoch": epoch,
            "learning_rate": current,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }
        if epoch == 1:
            record["untrained_loss"] = first_loss
        if positions is not None:
            record |= {"examples": len(positions), "steps": self.train_batches.steps(len(positions))}
        return record

    def _train_pass(
        self, epoch: int, bar: tqdm, positions: torch.Tensor | None, weights: torch.Tensor | None
    ) -> tuple[float, float, float]:
        """All steps of an epoch; returns mean loss and accuracy of the first passes, before each step.

        The third number is the mean loss of the first batch alone. In epoch 1 the model has not taken a step then,
        so this is the loss of the untrained model, measured without an extra pass over the data.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # weighted loss, weight, correct
        bad = torch.zeros((), dtype=torch.int64, device=self.device)  # first step with a loss that is not finite
        devices = [self.device] if self.device.type == "cuda" else []
        count = len(self.train_batches.images) if positions is None else len(positions)
        batches, taken, size = self.train_batches, self.steps, self.train_batches.batch_size
        bar.total = taken + batches.steps(count) + len(batches) * (self.config.epochs - epoch)  # fewer, if pruned
        self.model.train()
        synchronised = synchronised_batchnorm(self.model) if self.sync_batchnorm else nullcontext()
        with torch.random.fork_rng(devices=devices), synchronised:
            # What can only draw from torch's global generators (dropout, iBLR's noise) draws from these.
            # Processes draw differently: the same dropout for all would tie their examples together.
            purpose = "global" if self.group.is_main_process else f"global {self.group.rank}"
            torch.manual_seed(derived_seed(self.config.seed, epoch, purpose))
            for step, batch in enumerate(batches.epoch(epoch, positions, weights), start=1):
                divisor = self._divisor(batch, min(size, count - (step - 1) * size))
                one_pass = partial(self._one_pass, batch, divisor)
                losses, logits = self._step(self.optimizer, self.model, one_pass)
                weighted = (losses * batch.weights).sum()
                if step == 1:
                    first = torch.stack([weighted, batch.weights.sum()]).double()
                sums += torch.stack(
                    [weighted, batch.weights.sum(), (logits.argmax(1) == batch.labels).sum()]
                ).double()
                bad = torch.where((bad == 0) & ~weighted.isfinite(), step, bad)
                if self.dynamics is not None:
                    self.dynamics.record(logits, batch.labels, batch.indices, losses)
                if self.plan is not None:
                    self.plan.record(batch.indices, losses)
                for call in self.after_step:
                    call(self, epoch, taken + step)
                if step % _CHECK_EVERY == 0:
                    self._check_finite(bad, epoch)
                bar.update()
        self.group.sum_([sums, first])
        self.group.share_(self.model.buffers())  # running statistics, where each process keeps its own
        self._check_finite(bad, epoch)
        loss, weight, correct = sums.tolist()
        first_loss, first_weight = first.tolist()
        return loss / (weight or 1.0), correct / count, first_loss / (first_weight or 1.0)

    def _divisor(self, batch: Batch, size: int) -> torch.Tensor:
        """What turns a batch's sum(w l) into its loss; ``size`` is the batch's over all processes."""
        total = batch.total_weight
        if self.plan is not None and self.plan.divide_by_size:
            return total.new_full((), size)
        return total.clamp_min(torch.finfo(total.dtype).tiny)  # weights that are all 0 make a loss of 0, not 0 / 0

    def _one_pass(self, batch: Batch, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward over this process's share; gradients end as those of the whole batch's loss."""
        if not len(batch.labels) and not self.sync_batchnorm:
            return self._empty_pass(batch)
        with autocast_context(self.device, self.precision):
            logits = self.forward(batch.images)
        logits = logits.to(self.precision.dtype)
        losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        # The divisor is the whole batch's, so the sum over processes is the gradient of the whole batch's loss.
        ((losses * batch.weights).sum() / divisor).backward()
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

    def require_finite(self, epoch: int) -> None:
        """Stop if a weight is not finite, before something is measured between two looks at the loss.

        Raises:
            TrainingError: One is not.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(f"the weights are not finite in epoch {epoch}; {self._advice()}")

    def _advice(self) -> str:
        return f"a smaller {self.rate_flag} may help (it is {self.config.learning_rate:g})"

    def _check_last_batch(self) -> None:
        """Refuse a last batch that leaves a process one example where BatchNorm cannot normalise it."""
        count = len(self.train_batches.images)
        if not self._fits(count):
            whose = "" if self.group.world == 1 else " for a process"
            raise ArgumentError(
                "batch_size",
                f": {count} examples leave a last batch of one{whose}, which this model's BatchNorm cannot "
                "normalize; give another size",
                self.size_flag,
            )

    def _fits(self, examples: int) -> bool:
        """Whether the last batch of so many examples can be trained on."""
        size, world = self.train_batches.batch_size, self.group.world
        last = examples % size or size
        enough = 2 if self.sync_batchnorm else 2 * world  # so that every share has two
        return last >= enough or trains_on_one(self.model, self.train_batches.images.image_shape)

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, but the settings and the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "dynamics": None if self.dynamics is None else self.dynamics.state(),
            "plan": None if self.plan is None else self.plan.state(),
        }

    def restore(self, state: dict[str, Any], rows: dict[int, np.ndarray]) -> None:
        """Go on from a state; ``rows`` are the dynamics of its epochs (empty without dynamics)."""
        plan = state.get("plan")  # states older than plans have none
        if (plan is None) != (self.plan is None):
            raise ValueError("the state is of a run with an epoch plan, or this run is; the other is not")
        load_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.history = check_history(state["history"])
        if not self.history or self.epoch != state["epoch"]:
            raise ValueError("its history is not one record per epoch")
        if self.dynamics is not None:
            self.dynamics.restore(state["dynamics"], rows)
        if self.plan is not None:
            self.plan.restore(plan)


def check_history(history: Any) -> list[dict[str, Any]]:
    """A stored history, of which results and decisions are made.

    Raises:
        ValueError: It is not one record of numbers per epoch.
    """
    if not isinstance(history, list):
        raise ValueError("its history is not a list")
    for epoch, record in enumerate(history, start=1):
        if not isinstance(record, dict) or not {"test_accuracy", "seconds"} <= record.keys():
            raise ValueError(f"it has no accuracy of epoch {epoch}")
        if record.get("epoch") != epoch or not all(type(number) in (int, float) for number in record.values()):
            raise ValueError(f"its record of epoch {epoch} is not numbers")
    return history
