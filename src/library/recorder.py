"""Records training dynamics in any training loop."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.errors import ArgumentError, MeasurementError
from src.library.batches import class_labels, class_logits
from src.metrics.dynamics import COUNTS, REDUCTIONS, Windows, training_accuracy
from src.metrics.score import warn_if_not_learned
from src.training import Dynamics, ProcessGroup


class DynamicsRecorder:
    """Records training dynamics in any training loop, and computes scores from them.

    Call ``record`` with every training batch and ``end_epoch`` after every epoch. What is recorded is described in
    ``src.training.Dynamics``. An example that an epoch does not visit has no values in that epoch, and scores use the
    epochs that visited it. Values are kept on the device of the logits.

    Args:
        total: Number of examples; indices are from 0 to ``total - 1``.
        repeats: What to do with an example that is recorded twice in an epoch: ``"refuse"``, or ``"first"`` to ignore
            all but the first time, for samplers with replacement.

    Raises:
        ArgumentError: ``total`` is below 1, or ``repeats`` is unknown.
    """

    def __init__(self, total: int, *, repeats: str = "refuse") -> None:
        if total < 1:
            raise ArgumentError("total", f"{total}: must be at least 1")
        if repeats not in ("refuse", "first"):
            raise ArgumentError("repeats", f"{repeats}: choose from refuse, first")
        self.total, self.repeats = total, repeats
        self._dynamics: Any = None  # a Dynamics, from the first batch on
        self._seen = torch.zeros(total, dtype=torch.bool)
        self._labels = torch.full((total,), -1, dtype=torch.int64)

    def record(self, logits: Any, labels: Any, indices: Any, *, input_gradients: Tensor | None = None) -> None:
        """Record a training batch, before its step.

        Args:
            logits: The model's outputs: ``(b, C)``, a dict or object with ``logits``, or one logit z per example,
                which means two classes with logits (0, z).
            labels: ``(b,)``.
            indices: ``(b,)``, the examples' indices, always the same for the same example.
            input_gradients: ``(b,)``, norms of the loss's gradients at the inputs; only ``csg`` needs them.

        Raises:
            ArgumentError: Shapes do not match, a label or an index is out of range, an example has another label than
                before, or it was already recorded in this epoch.
            MeasurementError: A logit is not finite.
        """
        logits = class_logits(logits).detach()
        count, classes = logits.shape
        labels, indices = class_labels(labels, count, classes).cpu(), torch.as_tensor(indices).cpu()
        if indices.shape != (count,) or indices.is_floating_point():
            raise ArgumentError(
                "indices", f": have shape {tuple(indices.shape)}; give one integer for each of {count}"
            )
        indices = indices.long()
        if count and not 0 <= int(indices.min()) <= int(indices.max()) < self.total:
            raise ArgumentError(
                "indices", f": range from {indices.min()} to {indices.max()}, not 0 to {self.total - 1}"
            )
        if not logits.isfinite().all():
            first = indices[(~logits.isfinite().all(dim=1)).nonzero()[0, 0].item()]
            raise MeasurementError(f"the logits of example {first} are not finite; lower the learning rate")
        known = self._labels[indices]
        other = ((known >= 0) & (known != labels)).nonzero()
        if len(other):
            i = other[0, 0]
            was = f"{indices[i]}: had the label {known[i]} before and now {labels[i]}"
            raise ArgumentError("indices", f"{was}; give indices in the data set, not in the batch")
        fresh = np.zeros(count, dtype=bool)
        fresh[np.unique(indices.numpy(), return_index=True)[1]] = True
        keep = torch.from_numpy(fresh) & ~self._seen[indices]
        if not keep.all() and self.repeats == "refuse":
            again = indices[(~keep).nonzero()[0, 0]]
            raise ArgumentError(
                "indices",
                f"{again}: was already recorded in this epoch; call end_epoch after each epoch, or use "
                'repeats="first" if a sampler repeats examples',
            )
        if self._dynamics is None:
            self._start(classes, logits.device)
        if classes != self._classes:
            raise ArgumentError("logits", f": have {classes} classes, but {self._classes} before")
        gradients = torch.full((count,), float("nan")) if input_gradients is None else input_gradients.detach()
        if gradients.shape != (count,):
            raise ArgumentError(
                "input_gradients", f": have shape {tuple(gradients.shape)}; give one norm per example"
            )
        logits, labels, indices, gradients = (t[keep.to(t.device)] for t in (logits, labels, indices, gradients))
        self._seen[indices], self._labels[indices] = True, labels
        logits, labels, indices, gradients = (t.to(self._device) for t in (logits, labels, indices, gradients))
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self._dynamics.record(logits, labels, indices, losses, gradients)

    def _start(self, classes: int, device: torch.device) -> None:
        self._classes, self._device = classes, device
        self._dynamics = Dynamics(self.total, classes, device)

    def end_epoch(self, class_test_loss: Any = None) -> None:
        """End an epoch.

        Args:
            class_test_loss: ``(C,)``, the mean test loss of each class after the epoch; only ``cld`` needs it.

        Raises:
            ArgumentError: Nothing was recorded since the last call, or the test losses have another shape.
        """
        if not self._seen.any():
            raise ArgumentError("end_epoch", ": nothing was recorded in this epoch")
        sums = self._dynamics.class_sums()
        if class_test_loss is not None:
            losses = torch.as_tensor(class_test_loss)
            if losses.shape != (self._classes,):
                shape = tuple(losses.shape)
                raise ArgumentError("class_test_loss", f": has shape {shape}; give one for each of {self._classes}")
            sums[0], sums[1] = losses, 1.0
        self._dynamics.end_epoch(len(self._dynamics.rows) + 1, ProcessGroup(), sums)
        self._seen.fill_(False)

    def state_dict(self) -> dict[str, Any]:
        """Everything recorded, as tensors, for a checkpoint.

        Raises:
            ArgumentError: No epoch was recorded, or an epoch has not ended.
        """
        self.arrays()
        rows = {epoch: torch.from_numpy(row) for epoch, row in self._dynamics.rows.items()}
        return {"labels": self._labels.clone(), "rows": rows, "dynamics": self._dynamics.state()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from a state returned by ``state_dict``.

        Args:
            state: The state.
            device: The device to keep values on, that of the logits to come.

        Raises:
            ArgumentError: The state belongs to another number of examples.
        """
        if len(state["labels"]) != self.total:
            raise ArgumentError("state", f": has {len(state['labels'])} examples, not {self.total}")
        self._start(state["dynamics"]["before"].shape[1], torch.device(device))
        self._dynamics.restore(state["dynamics"], {epoch: row.numpy() for epoch, row in state["rows"].items()})
        self._labels.copy_(state["labels"])
        self._seen.fill_(False)

    def arrays(self) -> dict[str, np.ndarray]:
        """The recorded quantities, float32 ``(epochs, total)``, and ``class_test_loss``, ``(epochs, C)``.

        Raises:
            ArgumentError: No epoch was recorded, or an epoch has not ended.
        """
        if self._seen.any() or self._dynamics is None:
            raise ArgumentError("end_epoch", ": was not called after the last epoch; call it first")
        return self._dynamics.arrays()

    def scores(self, name: str, **windows: Any) -> np.ndarray:
        """Compute a score; high means atypical, so ``aum`` and others are negated, as in the stored files.

        Args:
            name: ``forg``, ``etl``, ``csl``, ``aum``, ``dual``, ``dyn_unc``, ``el2n``, ``tdds``, ``late_prob``,
                ``late_aum``; ``csg`` with input gradients, and ``cld`` with test losses.
            **windows: Fields of ``src.metrics.dynamics.Windows``.

        Returns:
            float64 ``(total,)``, NaN for examples that were never recorded.

        Raises:
            ArgumentError: The score does not exist, needs more epochs, or needs what was not recorded.
        """
        known = {score.name: score for score in (*COUNTS, *REDUCTIONS)}
        if name not in known:
            raise ArgumentError(
                "name", f"{name}: is not a score of training dynamics; choose from {', '.join(known)}"
            )
        settings = build_options(Windows, windows, name, known[name].options)
        arrays = self.arrays()
        warn_if_not_learned([known[name]], training_accuracy(arrays["correct"]), "dynamics")
        return known[name].from_dynamics({**arrays, "labels": self._labels.numpy()}, settings)


def build_options(kind: type, values: Mapping[str, Any], owner: str, allowed: Collection[str]) -> Any:
    """Build a dataclass of options.

    Args:
        kind: The dataclass.
        values: Some of its fields.
        owner: The score or method, for messages.
        allowed: The fields that it uses.

    Raises:
        ArgumentError: An option does not exist, or a value is not accepted.
    """
    for name in values:
        if name not in allowed:
            raise ArgumentError(name, f": is not an option of {owner}; it has {', '.join(allowed) or 'none'}")
    return kind(**values)
