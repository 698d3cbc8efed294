"""Linear datamodeling score (LDS): how well an attribution predicts models trained on subsets.

Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, definition 2.3. An attribution gives each
training example i a contribution to the output of each test example. Its prediction for a model trained on a subset
is the sum over the subset. The LDS of a test example is Spearman's correlation, over subsets, between these sums and
the outputs of the trained models. The output is the margin ``log p_y - log(1 - p_y)``. The subsets and outputs are
those of the members of ``compute_memorization.py``. A single member per subset makes the outputs noisy, which limits
the LDS of every attribution alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts.io import read_npy
from src.artifacts.store import check_consistent, check_same_data
from src.cli import check_options, number, option
from src.errors import ArgumentError, FileError
from src.metrics.compare import Interval, percentile_interval, spearman
from src.metrics.memorization import Members, read_members

MOST_TEST_EXAMPLES = 500
_WITH_MEMBERS = (lambda args: args.members is not None, "without --members")
_WITH_CHECKPOINT = (lambda args: args.mpe_checkpoint is not None, "without --mpe_checkpoint")


@dataclass(frozen=True)
class LdsConfig:
    """Which attributions to evaluate by the linear datamodeling score.

    Attributes:
        members: The folder of members, from ``compute_memorization.py``; None for no LDS.
        attribution: Files of attributions, each optionally preceded by ``NAME=``.
        mpe_checkpoint: A model trained on the full training set, for MPE's attribution.
        mpe_delta: Prior precision of its posterior; None for the weight decay times the number of examples, or 1.
        test_examples: The number of test examples.

    Raises:
        ArgumentError: A value is out of range, or there is nothing to evaluate.
    """

    members: Path | None = option(
        None,
        "also measure the linear datamodeling score (LDS) of attributions, on the models in this folder of "
        "compute_memorization.py (default: no LDS)",
        Path,
        metavar="DIR",
    )
    attribution: Sequence[str] = option(
        (),
        "attributions to evaluate: .npy files (test examples x training examples; positive where a training example "
        "raises the margin of the test example's label) (default: none)",
        nargs="+",
        metavar="[NAME=]FILE",
        acts=_WITH_MEMBERS,
    )
    mpe_checkpoint: Path | None = option(
        None,
        "checkpoint of a model trained on the full training set; evaluates the contributions that the "
        "Memory-Perturbation Equation predicts with its Laplace posterior (default: none)",
        Path,
        metavar="FILE",
        acts=_WITH_MEMBERS,
    )
    mpe_delta: float | None = option(
        None,
        "prior precision of that posterior (default: weight decay x training examples, else 1)",
        number(float, 0, open_low=True),
        acts=_WITH_CHECKPOINT,
    )
    test_examples: int = option(
        MOST_TEST_EXAMPLES,
        "test examples of the LDS, evenly spaced in the test set; fewer if it is smaller",
        number(int, 2, MOST_TEST_EXAMPLES),
        acts=_WITH_MEMBERS,
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.members is not None and not self.attribution and self.mpe_checkpoint is None:
            raise ArgumentError("members", f"{self.members}: give --attribution, --mpe_checkpoint, or both")

    def chosen(self, total: int) -> np.ndarray:
        """The test examples, as ascending indices in a test set of ``total``."""
        return np.arange(min(self.test_examples, total)) * total // min(self.test_examples, total)


def read_subsets(folder: Path, n: int, label_hash: str | None = None, data_hash: str | None = None) -> Members:
    """Read all members in a folder.

    Args:
        folder: A folder of ``compute_memorization.py``.
        n: The number of training examples.
        label_hash: The hash of their labels, if known.
        data_hash: The hash of their images, if known.

    Raises:
        FileError: There are fewer than three members, they are damaged, or they were trained on other data or
            differently.
    """
    files = sorted(folder.glob("members_*.npz"))
    read = [(path, *read_members(path)) for path in files]
    if sum(len(members.numbers) for _, members, _ in read) < 3:
        raise FileError(f"{folder}: has fewer than 3 members; give a folder that compute_memorization.py wrote")
    check_consistent([(path, settings) for path, _, settings in read])
    for path, members, settings in read:
        known = {"label_hash": settings.get("labels"), "data_hash": settings.get("images")}
        facts = {"total": members.included.shape[1], **known}
        remedy = "give members trained on this data set"
        check_same_data(path, facts, remedy, total=n, label_hash=label_hash, data_hash=data_hash)
    return reduce(add, (members for _, members, _ in read))


def read_attribution(text: str, members: Members) -> tuple[str, np.ndarray]:
    """Read one entry of ``LdsConfig.attribution``.

    Returns:
        Its name, and the attribution, float64 ``(t, n)`` with all t test examples.

    Raises:
        FileError: The file is missing or damaged, or its shape does not match the members.
    """
    name, separator, file = text.partition("=")
    path = Path(text) if not separator or Path(text).exists() else Path(file)
    values = read_npy(path)
    shape = (members.test_correct.shape[1], members.included.shape[1])
    if values.shape != shape or values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise FileError(
            f"{path}: is not an attribution of {shape[0]} test x {shape[1]} training examples (finite numbers), but "
            f"{values.dtype} of shape {values.shape}"
        )
    return (path.stem if path == Path(text) else name), values


def linear_datamodeling_scores(attribution: np.ndarray, included: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The LDS of each test example.

    Args:
        attribution: ``(t, n)``, the contribution of training example i to the output of each test example.
        included: bool ``(m, n)``, the examples that each of m models was trained on.
        outputs: ``(m, t)``, the outputs of the models.

    Returns:
        float64 ``(t,)``; NaN where the predictions or the outputs of all models are equal.
    """
    predicted = included.astype(np.float64) @ np.asarray(attribution, dtype=np.float64).T  # (m, t)
    return np.array([spearman(*columns) for columns in zip(predicted.T, outputs.T, strict=True)])


def mean_interval(values: np.ndarray, resamples: int, confidence: float, seed: int) -> Interval:
    """The mean of values ``(t,)`` without NaN, with a percentile bootstrap interval over them."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Interval(*3 * [float("nan")])
    means = known[np.random.default_rng(seed).integers(len(known), size=(resamples, len(known)))].mean(axis=1)
    return percentile_interval(float(known.mean()), means, confidence)


def lds_row(
    name: str,
    attribution: np.ndarray,
    members: Members,
    chosen: np.ndarray,
    bootstrap: Mapping[str, Any],
    cost: float | None = None,
) -> dict[str, Any]:
    """One row of the table of LDS.

    Args:
        name: The attribution's name.
        attribution: ``(len(chosen), n)``.
        members: The subsets and their models.
        chosen: The test examples.
        bootstrap: The arguments ``resamples``, ``confidence`` and ``seed`` of :func:`mean_interval`.
        cost: In epoch-equivalents; None if unknown.
    """
    outputs = members.test_margin[:, chosen].astype(np.float64)
    each = linear_datamodeling_scores(attribution, members.included, outputs)
    mean = [None if np.isnan(value) else float(value) for value in mean_interval(each, **bootstrap)]
    row = dict(zip(("lds", "lds_low", "lds_high"), mean, strict=True))
    sizes = {"test_examples": int((~np.isnan(each)).sum()), "members": len(members.numbers)}
    return {"attribution": name, **row, **sizes, "cost": cost}


def lds_markdown(rows: Sequence[Mapping[str, Any]], caption: str, confidence: float) -> str:
    """Format rows of :func:`lds_row` as a Markdown table."""
    header = f"| attribution | LDS ({100 * confidence:g} % interval) | test examples | members | cost (epochs) |"
    lines = [caption, "", header, "|---|---:|---:|---:|---:|"]
    for row in rows:
        value = "-" if row["lds"] is None else f"{row['lds']:.3f} ({row['lds_low']:.3f} to {row['lds_high']:.3f})"
        cost = "unknown" if row["cost"] is None else f"{row['cost']:.4g}"
        lines.append(f"| {row['attribution']} | {value} | {row['test_examples']} | {row['members']} | {cost} |")
    return "\n".join([*lines, ""])
