"""Closed-form estimates of how the prediction on a training example changes if the example is removed, in float64.

For logits f, error ``e = p - onehot(y)``, logit covariance V, and ``Lambda = diag(p) - p p^T`` (Nickl et al. 2023,
Eqs. 12, 13, and 15):

- ``diag``: ``df_c = V_cc e_c`` and ``dp_c = p_c (1 - p_c) V_cc e_c`` for each class, as in the paper's experiments.
  It includes the variance of a common shift of all logits, which does not affect the probabilities.
- ``full``: ``df = V e``, ``dp = Lambda V e``.
- ``woodbury``: one Newton step on the problem without the example, ``df = V (I - Lambda V)^-1 e``, exact for
  quadratic losses, and ``dp = softmax(f + df) - softmax(f)``. It is valid if all eigenvalues of Lambda V are below 1,
  which the full GGN guarantees but its approximations do not. Otherwise, ``full`` is used.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

from mpe.config import CLASS_COVARIANCES, STRUCTURES
from mpe.posterior import (
    EPS,
    Predictions,
    chunks,
    clamped_errors,
    clamped_nll,
    given_indices,
    laplace_posterior,
    optimizer_posterior,
    predict,
    refuse_not_finite,
)
from src.artifacts.io import label_hash
from src.artifacts.store import write_scores
from src.datasets import dataset_name
from src.datasets.files import Examples, write_score_table
from src.jacobians import DensePosterior, Posterior, output_variances
from src.jacobians.ggn import root_of_softmax_covariance
from src.metrics import SCORES
from src.rng import generator

log = logging.getLogger(__name__)

ENTRIES = 2**22
"""Maximum number of values in a block of work."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimated deviations of each example's outputs if only that example is left out of training.

    Attributes:
        output_deviations: float64 (n, C), of the logits.
        probability_deviations: float64 (n, C).
        unstable: bool (n,), True if ``woodbury`` is invalid and the first-order ``full`` form is used.
    """

    output_deviations: Tensor
    probability_deviations: Tensor
    unstable: Tensor


def estimate(predictions: Predictions, class_cov: str = "diag", errors: Tensor | None = None) -> Estimates:
    """Estimate the deviations of all examples.

    Args:
        predictions: predictions for n examples. ``full`` and ``woodbury`` need (n, C, C) covariances; ``diag``
            accepts both.
        class_cov: one of ``CLASS_COVARIANCES``.
        errors: (n, C) errors that replace those of the predictions, for example `sampled_errors`. By default,
            ``diag`` uses the clamped errors of the paper's experiments, and the other forms use the unclamped errors,
            which sum to 0.

    Raises:
        ValueError: the form is unknown, or needs covariances but the predictions only have variances.
        MeasurementError: a deviation is not finite.
    """
    if class_cov not in CLASS_COVARIANCES:
        raise ValueError(f"class_cov {class_cov!r} is not one of {', '.join(CLASS_COVARIANCES)}")
    if class_cov != "diag" and not predictions.full:
        raise ValueError(f"class_cov {class_cov!r} needs (n, C, C) covariances; predict with an engine of full=True")
    p = predictions.probabilities
    unstable = torch.zeros(len(predictions), dtype=torch.bool)
    if class_cov == "diag":
        shift = predictions.diagonal * (predictions.errors if errors is None else errors)
        change = (p * (1.0 - p)).clamp(EPS, 1.0 - EPS) * shift
    else:
        e = predictions.residuals if errors is None else errors
        shift = (predictions.variances @ e.unsqueeze(2)).squeeze(2)
        change = p * (shift - (p * shift).sum(1, keepdim=True))
    if class_cov == "woodbury":
        for part in chunks(len(predictions), max(1, ENTRIES // p.shape[1] ** 2)):
            root = root_of_softmax_covariance(predictions.logits[part])
            found, largest = left_out_shift(predictions.variances[part], e[part], root)
            holds = largest < 1.0
            unstable[part] = ~holds
            shift[part] = torch.where(holds.unsqueeze(1), found, shift[part])
            moved = (predictions.logits[part] + shift[part]).softmax(1) - p[part]
            change[part] = torch.where(holds.unsqueeze(1), moved, change[part])
    if unstable.any():
        log.warning(
            "woodbury: Lambda V has an eigenvalue of at least 1 for %d of %d examples; using the first-order full "
            "form for these",
            int(unstable.sum()),
            len(unstable),
        )
    refuse_not_finite(predictions.indices, shift, change)
    return Estimates(shift, change, unstable)


def left_out_shift(variances: Tensor, errors: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Change of the outputs after a Newton step without the example: ``V (I - Lambda V)^-1 e``, ``Lambda = R^T R``.

    It is computed as ``V (e + R^T (I - R V R^T)^-1 R V e)``, which solves a symmetric system. It is exact for
    quadratic losses: for one output and ``Lambda = 1``, it is ``v e / (1 - v)``, the leave-one-out residual of ridge
    regression (PRESS).

    Args:
        variances: (n, C, C) V, symmetric.
        errors: (n, C) e, the gradient of the loss with respect to the outputs.
        root: (n, r, C) R.

    Returns:
        (n, C) shifts, 0 if undefined, and (n,) the largest eigenvalue of ``R V R^T`` (and of Lambda V), which must be
        below 1.
    """
    passed = root @ variances  # (n, r, C)
    inner = passed @ root.mT  # (n, r, r)
    inner = 0.5 * (inner + inner.mT)
    largest = torch.linalg.eigvalsh(inner)[:, -1]
    holds = (largest < 1.0).view(-1, 1, 1)
    system = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device) - torch.where(holds, inner, 0.0)
    e = errors.unsqueeze(2)
    solved = torch.linalg.solve(system, passed @ e)  # (n, r, 1)
    shift = variances @ (e + root.mT @ solved)
    return torch.where(holds, shift, 0.0).squeeze(2), largest


def removed_groups(covariances: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Estimate how predictions on the members of a group change if the group is removed (Eq. 43).

    An example has one output f, the difference of two logits, and the prediction ``sigma(f)``; ``e = sigma(f) - y``.

    - ``full``: ``sigma'(f) V e``, with the covariances V between all members.
    - ``diag``: the second form of Eq. 43, which keeps only the diagonal of V: each member is removed alone.
    - ``woodbury``: one Newton step on the problem without the group, see `left_out_shift`; otherwise ``full``.

    Args:
        covariances: (G, K, K) V, for G groups of K members.
        logits: (G, K) f.
        labels: (G, K) y, 0 or 1.

    Returns:
        For each form, float64 (G, K), the estimated changes of ``sigma(f)``.
    """
    p = logits.sigmoid()
    slopes, e = p * (1.0 - p), p - labels
    full = slopes * (covariances @ e.unsqueeze(2)).squeeze(2)
    shift, largest = left_out_shift(covariances, e, torch.diag_embed(slopes.sqrt()))
    unstable = largest >= 1.0
    if unstable.any():
        log.warning(
            "woodbury: Lambda V has an eigenvalue of at least 1 for %d of %d groups; using the first-order full form "
            "for these",
            int(unstable.sum()),
            len(unstable),
        )
    return {
        "diag": slopes * covariances.diagonal(dim1=1, dim2=2) * e,
        "full": full,
        "woodbury": torch.where(unstable.unsqueeze(1), full, (logits + shift).sigmoid() - p),
    }


def sensitivity(estimates: Estimates) -> Tensor:
    """Float64 (n,): the L1 norm over classes of the estimated deviation of the probabilities (App. I.2)."""
    return estimates.probability_deviations.abs().sum(1)


def loo_losses(predictions: Predictions, estimates: Estimates, *, clamp: bool = True) -> Tensor:
    """Estimated leave-one-out losses ``-log softmax(f + df)[y]`` (Eq. 15; its mean is the experiments' LOO-NLL).

    Args:
        predictions: predictions for n examples.
        estimates: estimates for the same examples.
        clamp: whether to clamp probabilities to at least 1e-10, as in the paper's experiments.

    Returns:
        Float64 (n,).
    """
    moved = (predictions.logits + estimates.output_deviations).log_softmax(1)
    chosen = moved.gather(1, predictions.labels.unsqueeze(1)).squeeze(1)
    return clamped_nll(chosen) if clamp else -chosen


def sampled_errors(
    predictions: Predictions,
    *,
    samples: int = 150,
    generator: torch.Generator,
    chunk: int | None = None,
    correlated: bool = False,
) -> Tensor:
    """Errors of the mean probabilities over Gaussian samples of the logits, which estimate the expectation in Eq. 10.

    Args:
        predictions: predictions for n examples.
        samples: number of samples per example.
        generator: a CPU generator. Each example draws its own ``samples * C`` numbers, one example after another.
        chunk: number of examples processed at a time; affects only memory.
        correlated: whether to sample from the (C, C) covariances. By default, each logit is sampled independently, as
            in the paper's experiments.

    Returns:
        Float64 (n, C). By default, clamped like `Predictions.errors`. With ``correlated``, unclamped, so the errors
        sum to 0 and cancel any common shift of all logits.
    """
    n, c = predictions.logits.shape
    found = torch.empty_like(predictions.logits)
    for part in chunks(n, chunk or max(1, ENTRIES // (samples * c))):
        noise = torch.empty(part.stop - part.start, samples, c, dtype=torch.float64)
        for own in noise:
            # The size of a draw is fixed: a larger draw uses the generator's numbers in a different order.
            own.normal_(generator=generator)
        if correlated:
            noise = noise @ _centred_root(predictions.variances[part])
        else:
            noise.mul_(predictions.diagonal[part].sqrt().unsqueeze(1))
        found[part] = noise.add_(predictions.logits[part].unsqueeze(1)).softmax(2).mean(1)
    found -= torch.nn.functional.one_hot(predictions.labels, c)
    return found if correlated else clamped_errors(found)


def sampled_sensitivities(predictions: Predictions, forms: Sequence[str], seed: int, step: int) -> np.ndarray:
    """Compute the sensitivities with the errors of 150 logit samples, ``(forms, N)``.

    The diagonal form uses the paper's errors: independent logit samples, clamped. The other forms use the unclamped
    errors of correlated logit samples. The paper's errors would reintroduce the variance of a common shift of all
    logits, which does not affect the probabilities and which these forms exclude.

    Args:
        predictions: predictions for n examples.
        forms: some of ``CLASS_COVARIANCES``.
        seed: seed of the samples.
        step: the optimizer step, which also determines the samples.
    """
    errors: dict[bool, Tensor] = {}
    for correlated in {form != "diag" for form in forms}:
        draws = generator(seed, step, "logit samples")
        errors[correlated] = sampled_errors(predictions, generator=draws, correlated=correlated)
    rows = [sensitivity(estimate(predictions, form, errors[form != "diag"])).numpy() for form in forms]
    return np.array(rows)


def _centred_root(variances: Tensor) -> Tensor:
    """Symmetric square roots (n, C, C) of ``H V H`` with ``H = I - 11^T / C``, which subtracts the mean logit.

    Centering does not change the softmax. It removes the variance of a common shift of all logits, which would
    otherwise change the samples. The symmetric root does not depend on the choice of eigenvectors.
    """
    centred = variances - variances.mean(1, keepdim=True)
    centred = centred - centred.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh(centred)
    return (vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)) @ vectors.mT


FEWEST_PAIRS = 10
"""Minimum number of pairs for a bootstrap interval."""


class Correlation(NamedTuple):
    """A correlation and the bounds of its confidence interval; NaN if undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


def correlation_intervals(
    x: np.ndarray, y: np.ndarray, resamples: int = 2000, seed: int = 0
) -> dict[str, Correlation]:
    """Spearman and Pearson correlation with 95 % percentile bootstrap intervals (Fig. 2).

    Pairs are resampled with replacement and ranked again in each resample; ties get their mean rank. Resamples in
    which ``x`` or ``y`` is constant have no correlation and are skipped. An interval is undefined for fewer than 10
    pairs, because its coverage would be too low, and if all resamples have the same correlation.

    Args:
        x: ``(n,)``.
        y: ``(n,)``.
        resamples: Number of resamples.
        seed: Seed for resampling.

    Returns:
        ``Spearman`` and ``Pearson``; NaN for fewer than 3 pairs (two are always perfectly correlated) or if ``x`` or
        ``y`` is constant.
    """
    from scipy import stats

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    names = ("Spearman", "Pearson")
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return dict.fromkeys(names, Correlation(np.nan, np.nan, np.nan))

    def correlations(positions: np.ndarray, axis: int = -1) -> np.ndarray:  # (..., n) -> (2, ...)
        own = [values[positions] for values in (x, y)]
        ranked = [stats.rankdata(values, axis=axis) for values in own]
        return np.stack([stats.pearsonr(*pair, axis=axis).statistic for pair in (ranked, own)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # constant resamples
        found = stats.bootstrap(
            (np.arange(len(x)),),
            correlations,
            n_resamples=resamples,
            batch=max(1, 1_000_000 // len(x)),  # bounds the memory
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
        low, high = np.nanquantile(found, (0.025, 0.975), axis=1)
    none = (len(x) < FEWEST_PAIRS) | ~(high - low > 1e-9)
    low[none] = high[none] = np.nan
    ends = zip(correlations(np.arange(len(x))), low, high, strict=True)
    return {name: Correlation(*map(float, each)) for name, each in zip(names, ends, strict=True)}


def correlation_text(true: np.ndarray, estimated: np.ndarray) -> str:
    """Format the number of pairs, their correlations and the slope, one per line; a dash if one is undefined.

    The slope is that of the line through the origin with the least squared distance from the estimates. It is 1 if
    they have the size of the true values.
    """
    found = correlation_intervals(true, estimated)
    few = len(true) < FEWEST_PAIRS
    which = f"no intervals for fewer than {FEWEST_PAIRS}" if few else "95 % bootstrap intervals"
    known = not all(np.isnan(correlation.value) for correlation in found.values())
    lines = [f"n = {len(true):,}" + f" ({which})" * known]
    for name, correlation in found.items():
        same = known and not few and bool(np.isnan(correlation.low))
        lines.append(f"{name} {correlation}" + " (all resamples agree: no interval)" * same)
    lines.append(f"slope {true @ estimated / (true @ true):.3g}" if true.any() else "slope –")
    return "\n".join(lines)


class Sensitivities:
    """Sensitivities and leave-one-out estimates for n examples.

    Args:
        predictions: predictions for the examples.
        estimates: estimates for the same examples.
        settings: how they were computed, for the score file.

    Attributes:
        predictions: see above.
        estimates: see above.
        scores: float64 (n,), the L1 norm of the estimated deviation of each example's probabilities.
        losses: float64 (n,), estimated leave-one-out losses, each at most 23.026 nats.

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
        """Mean of ``losses``, an estimate of the negative log-likelihood on unseen examples."""
        return float(self.losses.mean())

    @property
    def unclamped_loo_nll(self) -> float:
        """Like ``loo_nll``, without the limit of 23.026 nats per example."""
        return float(loo_losses(self.predictions, self.estimates, clamp=False).mean())

    def most_sensitive(self, k: int) -> np.ndarray:
        """Original indices of the k highest scores, highest first, ties broken by index."""
        return self.indices[np.lexsort((self.indices, -self.scores))[:k]]

    def least_sensitive(self, k: int) -> np.ndarray:
        """Original indices of the k lowest scores, lowest first, ties broken by index."""
        return self.indices[np.lexsort((self.indices, self.scores))[:k]]

    def write_scores(
        self,
        folder: str | Path,
        dataset: str,
        *,
        total: int | None = None,
        settings: Mapping[str, Any] | None = None,
        examples: Examples | None = None,
    ) -> list[Path]:
        """Write the scores as a score file of mode ``mpe``, which ``Proxy(mode="mpe")`` reads.

        Args:
            folder: a metrics folder.
            dataset: the value of ``--dataset``, or the data set's name in file names.
            total: size of the full training set, if only a subset was scored; by default the highest index + 1.
            settings: additional entries for the json file next to the scores.
            examples: the training examples (``ImageSet.examples``), for the csv file; None leaves their files and
                classes empty.

        Returns:
            The paths of the pickle, the json file and the csv file.

        Raises:
            ArgumentError: ``dataset`` is not a valid name.
            FileError: the folder cannot be written.
            ValueError: an index is not below ``total``.
        """
        dataset = dataset_name(dataset)
        total = int(self.indices.max()) + 1 if total is None else total
        if self.indices.min() < 0 or self.indices.max() >= total:
            raise ValueError(
                f"indices range from {self.indices.min()} to {self.indices.max()}, but there are {total} examples"
            )
        scores = np.full(total, np.nan)
        scores[self.indices] = self.scores
        record = {"mode": "mpe", "dataset": dataset, **self._settings, **(settings or {})}
        if total == len(self.indices):  # the hash of all labels is unknown for a subset
            labels = np.empty(total, dtype=np.int64)
            labels[self.indices] = self.predictions.labels.numpy()
            record.setdefault("label_hash", label_hash(labels))
        path = SCORES["mpe"].path(folder, dataset)
        return [*write_scores(path, scores, record), write_score_table(path, scores, examples)]


def sensitivities(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    posterior: Posterior | DensePosterior | Optimizer | str,
    *,
    delta: float | None = None,
    num_examples: int | None = None,
    class_cov: str = "diag",
    memory_mb: float = 128.0,
    progress: bool = False,
) -> Sensitivities:
    """Sensitivity of a trained model to each training example (Memory-Perturbation Equation, Nickl et al. 2023).

    MPE scores an example by its prediction error times its predictive variance: Eq. 13, in L1 norm over classes.
    Leave-one-out losses follow Eq. 15. The model and its mode are unchanged.

    Args:
        model: any model with logits (b, C) as outputs, on its device.
        loader: the training examples without augmentation, as ``(images, labels)`` or ``(images, labels, indices,
            ...)``. Without indices, an example's index is its position in the pass, so the loader must not shuffle.
            In that case, a torch DataLoader is accepted only if it reads its data set in order from the beginning.
        posterior: ``"kfac"``, ``"diag"`` or ``"ggn"`` (exact, for small models) for a Laplace posterior fitted on the
            same loader; the optimizer that trained the model (`src.optimizers.IBLR`, IVON, Adam, AdamW); or a
            `Posterior`.
        delta: prior precision, for Laplace and Adam. The training loss is ``mean cross-entropy + delta / (2 N)
            |w|^2``, so weight decay w corresponds to delta = w N.
        num_examples: N, for Adam; by default the number of examples in the loader.
        class_cov: one of ``mpe.config.CLASS_COVARIANCES``.
        memory_mb: upper limit on the per-example gradients in memory at a time, in MiB.
        progress: whether to show progress bars.

    Raises:
        ValueError: an argument is missing or invalid.
        MeasurementError: a score is not finite.
    """
    if class_cov not in CLASS_COVARIANCES:
        raise ValueError(f"class_cov {class_cov!r} is not one of {', '.join(CLASS_COVARIANCES)}")
    name = posterior if isinstance(posterior, str) else type(posterior).__name__
    settings = {"class_cov": class_cov, "posterior": name, "delta": delta}
    refuse_shuffling(loader)
    if isinstance(posterior, str):
        if posterior not in STRUCTURES:
            known = ", ".join(map(repr, STRUCTURES))
            raise ValueError(f"posterior {posterior!r} is unknown; give {known}, an optimizer, or a Posterior")
        if delta is None:
            raise ValueError("the Laplace posterior needs delta, the prior precision")
        if isinstance(loader, Iterator):
            raise ValueError("the Laplace posterior needs a separate pass; give a loader, not an iterator")
        posterior = laplace_posterior(
            model, loader, delta, structure=posterior, memory_mb=memory_mb, progress=progress
        )
    elif isinstance(posterior, Optimizer):
        if num_examples is None and "hess" not in posterior.param_groups[0]:
            num_examples = _count(loader)
        posterior = optimizer_posterior(posterior, model, num_examples=num_examples, delta=delta)
    with output_variances(model, posterior, full=class_cov != "diag", memory_mb=memory_mb) as engine:
        predictions = predict(engine, loader, progress=progress)
    return Sensitivities(predictions, estimate(predictions, class_cov), settings)


def refuse_shuffling(loader: Iterable[Sequence[Tensor]]) -> None:
    """Refuse a torch DataLoader that may shuffle and whose first batch has no indices.

    A loader that is known to read its data set in order is not read. Otherwise, one batch is read, and the states of
    torch's random number generators are restored afterwards.

    Raises:
        ValueError: the loader may shuffle and provides no indices.
    """
    if reads_in_order(loader):
        return
    batches = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = [holder.generator for holder in holders if isinstance(getattr(holder, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in own]
    with torch.random.fork_rng(devices=[]):
        first = next(iter(loader), None)
    for each, state in zip(own, states, strict=True):
        each.set_state(state)
    if first is not None and given_indices(first) is None:
        raise ValueError(
            "the loader may shuffle but provides no integer indices, so scores cannot be assigned to examples; build "
            "it with shuffle=False and no custom sampler, or make it return (images, labels, indices)"
        )


def reads_in_order(loader: Iterable[Sequence[Tensor]]) -> bool:
    """Whether batches without indices are assumed to contain examples 0, 1, 2, ...

    Among torch DataLoaders, only those known to do so qualify. If a batch sampler is given, a DataLoader's
    ``sampler`` is an unused sequential one, and samplers that shuffle have no common class.
    """
    if not isinstance(loader, DataLoader):  # a list, `src.datasets.Batches`, a wrapper around a DataLoader
        random = RandomSampler | SubsetRandomSampler | WeightedRandomSampler
        return not isinstance(getattr(loader, "sampler", None), random)
    used = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(used) is BatchSampler:
        used = used.sampler
    as_they_come = loader.num_workers > 1 and not getattr(loader, "in_order", True)  # torch 2.6 and later
    return type(used) is SequentialSampler and not as_they_come  # a subclass may do anything


def _count(loader: Iterable[Sequence[Tensor]]) -> int | None:
    """The number of examples in the loader, if known: from a DataLoader's data set or `src.datasets.Batches`."""
    for name in ("dataset", "images"):
        if hasattr(getattr(loader, name, None), "__len__"):
            return len(getattr(loader, name))
    return None
