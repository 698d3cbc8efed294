"""Per-example training dynamics, recorded during training.

All but the input gradients come from the forward passes at almost no cost. Input gradients extend each backward pass
to the images.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts.io import label_hash, read_npz, write_npz
from src.artifacts.store import parse_settings
from src.errors import FileError
from src.models.base import copy_tensor
from src.training.distributed import ProcessGroup

DYNAMICS_FILE = "dynamics.npz"
QUANTITIES = ("loss", "probability", "margin", "correct", "el2n", "divergence", "input_gradient")
CLASS_TEST_LOSS = "class_test_loss"
_FIRST_QUANTITIES = 6  # recorded by all versions; input gradients and test losses by class were added later
_SLICE = 2**16  # examples exchanged between processes at a time, to bound memory
_SMALLEST = 2.0**-24  # smallest positive fp16 number; stored probabilities are clamped to it


class Dynamics:
    """Records seven quantities per example and epoch, and the test loss of each class.

    All are computed with the model in training mode on the augmented image, before the step (for SAM, in its first
    pass). For logits z, probabilities p and label y: ``loss`` = -log p_y; ``probability`` = p_y; ``margin`` =
    z_y - max of the other logits (Pleiss et al. 2020, eq. 1); ``correct`` = 1 if y has the largest logit, else
    0; ``el2n`` = norm of p - onehot(y) (Paul et al. 2021, eq. 3); ``divergence`` = KL(p || p of the previous epoch)
    (Zhang et al. 2024), where the previous probabilities are stored in fp16; ``input_gradient`` = norm of the loss's
    gradient with respect to the normalized image, including its effect through BatchNorm on the rest of the batch.

    Arrays are indexed by original index and contain NaN for examples that were not visited.

    Args:
        total: Size of the full training set.
        num_classes: C.
        device: The device that records are kept on.
        input_gradients: Whether to record ``input_gradient``, which makes training slower; NaN otherwise.
    """

    def __init__(self, total: int, num_classes: int, device: torch.device, input_gradients: bool = False) -> None:
        self.input_gradients = input_gradients
        self.rows: dict[int, np.ndarray] = {}  # epoch -> (quantities, total)
        self._now = torch.full((len(QUANTITIES), total), float("nan"), device=device)
        self._before = torch.zeros((total, num_classes), dtype=torch.float16, device=device)
        self._known = torch.zeros(total, dtype=torch.bool, device=device)
        self._test_losses: dict[int, torch.Tensor] = {}  # epoch -> (C,) on the CPU

    def class_sums(self) -> torch.Tensor:
        """Return zeros for the losses and counts of each class of the test set, float64 ``(2, C)``."""
        return torch.zeros((2, self._before.shape[1]), dtype=torch.float64, device=self._before.device)

    @torch.no_grad()
    def record(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        indices: torch.Tensor,
        losses: torch.Tensor,
        input_gradients: torch.Tensor,
    ) -> None:
        """Record a batch: logits ``(b, C)``; labels, original indices, losses and norms ``(b,)``."""
        logp = torch.log_softmax(logits.float(), dim=1)
        p = logp.exp()  # (b, C)
        mine = labels[:, None]
        others = logits.float().scatter(1, mine, float("-inf")).amax(dim=1)
        margin = logits.float().gather(1, mine)[:, 0] - others
        p_label = p.gather(1, mine)[:, 0]
        error = p.scatter_add(1, mine, torch.full_like(p_label, -1.0)[:, None])
        before = self._before[indices].float().clamp_min(_SMALLEST)
        divergence = (p * (logp - before.log())).sum(dim=1).clamp_min(0)
        divergence = divergence.where(self._known[indices], float("nan"))
        correct = (logits.argmax(dim=1) == labels).float()
        columns = [losses.float(), p_label, margin, correct, error.norm(dim=1), divergence, input_gradients.float()]
        self._now[:, indices] = torch.stack(columns)
        self._before[indices] = p.half()
        self._known.index_fill_(0, indices, True)

    def end_epoch(self, epoch: int, group: ProcessGroup, by_class: torch.Tensor) -> np.ndarray:
        """End an epoch: merge the processes' records, then store and return the row ``(quantities, total)``.

        Args:
            epoch: The epoch.
            group: The processes.
            by_class: The filled ``class_sums`` of the test set.
        """
        self._test_losses[epoch] = (by_class[0] / by_class[1]).float().cpu()  # NaN for a class without examples
        if group.world > 1:
            self._gather(group)
        self.rows[epoch] = self._now.cpu().numpy().copy()
        self._now.fill_(float("nan"))
        return self.rows[epoch]

    def _gather(self, group: ProcessGroup) -> None:
        """Merge the processes' records. One process visited each example; all others copy its new probabilities."""
        for start in range(0, self._now.shape[1], _SLICE):
            part = slice(start, start + _SLICE)
            mine = ~self._now[0, part].isnan()
            seen = mine.float()
            new = torch.where(mine[:, None], self._before[part].float(), 0.0)
            now = self._now[:, part].nan_to_num(nan=0.0)
            lost = (self._now[:, part].isnan() & mine).float()  # recorded as NaN, such as a first divergence
            group.sum_([now, seen, new, lost])
            visited = seen > 0
            self._now[:, part] = torch.where(visited & (lost == 0), now, float("nan"))
            self._before[part] = torch.where(visited[:, None], new.half(), self._before[part])
            self._known[part] |= visited

    def fits(self, row: Any) -> bool:
        """Whether an array has the shape and dtype kind of a row. Rows of earlier versions have fewer quantities."""
        return (
            isinstance(row, np.ndarray)
            and row.ndim == 2
            and _FIRST_QUANTITIES <= len(row) <= len(QUANTITIES)
            and row.shape[1] == self._now.shape[1]
            and row.dtype.kind == "f"
        )

    def state(self) -> dict[str, torch.Tensor]:
        """Return the state that the next epoch needs, for the resume state. Rows are stored in separate files."""
        losses = {CLASS_TEST_LOSS: torch.stack([self._test_losses[e] for e in sorted(self._test_losses)])}
        return {"before": self._before.cpu(), "known": self._known.cpu(), **losses}

    def restore(self, state: Mapping[str, torch.Tensor], rows: Mapping[int, np.ndarray]) -> None:
        """Restore a resume state and the rows of the epochs up to it."""
        copy_tensor("before", self._before, state["before"])
        copy_tensor("known", self._known, state["known"])
        self._now.fill_(float("nan"))
        missing = {epoch: len(QUANTITIES) - len(row) for epoch, row in rows.items()}
        self.rows = {
            epoch: np.pad(row, ((0, missing[epoch]), (0, 0)), constant_values=np.nan) for epoch, row in rows.items()
        }
        unknown = torch.full((len(rows), self._before.shape[1]), float("nan"))
        self._test_losses = dict(zip(sorted(rows), state.get(CLASS_TEST_LOSS, unknown), strict=True))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the recorded arrays by name, float32 ``(epochs, total)``, and the test losses ``(epochs, C)``."""
        epochs = sorted(self.rows)
        arrays = {name: np.stack([self.rows[epoch][i] for epoch in epochs]) for i, name in enumerate(QUANTITIES)}
        return {**arrays, CLASS_TEST_LOSS: np.stack([self._test_losses[epoch].numpy() for epoch in epochs])}

    def write(
        self, path: Path, labels: np.ndarray, settings: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
    ) -> Path:
        """Write the arrays with the labels of the training set ``(total,)`` and the run's settings.

        Args:
            path: The npz file.
            labels: The labels.
            settings: The run's settings.
            history: The run's history, for the cost of each epoch.
        """
        costs = [record.get("cost") for record in history]
        known = {} if None in costs or not costs else {"costs": np.array(costs)}
        return write_npz(
            path,
            **self.arrays(),
            **known,
            labels=labels,
            label_hash=label_hash(labels),
            settings=json.dumps(dict(settings), sort_keys=True),
        )


def read_dynamics(path: str | Path) -> dict[str, Any]:
    """Read recorded dynamics.

    Returns:
        The arrays of ``QUANTITIES``, ``class_test_loss``, ``labels``, ``label_hash`` (str), ``settings`` (dict) and
        ``costs``, the cost of each epoch in epoch-equivalents, ``(epochs,)``, or None if unknown. Files of earlier
        versions have no input gradients and test losses by class; these arrays are then NaN.

    Raises:
        FileError: The file is missing, damaged, or does not contain dynamics.
    """
    arrays: dict[str, Any] = read_npz(path)
    always = QUANTITIES[:_FIRST_QUANTITIES]
    missing = [name for name in (*always, "labels", "label_hash", "settings") if name not in arrays]
    if missing:
        raise FileError(
            f"{path}: does not contain recorded dynamics ({', '.join(missing)} missing); train with --measure_proxies"
        )
    shape = arrays["loss"].shape
    for name in QUANTITIES[_FIRST_QUANTITIES:]:
        arrays.setdefault(name, np.full(shape, np.nan, np.float32))
    arrays.setdefault(CLASS_TEST_LOSS, np.full((*shape[:1], 1 + int(max(arrays["labels"], default=0))), np.nan))
    if any(arrays[name].shape != shape or arrays[name].dtype.kind != "f" for name in QUANTITIES):
        raise FileError(f"{path}: is damaged: its arrays differ in shape or are not numbers; train again")
    if len(shape) != 2 or not shape[0] or shape[1:] != arrays["labels"].shape:
        raise FileError(f"{path}: is damaged: it has no epochs of {len(arrays['labels'])} examples; train again")
    costs = arrays.setdefault("costs", None)
    if costs is not None and (costs.shape != shape[:1] or costs.dtype.kind != "f" or not (costs >= 0).all()):
        raise FileError(f"{path}: is damaged: its costs are not one number per epoch; train again")
    arrays["label_hash"] = str(arrays["label_hash"])
    arrays["settings"] = parse_settings(path, arrays["settings"])
    return arrays
