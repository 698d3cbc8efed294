"""The training loop (epochs of steps, evaluation, schedule, dynamics), and the evaluation of a trained model."""

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
_CHECK_EVERY = 64  # steps between looks at whether the loss is finite: a look waits for the device
_KEPT = 2**22  # logits that are kept at most, 16 MiB, until what is reported of their steps is computed


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each example, ``(b,)``, in nats."""
    return nn.functional.cross_entropy(logits, labels, reduction="none")


class EpochPlan(Protocol):
    """Chooses the examples of each epoch again, possibly by the losses that training has seen (dynamic pruning).

    The loop calls ``choose`` before an epoch, ``record`` after every few of its steps, ``end_epoch`` after the last.
    With several processes all hold the same plan, and each records the losses of its share.
    """

    @property
    def divide_by_size(self) -> bool:
        """Whether a batch's loss is sum(w l) / b, with b its examples; else sum(w l) / sum(w)."""
        ...

    @property
    def depends_on_epochs(self) -> bool:
        """Whether another number of epochs would have changed the epochs already trained."""
        ...

    def choose(self, epoch: int, fits: Callable[[int], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """The examples of an epoch.

        Args:
            epoch: Its number, from 1.
            fits: Whether the loop can train on so many examples: their last batch may leave a process a single
                one, which some models' BatchNorm cannot normalize. All examples always fit.

        Returns:
            Positions in the training set, int64 ``(k,)`` with k >= 1, each once and in any order; and the weights
            of all examples of the set, ``(n,)``, of which those of the positions are read.
        """
        ...

    def record(self, indices: torch.Tensor, losses: torch.Tensor) -> None:
        """Take the losses ``(b,)`` of some steps, unweighted and before each step, of original indices ``(b,)``."""
        ...

    def end_epoch(self, group: ProcessGroup) -> None:
        """Close an epoch: put the records of all processes together."""
        ...

    def state(self) -> dict[str, Any]:
        """What the next epoch needs, for the resume state: tensors and plain values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""
        ...


class Trainer:
    """Trains a model; files are the business of ``run_training``.

    Args:
        model: The model, on its device and of the precision's type.
        train: Training batches (their weights enter the loss as sum(w l) / sum(w), which is 0 where all w are 0).
        test: Un-augmented test batches.
        config: The settings.
        loss_fn: The loss of each example.
        weights: Sample weights, one per example of the training set; default 1.
        plan: Which examples each epoch visits, and with which weights; default all, with ``weights``.
        dynamics: Where to record per-example dynamics, or None.
        group: The processes that share each batch.
        sync_batchnorm: Whether BatchNorm normalizes over the batches of all processes.
        compile_model: Whether to run the model through ``torch.compile``, or in which of the modes ``CUDA_GRAPHS``.
        after_step: Called as ``f(trainer, epoch, step)`` after each step, steps counted from 1 over the run.
        test_loss_cap: The most that one example may add to the test loss, in nats; default no limit.

    Raises:
        ArgumentError: The optimizer does not go with several processes or with the plan, or the last batch is a
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
            raise ValueError("an epoch plan brings weights of its own; give one of the two")
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
                reason = "its noise is not shared; train it in one process"
                raise ArgumentError("optimizer", f"{config.optimizer}: {reason}")
            if plan is not None and plan.divide_by_size:
                # on average sum(w l) / b is n / k of the mean loss, for an epoch that visits k of n
                reason = "its posterior needs the mean loss, which dynamic pruning scales; choose another optimizer"
                raise ArgumentError("optimizer", f"{config.optimizer}: {reason}")
        if not self._fits(len(train.images)):
            whose = "" if self.group.world == 1 else " for a process"
            raise ArgumentError(
                "batch_size",
                f": {len(train.images)} examples leave a last batch of one{whose}, which this model's BatchNorm "
                "cannot normalize; give another size",
            )

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
        return SCHEDULES[self.config.lr_sched].depends_on_epochs or (
            self.plan is not None and self.plan.depends_on_epochs
        )

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, while a progress bar counts their steps."""
        taken, quiet = self.steps, None if self.group.is_main_process else True
        total = taken + len(self.train_batches) * (self.config.epochs - self.epoch)
        with tqdm(total=total, initial=taken, unit="step", disable=quiet, dynamic_ncols=True) as self._bar:
            yield from range(self.epoch + 1, self.config.epochs + 1)

    def fit(self) -> None:
        """Train the epochs that are left, and write nothing."""
        for epoch in self.epochs():
            self.train_epoch(epoch)

    def train_epoch(self, epoch: int) -> None:
        """Take the steps of an epoch, evaluate the model on the test set, and add a record to the history.

        The record's training loss and accuracy are those of each step's first pass, before the step.

        Raises:
            TrainingError: A loss is not finite.
        """
        started = time.perf_counter()
        config, model, optimizer, batches = self.config, self.model, self.optimizer, self.train_batches
        learning_rate = rate(config.lr_sched, epoch, config.epochs, config.learning_rate, config.lr_min)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate
        positions, weights = (None, self.weights) if self.plan is None else self.plan.choose(epoch, self._fits)
        count = len(batches.images) if positions is None else len(positions)
        taken, bar = self.steps, self._bar
        bar.set_description(f"epoch {epoch}/{config.epochs}")
        bar.total = taken + batches.steps(count) + len(batches) * (config.epochs - epoch)  # fewer, if pruned
        steps, by_size = batches.steps(count), self.plan is not None and self.plan.divide_by_size
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # weighted loss, weight, correct
        bad = torch.full((), _NEVER, device=self.device)  # the first step with a loss that is not finite
        kept: list[tuple[torch.Tensor, ...]] = []  # what _report takes of the latest steps; never the images
        first = 1  # the first of these steps
        model.train()
        devices = [self.device] if self.device.type == "cuda" else []
        synchronized = synchronized_batchnorm(model) if self.sync_batchnorm else nullcontext()
        with torch.random.fork_rng(devices=devices), synchronized:
            # What can only draw from torch's global generators (dropout, iBLR's noise) draws from these.
            # Processes draw differently: the same dropout for all would tie their examples together.
            purpose = "global" if self.group.is_main_process else f"global {self.group.rank}"
            torch.manual_seed(derived_seed(config.seed, epoch, purpose))
            for step, batch in enumerate(batches.epoch(epoch, positions, weights, by_size=by_size), start=1):
                optimizer.zero_grad(set_to_none=True)
                with closing(OPTIMIZERS[config.optimizer].passes(optimizer, model)) as passes:
                    for number, _ in enumerate(passes):  # two for SAM; what the first computes is recorded
                        if len(batch.labels) or self.sync_batchnorm:
                            if self._reuses_outputs:
                                torch.compiler.cudagraph_mark_step_begin()
                            with autocast_context(self.device, self.precision):
                                logits = self.forward(batch.images)
                            # the next pass overwrites what a CUDA graph returns
                            logits = logits.to(self.precision.dtype, copy=self._reuses_outputs)
                            losses = self.loss_fn(logits, batch.labels)
                            losses.backward(batch.shares)  # the gradient of the loss sum(shares * losses)
                            if number == 0 and len(batch.labels):
                                first = first if kept else step
                                kept.append((*batch[1:], losses.detach(), logits.detach()))
                        # else the other processes share this batch: zero gradients, and a part in the exchange
                        self._sum_gradients()
                optimizer.step()
                # What is reported is computed for many steps at once, except that the first stands alone.
                full = bool(kept) and len(kept) * kept[0][-1].numel() >= _KEPT
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
        self.group.share_(model.buffers())  # running statistics, where each process keeps its own
        self._check_finite(bad, epoch)
        if self.plan is not None:
            self.plan.end_epoch(self.group)
        trained = time.perf_counter()
        test_loss, test_accuracy = evaluate(
            model,
            self.test_batches,
            precision=config.precision,
            forward=self.forward,
            loss_fn=self.loss_fn,
            group=self.group,
            loss_cap=self.test_loss_cap,
        )
        if not math.isfinite(test_loss):
            raise TrainingError(f"the test loss is not finite after epoch {epoch}; {self._advice()}")
        if self.dynamics is not None:
            self.dynamics.end_epoch(epoch, self.group)
        bar.set_postfix(loss=f"{_mean(sums):.4f}", test=f"{100 * test_accuracy:.2f}%")
        record = {
            "epoch": epoch,
            "learning_rate": learning_rate,
            "train_loss": _mean(sums),
            "train_accuracy": float(sums[2]) / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": trained - started,
            "seconds": time.perf_counter() - started,
        }
        if epoch == 1:  # the first batch's loss is that of the untrained model, without an extra pass over the data
            record["untrained_loss"] = _mean(untrained)
        if positions is not None:
            record |= {"examples": count, "steps": batches.steps(count)}
        self.history.append(record)

    def _report(
        self, kept: Sequence[tuple[torch.Tensor, ...]], first: int, sums: torch.Tensor, bad: torch.Tensor
    ) -> None:
        """Add up and record what some steps computed: the same few operations for one step as for many.

        Args:
            kept: Labels, indices, weights and losses, each ``(b,)``, and logits ``(b, C)`` of each step. All but the
                last are of one length.
            first: The number of the first of these steps.
            sums: Weighted loss, weight and correct predictions, ``(3,)``; added to, in place.
            bad: The first step with a loss that is not finite; lowered in place.
        """
        labels, indices, weights, losses, logits = map(torch.cat, zip(*kept, strict=True))
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([(losses.double() * weights).sum(), weights.sum(dtype=torch.float64), correct])
        step = first + torch.arange(len(losses), device=self.device) // len(kept[0][0])
        torch.minimum(bad, step.where(~losses.isfinite(), _NEVER).min(), out=bad)
        if self.dynamics is not None:
            self.dynamics.record(logits, labels, indices, losses)
        if self.plan is not None:
            self.plan.record(indices, losses)

    def _sum_gradients(self) -> None:
        """Sum the gradients over the processes."""
        if self.group.world == 1:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.group.sum_([parameter.grad for parameter in parameters])

    def _check_finite(self, bad: torch.Tensor, epoch: int) -> None:
        """Stop if a process has met a loss that is not finite; ``bad`` is the step, or ``_NEVER``."""
        step = int(self.group.least(bad))
        if step != _NEVER:
            raise TrainingError(f"the loss is not finite in epoch {epoch}, batch {step}; {self._advice()}")

    def require_finite(self, epoch: int) -> None:
        """Stop if a weight is not finite, before something is measured between two looks at the loss.

        Raises:
            TrainingError: One is not.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(f"the weights are not finite in epoch {epoch}; {self._advice()}")

    def _advice(self) -> str:
        return f"a smaller learning rate may help (it is {self.config.learning_rate:g})"

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
        """Continue from a state; ``rows`` are the dynamics of its epochs (empty without dynamics)."""
        plan = state.get("plan")  # states older than plans have none
        if (plan is None) != (self.plan is None):
            raise ValueError("either the state or this run has an epoch plan, the other has none")
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
    """A model run through ``torch.compile``, as a function of images ``(b, c, h, w)``.

    Batches are views into larger tensors. Compiled code would take their offset as one more dynamic size, and CUDA
    graphs would be recorded again for every value of it; a copy has none.
    """
    forward = torch.compile(model, mode=None if mode is True else mode)
    return lambda images: forward(images.clone())


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


def _mean(sums: torch.Tensor) -> float:
    """The mean loss, from the sum of weighted losses and that of the weights; 0 where all weights are 0."""
    return float(sums[0]) / (float(sums[1]) or 1.0)


# --------------------------------------------------------------------------------------------------- evaluation


def logits_of(
    forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, precision: str = "fp32"
) -> torch.Tensor:
    """The logits ``(b, C)`` of a model in eval mode, in float32 (float64 under fp64), for no gradient.

    Args:
        forward: The model, or its compiled form.
        images: ``(b, c, h, w)``, on its device.
        precision: A name of ``PRECISIONS``.
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
) -> tuple[float, float]:
    """Mean loss and accuracy over a set.

    Args:
        model: The model; run in eval mode, left as it was.
        batches: Un-augmented batches; each process of ``group`` sees its share.
        precision: A name of ``PRECISIONS``.
        forward: What is called in place of ``model``, for example its compiled form.
        loss_fn: The loss of each example.
        group: The processes that share the set.
        loss_cap: The most that one example may add to the loss, in nats; default no limit.

    Returns:
        Mean loss (nats per example) and accuracy in [0, 1].
    """
    totals: torch.Tensor | None = None
    with eval_mode(model):
        for batch in batches:
            logits = logits_of(model if forward is None else forward, batch.images, precision)
            loss = loss_fn(logits, batch.labels).clamp(max=loss_cap).sum().double()
            correct = (logits.argmax(dim=1) == batch.labels).sum()
            part = torch.stack([loss, correct.double(), torch.full_like(loss, len(batch.labels))])
            totals = part if totals is None else totals + part
    (group or ProcessGroup()).sum_([totals])
    loss, correct, count = totals.tolist()
    return loss / count, correct / count
