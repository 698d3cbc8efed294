"""The training loop (steps, evaluation, learning rate schedule, dynamics), and evaluation of a trained model."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from src.datasets import Batches
from src.devices import CUDA_GRAPHS, PRECISIONS, autocast_context
from src.errors import ArgumentError, TrainingError
from src.models.base import eval_mode, load_optimizer, load_weights, trains_on_one
from src.optimizers import OPTIMIZERS, SCHEDULES, build_optimizer, rate
from src.rng import derived_seed
from src.training.config import TrainingConfig
from src.training.distributed import ProcessGroup, synchronized_batchnorm
from src.training.dynamics import Dynamics

log = logging.getLogger(__name__)

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (b, C), labels (b,) -> losses (b,)
_NEVER = torch.iinfo(torch.int64).max
_CHECK_EVERY = 64  # steps between checks that the loss is finite; each check waits for the device
_KEPT = 2**22  # most logits kept (16 MiB) before the statistics of their steps are computed


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each example in nats, ``(b,)``."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


class EpochPlan(Protocol):
    """Chooses the examples of each epoch, possibly based on training losses so far (dynamic pruning).

    The loop calls ``choose`` before each epoch, ``record`` after every few steps, and ``end_epoch`` after the last.
    In distributed training, all processes have the same plan, and each records the losses of its share.
    """

    @property
    def divide_by_size(self) -> bool:
        """Whether a batch's loss is sum(w l) / b, with b the number of examples, instead of sum(w l) / sum(w)."""
        ...

    @property
    def depends_on_epochs(self) -> bool:
        """Whether a different number of epochs would have changed the epochs already trained."""
        ...

    def choose(self, epoch: int, fits: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the examples of an epoch.

        Args:
            epoch: The epoch, from 1.
            fits: Returns whether the loop can train on a given number of examples. It cannot if the last batch leaves
                a process with a single example and the model's BatchNorm cannot normalize it. The full training set
                always fits.

        Returns:
            Distinct positions in the training set, in any order, int64 ``(k,)`` with k >= 1; and weights ``(n,)`` of
            all examples of the set, of which only those at the positions are used.
        """
        ...

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Record the unweighted losses ``(b,)`` of some steps, before each step, and original indices ``(b,)``."""
        ...

    def end_epoch(self, group: ProcessGroup) -> None:
        """End an epoch: merge the records of all processes."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what the next epoch needs, for the resume state: tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by ``state``."""
        ...


class Trainer:
    """Trains a model. Does not read or write files; see ``run_training``.

    Args:
        model: The model, on its device and in the precision's dtype.
        train: Training batches. The loss of a batch is sum(w l) / sum(w), or 0 if all w are 0.
        test: Un-augmented test batches.
        config: The settings.
        loss_fn: The per-example loss.
        weights: Sample weights, one per training example; 1 by default.
        plan: Chooses the examples of each epoch and their weights. By default, all examples with ``weights``.
        dynamics: Records per-example dynamics; None for no recording.
        group: The processes that share each batch.
        sync_batchnorm: Whether BatchNorm normalizes over the batches of all processes.
        compile_model: Whether to run the model through ``torch.compile``, or a mode in ``CUDA_GRAPHS``.
        after_step: Called as ``f(trainer, epoch, step)`` after each step; steps are counted from 1 over the run.
        test_loss_cap: Maximum contribution of one example to the test loss, in nats; unlimited by default.

    Raises:
        ArgumentError: The optimizer cannot be used with several processes or with the plan, or the last batch is a
            single example, which the model's BatchNorm cannot normalize.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        test: Batches,
        config: TrainingConfig,
        *,
        loss_fn: LossFunction = cross_entropy,
        weights: torch.Tensor | None = None,
        plan: EpochPlan | None = None,
        dynamics: Dynamics | None = None,
        group: ProcessGroup | None = None,
        sync_batchnorm: bool = False,
        compile_model: bool | str = False,
        after_step: Sequence[Callable[["Trainer", int, int], None]] = (),
        test_loss_cap: float = math.inf,
    ) -> None:
        if plan is not None and weights is not None:
            raise ValueError("an epoch plan provides the weights; give only one of plan and weights")
        self.model, self.train_batches, self.test_batches, self.config = model, train, test, config
        self.loss_fn, self.weights, self.plan, self.dynamics = loss_fn, weights, plan, dynamics
        self.group = group or ProcessGroup()
        self.sync_batchnorm = sync_batchnorm and self.group.world > 1
        self.after_step, self.test_loss_cap = tuple(after_step), test_loss_cap
        self.forward = _compiled(model, compile_model) if compile_model else model
        self._reuses_outputs = compile_model in CUDA_GRAPHS
        self.precision = PRECISIONS[config.precision]
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(config, model.parameters(), len(train.images))
        self.history: list[dict[str, Any]] = []
        self._bar = tqdm(disable=True)
        if OPTIMIZERS[config.optimizer].needs_sampling:
            if self.group.world > 1:
                reason = "its noise cannot be shared by several processes; train in one process"
                raise ArgumentError("optimizer", f"{config.optimizer}: {reason}")
            if plan is not None and plan.divide_by_size:
                # in an epoch that visits k of n examples, sum(w l) / b is on average n / k times the mean loss
                reason = "its posterior needs the mean loss, which dynamic pruning rescales; choose another optimizer"
                raise ArgumentError("optimizer", f"{config.optimizer}: {reason}")
        if not self._fits(len(train.images)):
            whose = "" if self.group.world == 1 else " for a process"
            raise ArgumentError(
                "batch_size",
                f": {len(train.images)} examples leave a last batch of one{whose}, which this model's BatchNorm "
                "cannot normalize; choose a different size",
            )

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def steps(self) -> int:
        """Number of steps in the finished epochs."""
        return sum(record.get("steps", len(self.train_batches)) for record in self.history)

    @property
    def cost(self) -> float | None:
        """Cost of the finished epochs in epoch-equivalents; None if an older version trained some of them."""
        return training_cost(self.history)

    @property
    def depends_on_epochs(self) -> bool:
        """Whether a different number of epochs would have changed the epochs already trained."""
        return SCHEDULES[self.config.lr_sched].depends_on_epochs or (
            self.plan is not None and self.plan.depends_on_epochs
        )

    def epochs(self) -> Iterator[int]:
        """Iterate over the remaining epochs, with a progress bar that counts steps."""
        taken, quiet = self.steps, None if self.group.is_main_process else True
        total = taken + len(self.train_batches) * (self.config.epochs - self.epoch)
        with tqdm(total=total, initial=taken, unit="step", disable=quiet, dynamic_ncols=True) as self._bar:
            yield from range(self.epoch + 1, self.config.epochs + 1)

    def fit(self) -> None:
        """Train the remaining epochs. Writes no files."""
        for epoch in self.epochs():
            self.train_epoch(epoch)

    def train_epoch(self, epoch: int) -> None:
        """Train one epoch, evaluate the model on the test set, and append a record to the history.

        The record's ``cost`` is in epoch-equivalents: the number of forward and backward passes, relative to one pass
        over the full original training set. SAM takes two passes per step.

        The record's training loss and accuracy are from each step's first pass, before the step.

        Raises:
            TrainingError: A loss is not finite.
        """
        started = time.perf_counter()
        config, model, optimizer, batches = self.config, self.model, self.optimizer, self.train_batches
        positions, weights = (None, self.weights) if self.plan is None else self.plan.choose(epoch, self._fits)
        count = len(batches.images) if positions is None else len(positions)
        taken, bar, passes_per_step = self.steps, self._bar, 0
        bar.set_description(f"epoch {epoch}/{config.epochs}")
        bar.total = taken + batches.steps(count) + len(batches) * (config.epochs - epoch)  # fewer, if pruned
        steps, by_size = batches.steps(count), self.plan is not None and self.plan.divide_by_size
        input_gradients = self.dynamics is not None and self.dynamics.input_gradients
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # weighted loss, weight, correct
        bad = torch.full((), _NEVER, device=self.device)  # first step with a loss that is not finite
        kept: list[tuple[torch.Tensor, ...]] = []  # what _report needs from the latest steps; excludes images
        first = 1  # first step in kept
        model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        synchronized = synchronized_batchnorm(model) if self.sync_batchnorm else nullcontext()
        with torch.random.fork_rng(devices=devices), synchronized:
            # Dropout and iBLR's noise can only use torch's global generators, so seed these for the epoch.
            # The seed differs between processes: a shared dropout mask would correlate their examples.
            purpose = "global" if self.group.is_main_process else f"global {self.group.rank}"
            torch.manual_seed(derived_seed(config.seed, epoch, purpose))
            for step, batch in enumerate(batches.epoch(epoch, positions, weights, by_size=by_size), start=1):
                if step == 1 or SCHEDULES[config.lr_sched].every_step:
                    learning_rate = self._set_rate(epoch, (step - 0.5) / steps)  # the rate halfway through the step
                optimizer.zero_grad(set_to_none=True)
                with closing(OPTIMIZERS[config.optimizer].passes(optimizer, model)) as passes:
                    for number, _ in enumerate(passes):  # two passes for SAM; only the first is recorded
                        if len(batch.labels) or self.sync_batchnorm:
                            # in all passes, because compiled code depends on it
                            images = batch.images.detach().requires_grad_(input_gradients)
                            if self._reuses_outputs:
                                torch.compiler.cudagraph_mark_step_begin()
                            with autocast_context(self.device, self.precision):
                                logits = self.forward(images)
                            # the next pass overwrites the outputs of a CUDA graph
                            logits = logits.to(self.precision.dtype, copy=self._reuses_outputs)
                            losses = self.loss_fn(logits, batch.labels)
                            losses.backward(batch.shares)  # the gradient of the loss sum(shares * losses)
                            if number == 0 and len(batch.labels):
                                first = first if kept else step
                                kept.append((*batch[1:], losses.detach(), logits.detach()))
                                if images.grad is not None:
                                    norms = torch.linalg.vector_norm(images.grad, dim=(1, 2, 3))
                                    kept[-1] += (norms, batch.shares)
                        # A process without examples in this batch still joins the all-reduce, with zero gradients.
                        self._sum_gradients()
                        passes_per_step = number + 1
                optimizer.step()
                # Statistics are computed for many steps at once, except for the first step.
                full = bool(kept) and len(kept) * kept[0][4].numel() >= _KEPT
                if kept and (step in (1, steps) or step % _CHECK_EVERY == 0 or full):
                    self._report(kept, first, sums, bad)
                    kept.clear()
                if step == 1:
                    untrained = sums.clone()
                for call in self.after_step:
                    call(self, epoch, taken + step)
                if step % _CHECK_EVERY == 0:
                    self._check_finite(bad, epoch)
                bar.update()
        self.group.sum_([sums, untrained])
        self.group.share_(model.buffers())  # running statistics may differ between processes
        self._check_finite(bad, epoch)
        if self.plan is not None:
            self.plan.end_epoch(self.group)
        trained = time.perf_counter()
        by_class = None if self.dynamics is None else self.dynamics.class_sums()
        test_loss, test_accuracy = evaluate(
            model,
            self.test_batches,
            precision=config.precision,
            forward=self.forward,
            loss_fn=self.loss_fn,
            group=self.group,
            loss_cap=self.test_loss_cap,
            by_class=by_class,
        )
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss is not finite after epoch {epoch}; {self._advice()}")
        if self.dynamics is not None:
            self.dynamics.end_epoch(epoch, self.group, by_class)
        bar.set_postfix(loss=f"{_mean(sums):.4f}", test=f"{100 * test_accuracy:.2f}%")
        record = {
            "epoch": epoch,
            "learning_rate": learning_rate,
            "train_loss": _mean(sums),
            "train_accuracy": float(sums[2]) / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "cost": passes_per_step * count / batches.images.total,
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }
        if epoch == 1:  # the first batch's loss is the untrained model's, without an extra pass over the data
            record["untrained_loss"] = _mean(untrained)
        if positions is not None:
            record |= {"examples": count, "steps": batches.steps(count)}
        self.history.append(record)

    def _set_rate(self, epoch: int, progress: float) -> float:
        """Set and return the learning rate at a fraction of an epoch."""
        config = self.config
        value = rate(config.lr_sched, epoch, config.epochs, config.learning_rate, config.lr_min, progress)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = value
        return value

    def _report(
        self, kept: Sequence[tuple[torch.Tensor, ...]], first: int, sums: torch.Tensor, bad: torch.Tensor
    ) -> None:
        """Accumulate and record the results of one or more steps. The number of operations does not grow with them.

        Args:
            kept: For each step, labels, indices, weights and losses, each ``(b,)``, logits ``(b, C)``, and, if
                they are recorded, norms of the batch loss's input gradients and shares of that loss, each ``(b,)``.
                All steps but the last have the same b.
            first: The first of these steps.
            sums: Weighted loss, weight and number of correct predictions, ``(3,)``; updated in place.
            bad: The first step with a loss that is not finite; updated in place.
        """
        labels, indices, weights, losses, logits, *gradients = map(torch.cat, zip(*kept, strict=True))
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([(losses.double() * weights).sum(), weights.sum(dtype=torch.float64), correct])
        step = first + torch.arange(len(losses), device=self.device) // len(kept[0][0])
        torch.minimum(bad, step.where(~losses.isfinite(), _NEVER).min(), out=bad)
        if self.dynamics is not None:
            norms = torch.full_like(losses, float("nan"))
            if gradients:  # of the example's own loss
                norms = torch.where(gradients[1] > 0, gradients[0] / gradients[1], norms)
            self.dynamics.record(logits, labels, indices, losses, norms)
        if self.plan is not None:
            self.plan.record(indices, losses)

    def _sum_gradients(self) -> None:
        """Sum the gradients over the processes."""
        if self.group.world == 1:
            return
        gradients = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        self.group.sum_(gradients)

    def _check_finite(self, bad: torch.Tensor, epoch: int) -> None:
        """Raise if any process had a loss that is not finite. ``bad`` is the step, or ``_NEVER``."""
        step = int(self.group.least(bad))
        if step != _NEVER:
            raise TrainingError(f"the loss is not finite in epoch {epoch}, batch {step}; {self._advice()}")

    def require_finite(self, epoch: int) -> None:
        """Check that all weights are finite. Call before measuring the model between two checks of the loss.

        Raises:
            TrainingError: A weight is not finite.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(f"the weights are not finite in epoch {epoch}; {self._advice()}")

    def _advice(self) -> str:
        return f"a smaller learning rate may help (it is {self.config.learning_rate:g})"

    def _fits(self, examples: int) -> bool:
        """Whether the last batch of an epoch with ``examples`` examples can be trained on."""
        size, world = self.train_batches.batch_size, self.group.world
        last = examples % size or size
        enough = 2 if self.sync_batchnorm else 2 * world  # every process needs two
        return last >= enough or trains_on_one(self.model, self.train_batches.images.image_shape)

    def state(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on, except the settings and the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "dynamics": None if self.dynamics is None else self.dynamics.state(),
            "plan": None if self.plan is None else self.plan.state(),
        }

    def restore(self, state: dict[str, Any], rows: dict[int, np.ndarray]) -> None:
        """Restore a state; ``rows`` contains the dynamics of its epochs (empty without dynamics)."""
        plan = state.get("plan")  # missing in states of earlier versions
        if (plan is None) != (self.plan is None):
            raise ValueError("only one of the state and this run has an epoch plan")
        load_weights(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.history = check_history(state["history"])
        if not self.history or self.epoch != state["epoch"]:
            raise ValueError("its history is not one record per epoch")
        if self.dynamics is not None:
            self.dynamics.restore(state["dynamics"], rows)
        if self.plan is not None:
            self.plan.restore(plan)


def _compiled(model: nn.Module, mode: bool | str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile a model with ``torch.compile`` and return it as a function of images ``(b, c, h, w)``.

    Batches are views into larger tensors. Compiled code would treat their offset as a dynamic size, and CUDA graphs
    would be recorded again for each offset. Cloning the batch avoids this.
    """
    forward = torch.compile(model, mode=None if mode is True else mode)
    return lambda images: forward(images.clone())


def training_cost(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Cost of a history's epochs in epoch-equivalents (see ``Trainer.train_epoch``); None if it is not recorded."""
    costs = [record.get("cost") for record in history]
    return None if None in costs else float(sum(costs))


def check_history(history: Any) -> list[dict[str, Any]]:
    """Validate and return a stored history.

    Raises:
        ValueError: The history is not one record of numbers per epoch.
    """
    if not isinstance(history, list):
        raise ValueError("its history is not a list")
    for epoch, record in enumerate(history, start=1):
        if not isinstance(record, dict) or not {"test_accuracy", "seconds"} <= record.keys():
            raise ValueError(f"it has no accuracy for epoch {epoch}")
        if record.get("epoch") != epoch or not all(type(number) in (int, float) for number in record.values()):
            raise ValueError(f"its record of epoch {epoch} does not consist of numbers")
    return history


def _mean(sums: torch.Tensor) -> float:
    """Return the mean loss, given the sum of weighted losses and the sum of weights; 0 if all weights are 0."""
    return float(sums[0]) / (float(sums[1]) or 1.0)


# --------------------------------------------------------------------------------------------------- evaluation


def logits_of(
    forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, precision: str = "fp32"
) -> torch.Tensor:
    """Return the logits ``(b, C)`` of a model in float32 (float64 for fp64), without gradients.

    Args:
        forward: The model in eval mode, or its compiled version.
        images: Images ``(b, c, h, w)``, on the model's device.
        precision: A key of ``PRECISIONS``.
    """
    chosen = PRECISIONS[precision]
    with torch.inference_mode(), autocast_context(images.device, chosen):
        return forward(images).to(chosen.dtype)


def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    precision: str = "fp32",
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
    loss_fn: LossFunction = cross_entropy,
    group: ProcessGroup | None = None,
    loss_cap: float = math.inf,
    by_class: torch.Tensor | None = None,
) -> tuple[float, float]:
    """Compute the mean loss and accuracy on a data set.

    Args:
        model: The model. It is run in eval mode, and its previous mode is restored.
        batches: Un-augmented batches; each process of ``group`` gets its share.
        precision: A key of ``PRECISIONS``.
        forward: Function to call instead of ``model``, for example its compiled version.
        loss_fn: The per-example loss.
        group: The processes that share the data set.
        loss_cap: Maximum contribution of one example to the loss, in nats; unlimited by default.
        by_class: float64 ``(2, C)``. Each class's sum of losses and number of examples are added to it.

    Returns:
        The mean loss (nats per example) and the accuracy in [0, 1].

    Raises:
        ValueError: There are no batches.
    """
    totals: torch.Tensor | None = None
    with eval_mode(model):
        for batch in batches:
            logits = logits_of(model if forward is None else forward, batch.images, precision)
            losses = loss_fn(logits, batch.labels).clamp(max=loss_cap)
            loss = losses.sum().double()
            correct = (logits.argmax(dim=1) == batch.labels).sum()
            part = torch.stack([loss, correct.double(), torch.full_like(loss, len(batch.labels))])
            totals = part if totals is None else totals + part
            if by_class is not None:
                by_class.index_add_(1, batch.labels, torch.stack([losses.double(), torch.ones_like(losses).double()]))
    if totals is None:
        raise ValueError("there are no batches to evaluate")
    (group or ProcessGroup()).sum_([totals] if by_class is None else [totals, by_class])
    loss, correct, count = totals.tolist()
    return loss / count, correct / count
