"""One pass over a data set that gives each example its score, by original index."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from src.datasets import Batch


def example_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each example, in float64 so that the error of a confident output is not rounded away.

    Args:
        outputs: (b, c) logits.
        labels: (b,).

    Returns:
        (b,) float64 losses, differentiable.
    """
    return F.cross_entropy(outputs.double(), labels, reduction="none")


def scores_by_index(
    batches: Iterable[Batch], score: Callable[[Batch], Tensor], total: int | None, title: str, progress: bool
) -> np.ndarray:
    """Score every batch and put the values at the examples' original positions.

    Args:
        batches: un-augmented batches.
        score: batch -> (b,) values.
        total: length of the result; None: ``batches.images.total``.
        title: what the progress bar says.
        progress: whether to show one.

    Returns:
        (total,) float64, NaN where no batch came by.
    """
    length = batches.images.total if total is None else total
    scores = np.full(length, np.nan)
    for batch in tqdm(batches, desc=title, leave=False, disable=None if progress else True):
        if not len(batch.labels):  # a rank without a share
            continue
        scores[batch.indices.cpu().numpy()] = score(batch).to("cpu", torch.float64).numpy()
    return scores
