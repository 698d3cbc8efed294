"""Scores computed from one training run's recorded dynamics, and the run's per-seed score files.

Every reduction takes an array ``(epochs, total)`` with NaN where an example was not visited in an epoch, and returns
float64 ``(total,)`` with NaN for examples that were never visited. High means atypical, except for :func:`aum`, which
is stored negated. A window longer than the run is shortened to the length of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.artifacts.io import file_digest, write_json, write_pickle
from src.cli import check_options, number, option
from src.errors import ArgumentError
from src.lazy import torch
from src.metrics import flatness
from src.metrics.compare import mean_known
from src.metrics.score import Score, warn_if_not_learned

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.datasets import Batch, Batches

log = logging.getLogger(__name__)

WINDOW = 10  # epochs; J of DUAL, Dyn-Unc and TDDS, and the early epochs of EL2N


def _std(values: np.ndarray) -> np.ndarray:
    """Unbiased standard deviation over axis 0, ignoring NaN; NaN if fewer than two values remain."""
    seen = ~np.isnan(values)
    count = seen.sum(axis=0)
    spread = np.where(seen, (values - mean_known(values)) ** 2, 0.0).sum(axis=0)
    return np.sqrt(np.divide(spread, count - 1, out=np.full(spread.shape, np.nan), where=count > 1))


def _windows(values: np.ndarray, wanted: int) -> list[np.ndarray]:
    """All sliding windows ``(J, total)``, as views."""
    length = min(len(values), wanted)
    return [values[start : start + length] for start in range(len(values) - length + 1)]


def _mean_over(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Running mean of a sequence of arrays ``(total,)``, ignoring NaN."""
    total: np.ndarray | float = 0.0
    count: np.ndarray | int = 0
    for part in parts:
        seen = ~np.isnan(part)
        total, count = total + np.where(seen, part, 0.0), count + seen
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _last_seen(correct: np.ndarray) -> np.ndarray:
    """Each example's most recent value at every epoch: an epoch without a visit repeats the previous value."""
    steps = np.arange(len(correct))[:, None]
    latest = np.maximum.accumulate(np.where(np.isnan(correct), 0, steps), axis=0)
    return np.take_along_axis(correct, latest, axis=0)


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """Forgetting events: how often an example changes from correct to incorrect between consecutive visits.

    Toneva et al., ICLR 2019. An example that is never learned scores 0, as in the published SAMIS files.

    Args:
        correct: ``(epochs, total)`` of 0, 1, NaN.
    """
    filled = _last_seen(correct)
    events = ((filled[:-1] == 1) & (filled[1:] == 0)).sum(axis=0).astype(np.float64)
    return np.where(np.isnan(correct).all(axis=0), np.nan, events)


def training_accuracy(correct: np.ndarray) -> float:
    """The training accuracy of the last epoch, in training mode and on augmented images.

    Args:
        correct: ``(epochs, total)`` of 0, 1, NaN.

    Returns:
        The fraction of correct examples among those visited in the last epoch, in [0, 1].
    """
    return float(np.nanmean(correct[-1], dtype=np.float64))


NEVER_LEARNED = ("last", "after_last")


def epochs_to_learn(correct: np.ndarray, etl_never_learned: str = "last") -> np.ndarray:
    """Epochs to learn: the first epoch (counting from 1) after which an example stays correct.

    The score is 1 if the example was never misclassified, and otherwise 1 + the last epoch in which it was
    misclassified. An example is never learned if it was misclassified at its last visit. The published files store it
    like one that is learned in the last epoch, also if it is never learned in only some of the averaged seeds.

    Args:
        correct: ``(epochs, total)`` of 0, 1, NaN.
        etl_never_learned: The value of an example that is never learned. ``"last"``, the published convention: NaN,
            which averages replace by the number of epochs. ``"after_last"``: the number of epochs + 1, in each seed,
            so that it ranks above all learned examples.

    Returns:
        float64 ``(total,)``; NaN also for examples that were never visited.
    """
    steps = np.arange(1, len(correct) + 1)[:, None]
    learned = np.where(correct == 0, steps, 0).max(axis=0) + 1.0
    last = _last_seen(correct)[-1]
    never = len(correct) + 1.0 if etl_never_learned == "after_last" else np.nan
    return np.where(last == 1, learned, np.where(np.isnan(last), np.nan, never))


def csl(loss: np.ndarray) -> np.ndarray:
    """Cumulative sample loss: the sum of an example's losses over training (Ravikumar et al., ICML 2025).

    An epoch without a visit counts as the example's mean loss, which keeps rarely visited examples comparable.
    """
    return mean_known(loss) * len(loss)


def aum(margin: np.ndarray) -> np.ndarray:
    """Area under the margin: the mean over epochs of ``z_y - max_{c != y} z_c`` (Pleiss et al., NeurIPS 2020, eq. 1).

    Low means atypical; the score is stored negated.
    """
    return mean_known(margin)


def late_mean(values: np.ndarray, late_epochs: int | None = None) -> np.ndarray:
    """Mean over the last epochs, when the model is good: of the margin (AUM), or of the probability of the label.

    Low means atypical; the score is stored negated.

    Args:
        values: ``(epochs, total)``.
        late_epochs: The number of epochs; None for the second half of the run.
    """
    return mean_known(values[-late_epochs if late_epochs else len(values) // 2 :])


def csg(input_gradient: np.ndarray) -> np.ndarray:
    """Cumulative sample gradient: the sum over training of the norms of the loss's gradient at the image.

    "Memorization through the lens of sample gradients", ICLR 2026 (openreview.net/forum?id=jeTiBeW3iZ). Gradients are
    those of training steps, on augmented images. An epoch without a visit counts as the example's mean norm.
    """
    return mean_known(input_gradient) * len(input_gradient)


def cld(loss: np.ndarray, class_test_loss: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Correlation of loss differences: how well an example's loss follows the held-out loss of its class.

    Nagaraj et al. 2025 (arXiv:2508.20230): the Pearson correlation between the differences of the example's losses at
    consecutive checkpoints and those of the mean loss of its class on a validation set. Here, checkpoints are epochs,
    an example's loss is that before its training step, and the validation set is the test set. Low means atypical;
    the score is stored negated. Differences with an epoch without a visit are ignored.

    Args:
        loss: ``(epochs, total)``.
        class_test_loss: Mean test losses ``(epochs, C)``.
        labels: ``(total,)``.

    Returns:
        float64 ``(total,)`` in [-1, 1]; 0 where one of the losses is constant, NaN with fewer than two differences.

    Raises:
        ArgumentError: A class of visited examples has fewer than two differences of test losses, for example because
            it has no test examples.
    """
    own, held_out = np.diff(loss.astype(np.float64), axis=0), np.diff(class_test_loss.astype(np.float64), axis=0)
    present = np.unique(labels[~np.isnan(loss).all(axis=0)])
    lacking = present[np.isfinite(held_out[:, present]).sum(axis=0) < 2]
    if len(lacking):
        raise ArgumentError(
            "modes", f"cld: class {lacking[0]} has test losses of too few epochs, or no test examples; leave cld out"
        )
    of_class = np.where(np.isnan(own), np.nan, held_out[:, labels])  # (epochs - 1, total)
    own, of_class = own - mean_known(own), of_class - mean_known(of_class)
    covariance = np.nansum(own * of_class, axis=0)
    scale = np.sqrt(np.nansum(own**2, axis=0) * np.nansum(of_class**2, axis=0))
    known = np.isfinite(own * of_class).sum(axis=0) > 1
    return np.where(known, np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0), np.nan)


def dual(probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """DUAL: the mean over sliding windows of ``(1 - mean p_y) * std(p_y)`` (Cho et al., ICML 2025).

    The standard deviation is unbiased. A window has J = 10 epochs by default.
    """
    return _mean_over((1.0 - mean_known(w)) * _std(w) for w in _windows(probability, window))


def dyn_unc(probability: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Dynamic uncertainty: the mean over sliding windows of ``std(p_y)`` (He et al., CVPR-W 2024).

    The standard deviation is unbiased. A window has J = 10 epochs by default.
    """
    return _mean_over(_std(w) for w in _windows(probability, window))


def el2n(error_norm: np.ndarray, el2n_epochs: Sequence[int] = (1, WINDOW)) -> np.ndarray:
    """EL2N: the mean of ``||softmax(z) - onehot(y)||_2`` over early epochs.

    Paul et al., NeurIPS 2021, definition 2.4.

    Args:
        error_norm: ``(epochs, total)``.
        el2n_epochs: The first and last epoch, counting from 1 and inclusive. A last epoch beyond the end of the run
            means the run's last epoch.

    Raises:
        ArgumentError: The run does not have these epochs.
    """
    first, last = el2n_epochs
    if not 1 <= first <= min(last, len(error_norm)):
        raise ArgumentError("el2n_epochs", f"{first} {last}: is outside the run, which has {len(error_norm)} epochs")
    return mean_known(error_norm[first - 1 : last])


def tdds(divergence: np.ndarray, window: int = WINDOW, decay: float = 0.9) -> np.ndarray:
    """TDDS: the variation of an example's information gain, weighted toward late windows (Zhang et al., CVPR 2024).

    With ``d_t = KL(p_t || p_{t-1})``, each window of J epochs contributes ``R_t = sum_j (d_j - mean d)^2``, and the
    score is ``sum_t decay (1 - decay)^(T - t) R_t``.

    Args:
        divergence: ``(epochs, total)``; the first epoch is ignored, since it has no predecessor.
        window: J, in epochs.
        decay: The weight of the most recent window.
    """
    parts = []
    for part in _windows(divergence[1:], window):
        spread = (part - mean_known(part)) ** 2
        parts.append(np.where(np.isnan(spread), 0.0, spread).sum(axis=0))
    weights = decay * (1.0 - decay) ** np.arange(len(parts) - 1, -1, -1)
    scores = np.tensordot(weights, np.stack(parts), axes=1)
    return np.where((~np.isnan(divergence[1:])).sum(axis=0) > 1, scores, np.nan)


_recorded = partial(Score, source="dynamics", folder="dynamics", cost="SGD run")

COUNTS = (
    _recorded(
        "forg",
        r"$F(x_i)$",
        "forgetting events",
        folder="forgettability",
        paper="Toneva et al. 2019",
        compute=forgetting_events,
        reads=("correct",),
        assumes_learned=True,
        share_of_epochs=True,
        seed_file="forgettability_train.pkl",
    ),
    _recorded(
        "etl",
        r"$E2L(x_i)$",
        "epochs to learn",
        folder="forgettability",
        paper="SAMIS",
        compute=epochs_to_learn,
        reads=("correct",),
        options=("etl_never_learned",),
        share_of_epochs=True,
        missing=1.0,
        seed_file="epochs_to_learn_train.pkl",
    ),
)

REDUCTIONS = (
    _recorded(
        "csl",
        r"$\mathrm{CSL}(x_i)$",
        "cumulative sample loss",
        paper="Ravikumar et al. 2025",
        compute=csl,
        reads=("loss",),
    ),
    _recorded(
        "aum",
        r"$-\mathrm{AUM}(x_i)$",
        "area under the margin",
        paper="Pleiss et al. 2020",
        compute=aum,
        reads=("margin",),
        negated=True,
    ),
    _recorded(
        "dual",
        r"$\mathrm{DUAL}(x_i)$",
        "DUAL",
        paper="Cho et al. 2025",
        compute=dual,
        reads=("probability",),
        options=("window",),
        assumes_learned=True,
        fewest_epochs=2,
    ),
    _recorded(
        "dyn_unc",
        r"$U(x_i)$",
        "dynamic uncertainty",
        paper="He et al. 2024",
        compute=dyn_unc,
        reads=("probability",),
        options=("window",),
        assumes_learned=True,
        fewest_epochs=2,
    ),
    _recorded(
        "el2n",
        r"$\mathrm{EL2N}(x_i)$",
        "error norm, early epochs",
        paper="Paul et al. 2021",
        compute=el2n,
        reads=("el2n",),
        options=("el2n_epochs",),
    ),
    _recorded(
        "tdds",
        r"$\mathrm{TDDS}(x_i)$",
        "temporal dual-depth",
        paper="Zhang et al. 2024",
        compute=tdds,
        reads=("divergence",),
        options=("window",),
        assumes_learned=True,
        fewest_epochs=3,
    ),
    _recorded(
        "csg",
        r"$\mathrm{CSG}(x_i)$",
        "cumulative sample gradient",
        paper="ICLR 2026, jeTiBeW3iZ",
        compute=csg,
        reads=("input_gradient",),
    ),
    _recorded(
        "cld",
        r"$-\mathrm{CLD}(x_i)$",
        "correlation of loss differences",
        paper="Nagaraj et al. 2025",
        compute=cld,
        reads=("loss", "class_test_loss", "labels"),
        fewest_epochs=4,
        negated=True,
    ),
    _recorded(
        "late_prob",
        r"$-p_{\mathrm{late}}(x_i)$",
        "probability, late epochs",
        paper="this project",
        compute=late_mean,
        reads=("probability",),
        options=("late_epochs",),
        negated=True,
    ),
    _recorded(
        "late_aum",
        r"$-\mathrm{AUM}_{\mathrm{late}}(x_i)$",
        "area under the margin, late epochs",
        paper="this project",
        compute=late_mean,
        reads=("margin",),
        options=("late_epochs",),
        negated=True,
    ),
)

# ------------------------------------------------------------------------------------ scores of the trained model


def end_outputs(
    model: nn.Module, batches: Batches, *, total: int | None = None, progress: bool = False
) -> dict[str, np.ndarray]:
    """Loss and margin of every example at the end of training, in eval mode.

    If the data set's augmentation flips images, both are means over the image and its mirror image: the second view
    costs a forward pass and removes much of the noise of a single model.

    Args:
        model: The trained model.
        batches: Batches without augmentation, on the model's device.
        total: Length of the results; None for the size of the full training set.
        progress: Whether to show a progress bar.

    Returns:
        ``end_loss``, the cross-entropy, and ``end_margin``, the logit of the label minus the largest other logit.
        Each is float64 ``(total,)`` by original index, NaN for examples in no batch.
    """
    from src.models.base import eval_mode

    margins = np.full(batches.images.total if total is None else total, np.nan)
    mirrored = batches.images.entry.augmentation.flip

    def score(batch: Batch) -> Tensor:
        label, found = batch.labels[:, None], []
        for images in (batch.images, batch.images.flip(-1)) if mirrored else (batch.images,):
            with torch.no_grad():
                logits = model(images).double()
            margin = logits.gather(1, label)[:, 0] - logits.scatter(1, label, float("-inf")).amax(dim=1)
            found.append(torch.stack([flatness.example_losses(logits, batch.labels), margin]))
        loss, margin = torch.stack(found).mean(dim=0)
        margins[batch.indices.cpu().numpy()] = margin.cpu().numpy()
        return loss

    with eval_mode(model):
        losses = flatness.scores_by_index(batches, score, total, "loss and margin", progress)
    return {"end_loss": losses, "end_margin": margins}


_trained = partial(
    Score,
    source="end",
    folder="dynamics",
    cost="SGD run + 2 forward passes",
    paper="this project",
    passes=1 / 3,
    mirrored=True,
)

END_SCORES = (
    *flatness.END_SCORES,
    _trained(
        "end_loss",
        r"$\ell_{\mathrm{end}}(x_i)$",
        "loss at the end of training",
        compute=end_outputs,
        seed_file="end_loss_train.pkl",
    ),
    _trained(
        "end_margin",
        r"$-m_{\mathrm{end}}(x_i)$",
        "margin at the end of training",
        compute=end_outputs,
        negated=True,
        seed_file="end_margin_train.pkl",
    ),
)

LATE_RANK = _trained(
    "late_rank",
    r"$R_{\mathrm{late}}(x_i)$",
    "mean rank of late scores",
    combines=("end_loss", "late_prob", "late_aum"),
)


@dataclass(frozen=True)
class EndConfig:
    """Scores of the trained model to measure at the end of a run.

    Attributes:
        end_scores: Names of ``END_SCORES``.

    Raises:
        ArgumentError: A score does not exist.
    """

    end_scores: Sequence[str] = option(
        tuple(score.name for score in END_SCORES),
        "scores of the trained model to measure with --measure_proxies; none if empty (eps and flat take several "
        "passes over the training set, the others two forward passes)",
        choices=tuple(score.name for score in END_SCORES),
        nargs="*",
        metavar="SCORE",
        acts=(lambda args: args.measure_proxies, "without --measure_proxies"),
    )

    def __post_init__(self) -> None:
        check_options(self)


_WINDOWED = ", ".join(score.name for score in REDUCTIONS if "window" in score.options)


@dataclass(frozen=True)
class Windows:
    """How scores are computed from recorded dynamics.

    Attributes:
        window: J, the number of epochs in a window.
        el2n_epochs: The first and last epoch of EL2N, counting from 1.
        etl_never_learned: See :func:`epochs_to_learn`.
        late_epochs: See :func:`late_mean`.

    Raises:
        ArgumentError: A window has fewer than two epochs, an epoch is below 1, or a choice is unknown.
    """

    window: int = option(WINDOW, f"number of epochs in a window of {_WINDOWED}", number(int, 2))
    el2n_epochs: Sequence[int] = option(
        [1, WINDOW],
        "first and last epoch that el2n averages over",
        number(int, 1),
        nargs=2,
        metavar=("FIRST", "LAST"),
    )
    etl_never_learned: str = option(
        "last",
        "value of etl for an example that is never learned: the last epoch, like one that is learned last, as in the "
        "published files (last), or one epoch later (after_last)",
        choices=NEVER_LEARNED,
    )
    late_epochs: int | None = option(
        None, "epochs at the end that late_prob and late_aum average over (default: second half)", number(int, 1)
    )

    def __post_init__(self) -> None:
        check_options(self)


PAPERS_WINDOWS = Windows()

# ---------------------------------------------------------------------------------------------- files of one run

SEED_FILES = {score.name: score.seed_file for score in (*COUNTS, *END_SCORES)}
HISTORY_FILES = ("forgettability_history.pkl", "epochs_to_learn_history.pkl")
RECORD_FILE = "end_of_training.json"  # see write_end_of_training_scores; absent in folders of older versions
NOT_VISITED = 255
_RUN_FILES = (*SEED_FILES.values(), *HISTORY_FILES)


def has_end_of_training_scores(folder: str | Path, end_scores: Iterable[str]) -> bool:
    """Whether a run's dynamics folder contains every file of ``write_end_of_training_scores``."""
    names = [SEED_FILES[name] for name in (*(score.name for score in COUNTS), *end_scores)]
    return all((Path(folder) / name).exists() for name in (*names, *HISTORY_FILES))


def remove_end_of_training_scores(folder: str | Path) -> None:
    """Remove the score files that an earlier run left in a dynamics folder."""
    for name in (RECORD_FILE, *_RUN_FILES):
        (Path(folder) / name).unlink(missing_ok=True)


def write_end_of_training_scores(
    folder: str | Path,
    model: nn.Module,
    batches: Batches,
    dynamics: Mapping[str, np.ndarray],
    end_scores: Collection[str] = EndConfig().end_scores,
) -> list[Path]:
    """Score the trained model and write the run's per-seed files in the published formats.

    A score file is a dict original index -> float of the visited examples. Its values are raw: not divided by the
    number of epochs, not scaled. Epochs to learn is NaN for an example that was never learned. Both history files
    contain the per-epoch correctness from which the counts are computed: uint8 ``(epochs, total)``, 255 where an
    example was not visited. ``end_of_training.json`` has the sha256 of each score file and the training accuracy of
    the last epoch. A low one is also logged.

    Args:
        folder: The run's dynamics folder.
        model: The trained model.
        batches: The training examples in order, without augmentation, on the model's device.
        dynamics: The recorded arrays ``(epochs, total)``; only ``correct`` is used.
        end_scores: The scores of the trained model to measure.

    Returns:
        The paths of the files.
    """
    folder, correct = Path(folder), dynamics["correct"]
    visited = np.flatnonzero(~np.isnan(correct).all(axis=0))
    scores = {score.name: score.from_dynamics(dynamics) for score in COUNTS}
    measured: dict[Any, Any] = {}  # by function, because several scores may come from one pass
    for score in sorted(END_SCORES, key=lambda score: score.name != "flat"):  # as earlier versions listed them
        if score.name not in end_scores:
            continue
        if score.compute not in measured:
            measured[score.compute] = score.compute(model, batches, total=correct.shape[1], progress=True)
        values = measured[score.compute]
        values = values[score.name] if isinstance(values, dict) else values
        wrong = visited[~np.isfinite(values[visited])]
        if len(wrong):
            log.warning(
                "%s is not finite for %d examples (indices %s); average_scores.py will refuse this seed",
                score.title,
                len(wrong),
                ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else ""),
            )
        scores[score.name] = values
    written = [
        write_pickle(folder / SEED_FILES[name], dict(zip(visited.tolist(), values[visited].tolist(), strict=True)))
        for name, values in scores.items()
    ]
    accuracy = training_accuracy(correct)
    record = {**{path.name: file_digest(path) for path in written}, "training_accuracy": accuracy}
    # The history files come last, since their presence marks the folder as complete.
    written.append(write_json(folder / RECORD_FILE, record))
    measured_end = (score for score in END_SCORES if score.name in end_scores)
    warn_if_not_learned((*COUNTS, *measured_end, *REDUCTIONS), accuracy, folder)
    history = np.where(np.isnan(correct), NOT_VISITED, correct).astype(np.uint8)
    return written + [write_pickle(folder / name, history) for name in HISTORY_FILES]
