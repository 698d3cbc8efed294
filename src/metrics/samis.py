"""SAMIS scores: how differently an SGD-trained and a SAM-trained copy of one network see an example.

For logits ``z`` of example i: ``p = softmax(z)`` and ``l = -log p_y``. Logits stay float32 as the network makes them;
softmax and logarithm are taken in float64, so that saturated examples do not tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src.artifacts.io import read_npz, write_npz
from src.artifacts.paths import samis_path
from src.artifacts.store import checked_array, load_result, parse_settings
from src.errors import FileError
from src.lazy import torch
from src.metrics.score import Score

if TYPE_CHECKING:
    from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-example cross-entropy ``-log softmax(z)_y`` in float64.

    Args:
        logits: ``(b, C)``.
        labels: ``(b,)`` int64.

    Returns:
        float64 ``(b,)``.
    """
    log_p = torch.log_softmax(logits.double(), dim=1)  # (b, C)
    return -log_p.gather(1, labels[:, None]).squeeze(1)


def samis_loss(loss_sgd: Tensor, loss_sam: Tensor) -> Tensor:
    """SAMIS-L: ``S_L(i) = | l_SGD(i) - l_SAM(i) |``.

    Args:
        loss_sgd: Per-example cross-entropy ``(b,)`` of the SGD-trained model.
        loss_sam: ``(b,)`` of the SAM-trained model.

    Returns:
        ``(b,)``, of the losses' type.
    """
    return (loss_sgd - loss_sam).abs()


def samis_prob(logits_sgd: Tensor, logits_sam: Tensor) -> Tensor:
    """SAMIS-P: ``S_P(i) = sum_c | p_SGD,c(i) - p_SAM,c(i) |``, an L1 distance in [0, 2].

    Args:
        logits_sgd: ``(b, C)`` of the SGD-trained model.
        logits_sam: ``(b, C)`` of the SAM-trained model.

    Returns:
        float64 ``(b,)``.
    """
    p_sgd = torch.softmax(logits_sgd.double(), dim=1)
    p_sam = torch.softmax(logits_sam.double(), dim=1)
    return (p_sgd - p_sam).abs().sum(dim=1)


def mean_loss(loss_sgd: np.ndarray, loss_sam: np.ndarray) -> np.ndarray:
    """The mean loss of both models, which the SAMIS scores are compared with."""
    return (loss_sgd + loss_sam) / 2


SCORES = (
    Score(
        "samis_loss",
        r"$S_L(x_i)$",
        "SAMIS-L",
        source="pair",
        folder="sam_sgd",
        cost="SGD run + SAM run",
        paper="SAMIS",
        compute=samis_loss,
        reads=("loss_sgd", "loss_sam"),
        seed_file="loss",
    ),
    Score(
        "samis_prob",
        r"$S_P(x_i)$",
        "SAMIS-P",
        source="pair",
        folder="sam_sgd",
        cost="SGD run + SAM run",
        paper="SAMIS",
        compute=samis_prob,
        reads=("logits_sgd", "logits_sam"),
        seed_file="prob",
    ),
    Score(
        "mean_loss",
        r"$\bar{\ell}(x_i)$",
        "mean loss of both models",
        source="pair",
        folder="sam_sgd",
        cost="SGD run + SAM run",
        paper="baseline",
        compute=mean_loss,
        reads=("loss_sgd", "loss_sam"),
    ),
)

STORED = {score.name: score for score in SCORES if score.seed_file}
FIELDS = ("loss_sgd", "loss_sam", *STORED, "correct_sgd", "correct_sam")
"""What is computed of each example: both models' losses, the scores with a file of their own, and correctness."""


def score_batch(logits_sgd: Tensor, logits_sam: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Everything that is stored about one batch, so that logits can be thrown away at once.

    Args:
        logits_sgd: ``(b, C)`` of the SGD-trained model.
        logits_sam: ``(b, C)`` of the SAM-trained model.
        labels: ``(b,)`` int64.

    Returns:
        ``FIELDS``, each ``(b,)``: losses and scores in float64, correctness as bool.
    """
    with torch.no_grad():
        found = {
            "logits_sgd": logits_sgd,
            "logits_sam": logits_sam,
            "loss_sgd": cross_entropy(logits_sgd, labels),
            "loss_sam": cross_entropy(logits_sam, labels),
            "correct_sgd": logits_sgd.argmax(dim=1) == labels,
            "correct_sam": logits_sam.argmax(dim=1) == labels,
        }
        for score in STORED.values():
            found[score.name] = score.compute(*(found[name] for name in score.reads))
    return {name: found[name] for name in FIELDS}


def save_seed(
    metrics_folder: str | Path,
    dataset: str,
    model: str,
    seed: int,
    scores: Mapping[str, np.ndarray],
    *,
    epoch: int,
    protocol: str,
    label_hash: str,
    data_hash: str | None = None,
    settings: str = "{}",
) -> list[Path]:
    """Store the SAMIS scores of one seed, un-normalised, as the npz files that averaging reads.

    Args:
        metrics_folder: Where scores are kept.
        dataset: The data set's name in paths.
        model: The model's name.
        seed: The seed of both models.
        scores: ``FIELDS`` but for correctness, each float64 ``(total,)``, NaN where an example was not scored. Each
            score is stored as ``arr_0`` of its own file, beside the losses.
        epoch: The epoch of both models' checkpoints.
        protocol: ``"split"`` (out of sample) or ``"full"`` (premature, in sample).
        label_hash: ``label_hash`` of the whole part's labels.
        data_hash: ``ImageSet.digest``, where it is known.
        settings: What else determines the scores, such as the schedule, as json; averaging refuses to mix them.

    Returns:
        The paths of the files.

    Raises:
        FileError: A score of a scored example is not finite, or nothing was scored; nothing is written then.
    """
    columns = np.stack([scores[name] for name in (*STORED, "loss_sgd", "loss_sam")])
    indices = np.flatnonzero(~np.isnan(columns).all(axis=0))
    if not len(indices) or not np.isfinite(columns[:, indices]).all():
        folder = samis_path(metrics_folder, dataset, model, seed, "loss").parent
        raise FileError(
            f"{folder}: not written, a model gives losses that are not finite; train it with a lower rate"
        )
    facts = {"seed": seed, "epoch": epoch, "protocol": protocol, "label_hash": label_hash}
    if data_hash is not None:
        facts["data_hash"] = data_hash
    return [
        write_npz(
            samis_path(metrics_folder, dataset, model, seed, score.seed_file),
            arr_0=scores[name],
            score=score.seed_file,
            settings=settings,
            loss_sgd=scores["loss_sgd"],
            loss_sam=scores["loss_sam"],
            indices=indices,
            **facts,
        )
        for name, score in STORED.items()
    ]


def read_seed(path: str | Path) -> dict[str, Any]:
    """Read one file of :func:`save_seed`, or one of the papers' code, which has ``arr_0`` alone.

    Returns:
        ``arr_0``, ``loss_sgd``, ``loss_sam`` as float64 ``(total,)``, ``indices`` of the scored examples, the dict
        ``settings``, and as plain values ``seed``, ``epoch``, ``protocol``, ``label_hash``, ``data_hash`` and
        ``score`` (``"loss"`` or ``"prob"``), the last two None if unknown. Of a file of the papers' code: ``arr_0``,
        ``indices``, and None as ``settings``.

    Raises:
        FileError: The file is missing, damaged, incomplete, or a score is not finite.
    """
    content: dict[str, Any] = read_npz(path)
    alone = set(content) == {"arr_0"}

    def array(name: str, **expected: Any) -> np.ndarray:
        return checked_array(path, content, name, remedy=_MAKE_AGAIN, **expected)

    scores = array("arr_0", kinds="f", finite=alone)
    if alone:
        return {"arr_0": scores.astype(np.float64), "indices": np.arange(len(scores)), "settings": None}
    losses = [array(name, kinds="f", length=len(scores), finite=False) for name in ("loss_sgd", "loss_sam")]
    indices = array("indices", kinds="i")
    if indices.min() < 0 or indices.max() >= len(scores):
        raise FileError(f"{path}: its indices do not fit its scores; {_MAKE_AGAIN}")
    if not all(np.isfinite(values[indices]).all() for values in (scores, *losses)):
        raise FileError(f"{path}: has scores that are not finite; {_MAKE_AGAIN}")
    facts = {"seed": "i", "epoch": "i", "protocol": "U", "label_hash": "U", "settings": "U"}
    for name, kind in facts.items():
        if name not in content or content[name].shape or content[name].dtype.kind != kind:
            raise FileError(f"{path}: does not record its {name}; {_MAKE_AGAIN}")
        content[name] = content[name].item()
    for name in ("data_hash", "score"):  # files of older versions lack them
        content[name] = str(content[name]) if name in content else None
    return {**content, "settings": parse_settings(path, content["settings"])}


def load_seed(
    path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, ignore: Sequence[str] = ()
) -> dict[str, Any] | None:
    """What :func:`read_seed` reads, if it was made with these settings, ``labels`` among them (``load_result``)."""

    def read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        content = read_seed(path)
        stored = content["settings"]
        return content, None if stored is None else {**stored, "labels": content["label_hash"]}

    return load_result(path, settings, read, overwrite=overwrite, ignore=ignore)


_MAKE_AGAIN = "make it again with compute_sam_sgd.py"
