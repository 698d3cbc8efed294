"""The front of the library: how sensitive is a trained network to each of its training examples?

>>> found = sensitivities(model, loader, "kfac", delta=60)
>>> found.most_sensitive(10), found.loo_nll
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from mpe.choices import CLASS_COVARIANCES, STRUCTURES
from mpe.estimates import Estimates, estimate, loo_losses, sensitivity
from mpe.posteriors import laplace_posterior, optimizer_posterior
from mpe.predictions import Predictions, given_indices, predict, refuse_not_finite
from src import artifacts
from src.artifacts import score_files
from src.datasets import dataset_name
from src.jacobians import OutputVariances, Posterior


class Sensitivities:
    """Sensitivities and leave-one-out estimates of n examples.

    Args:
        predictions: of the examples.
        estimates: of the same.
        settings: how they were made, for the score file.

    Attributes:
        predictions: see above.
        estimates: see above.
        scores: float64 (n,), the L1 norm of the estimated deviation of each example's probabilities.
        losses: float64 (n,), estimated leave-one-out losses, at most 23.026 nats each.

    Raises:
        MeasurementError: a score or a loss is not finite.
    """

    def __init__(
        self, predictions: Predictions, estimates: Estimates, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.predictions = predictions
        self.estimates = estimates
        self.scores: np.ndarray = sensitivity(estimates).numpy()
        self.losses: np.ndarray = loo_losses(predictions, estimates).numpy()
        refuse_not_finite(predictions.indices, torch.from_numpy(self.scores), torch.from_numpy(self.losses))
        self._settings = dict(settings or {})

    @property
    def indices(self) -> np.ndarray:
        """int64 (n,), the original index of each entry of ``scores`` and ``losses``."""
        return self.predictions.indices.numpy()

    @property
    def loo_nll(self) -> float:
        """Mean of ``losses``, the estimate of the negative log-likelihood on unseen examples."""
        return float(self.losses.mean())

    @property
    def unclamped_loo_nll(self) -> float:
        """The same without the limit of 23.026 nats for an example."""
        return float(loo_losses(self.predictions, self.estimates, clamp=False).mean())

    @cached_property
    def _ascending(self) -> np.ndarray:
        return np.lexsort((self.indices, self.scores))

    @cached_property
    def _descending(self) -> np.ndarray:
        return np.lexsort((self.indices, -self.scores))

    def most_sensitive(self, k: int) -> np.ndarray:
        """Original indices of the k highest scores, the highest first; ties by index."""
        return self.indices[self._descending[:k]]

    def least_sensitive(self, k: int) -> np.ndarray:
        """Original indices of the k lowest scores, the lowest first; ties by index."""
        return self.indices[self._ascending[:k]]

    def write_scores(
        self,
        folder: str | Path,
        dataset: str,
        *,
        total: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write the scores as a score file of mode ``mpe``, which ``Proxy(mode="mpe")`` reads.

        Args:
            folder: a metrics folder.
            dataset: what scripts take as ``--dataset``, or the name in file names.
            total: size of the whole part, where only some of it was scored; by default the highest index + 1.
            settings: what the json beside the file is to say besides.

        Returns:
            The two files.

        Raises:
            ArgumentError: ``dataset`` is no such name.
            FileError: the folder cannot be written.
            ValueError: an index is not below ``total``.
        """
        dataset = dataset_name(dataset)
        total = int(self.indices.max()) + 1 if total is None else total
        if self.indices.min() < 0 or self.indices.max() >= total:
            raise ValueError(
                f"indices from {self.indices.min()} to {self.indices.max()} in a part of {total} examples"
            )
        scores = np.full(total, np.nan)
        scores[self.indices] = self.scores
        record = {"mode": "mpe", "dataset": dataset, **self._settings, **(settings or {})}
        if total == len(self.indices):  # of a subset the hash of all labels is not known
            labels = np.empty(total, dtype=np.int64)
            labels[self.indices] = self.predictions.labels.numpy()
            record.setdefault("label_hash", artifacts.label_hash(labels))
        return score_files.write_scores(artifacts.score_path(folder, "mpe", dataset), scores, record)


def sensitivities(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    posterior: Posterior | Optimizer | str,
    *,
    delta: float | None = None,
    num_examples: int | None = None,
    class_cov: str = "diag",
    memory_mb: float = 128.0,
    progress: bool = False,
) -> Sensitivities:
    """Sensitivity of a trained network to each training example (Memory-Perturbation Equation, Nickl et al. 2023).

    Eq. 13 summed over classes, and Eq. 15. The model is left as it was, in whatever mode it is.

    Args:
        model: any network whose outputs are logits (b, C), on its device.
        loader: the training examples, un-augmented: ``(images, labels)`` or ``(images, labels, indices, ...)``.
            Without indices an example's index is its place in the pass, so that the loader must not shuffle; of
            torch's DataLoaders only those are taken then that read their data set from its beginning in order.
        posterior: ``"kfac"`` or ``"diag"`` for Laplace's, fitted on the same loader; the optimiser that has trained
            the model (`src.optimizers.IBLR`, IVON, Adam, AdamW); or a `Posterior`.
        delta: prior precision: the training loss is ``mean cross-entropy + delta / (2 N) |w|^2``, so a weight decay
            of w is delta = w N. For Laplace's and Adam's.
        num_examples: N for Adam's; by default the loader's number of examples.
        class_cov: a name of ``mpe.choices.CLASS_COVARIANCES``.
        memory_mb: how many MB of per-example gradients may be alive at a time.
        progress: whether to show progress bars.

    Raises:
        ValueError: anything above is missing, unknown, or does not fit.
        MeasurementError: a score is not finite.
    """
    if class_cov not in CLASS_COVARIANCES:
        raise ValueError(f"class_cov {class_cov!r} is not one of {', '.join(CLASS_COVARIANCES)}")
    settings = {"class_cov": class_cov, "posterior": _name(posterior), "delta": delta}
    refuse_shuffling(loader)
    if isinstance(posterior, str):
        if posterior not in STRUCTURES:
            known = ", ".join(repr(name) for name in STRUCTURES)
            raise ValueError(f"posterior {posterior!r} is unknown; give {known}, an optimiser or a Posterior")
        if delta is None:
            raise ValueError("Laplace's posterior needs delta, the prior precision")
        if isinstance(loader, Iterator):
            raise ValueError("Laplace's posterior takes a pass of its own; give a loader, not an iterator")
        posterior = laplace_posterior(
            model, loader, delta, structure=posterior, memory_mb=memory_mb, progress=progress
        )
    elif isinstance(posterior, Optimizer):
        if num_examples is None and "hess" not in posterior.param_groups[0]:
            num_examples = _count(loader)
        posterior = optimizer_posterior(posterior, model, num_examples=num_examples, delta=delta)
    with OutputVariances(model, posterior, full=class_cov != "diag", memory_mb=memory_mb) as engine:
        predictions = predict(engine, loader, progress=progress)
    return Sensitivities(predictions, estimate(predictions, class_cov), settings)


def refuse_shuffling(loader: Iterable[Sequence[Tensor]]) -> None:
    """Stop if a torch DataLoader may shuffle and its first batch does not say which examples it holds.

    A loader that is sure to go through its data set in order is not read. Of others a batch is, and the generators
    of torch's random numbers are put back afterwards.

    Raises:
        ValueError: it may, and does not say.
    """
    if _in_order(loader):
        return
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [holder.generator for holder in holders if isinstance(getattr(holder, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in own]
    with torch.random.fork_rng(devices=[]):
        first = next(iter(loader), None)
    for generator, state in zip(own, states, strict=True):
        generator.set_state(state)
    if first is not None and given_indices(first) is None:
        raise ValueError(
            "the loader shuffles, or may do so, and gives no integer indices, so that no score could be told to be "
            "of which example; build it with shuffle=False and without a sampler of its own, or let it give "
            "(images, labels, indices)"
        )


def _in_order(loader: Iterable[Sequence[Tensor]]) -> bool:
    """Whether batches without indices are taken to hold examples 0, 1, 2, ...

    Of torch's own loaders only what is known to do so: given a batch sampler, a DataLoader's ``sampler`` is a
    sequential one that it does not use, and samplers that shuffle have no common class.
    """
    if not isinstance(loader, DataLoader):  # a list, `src.datasets.Batches`, something around a DataLoader
        random = RandomSampler | SubsetRandomSampler | WeightedRandomSampler
        return not isinstance(getattr(loader, "sampler", None), random)
    used = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(used) is BatchSampler:
        used = used.sampler
    as_they_come = loader.num_workers > 1 and not getattr(loader, "in_order", True)  # of torch 2.6 on
    return type(used) is SequentialSampler and not as_they_come  # a subclass may do anything


def _name(posterior: Posterior | Optimizer | str) -> str:
    return posterior if isinstance(posterior, str) else type(posterior).__name__


def _count(loader: Iterable[Sequence[Tensor]]) -> int | None:
    """The loader's number of examples, where it says so: a DataLoader's data set, or `src.datasets.Batches`."""
    for name in ("dataset", "images"):
        if hasattr(getattr(loader, name, None), "__len__"):
            return len(getattr(loader, name))
    return None
