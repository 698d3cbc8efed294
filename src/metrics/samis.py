"""SAMIS scores: how much an SGD-trained and a SAM-trained model of one architecture disagree about an example.

For logits ``z`` of example i, ``p = softmax(z)`` and ``l = -log p_y``. The model computes logits in float32. Softmax
and logarithm are computed in float64, which avoids ties among saturated examples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from src import training
from src.artifacts.io import label_hash, read_checkpoint, read_npz, write_npz
from src.artifacts.paths import Folders, samis_path, split_experiment, standard_experiment
from src.artifacts.store import (
    acting_settings,
    check_consistent,
    checked_array,
    diff_settings,
    load_result,
    parse_settings,
    setting_value,
)
from src.cli import SEED, check_options, number, option
from src.datasets import validation_indices
from src.errors import ArgumentError, FileError
from src.lazy import torch
from src.metrics.score import Score
from src.models import model_entry
from src.optimizers import SCHEDULES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.context import RunContext
    from src.datasets import Batches

log = logging.getLogger(__name__)


def precise_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
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
        ``(b,)``, with the dtype of the losses.
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
    """The mean loss of both models, a baseline for the SAMIS scores."""
    return (loss_sgd + loss_sam) / 2


_of_pair = partial(Score, source="pair", folder="sam_sgd", cost="SGD run + SAM run", passes=2 / 3)

PAIR_SCORES = (
    _of_pair(
        "samis_loss",
        r"$S_L(x_i)$",
        "SAMIS-L",
        paper="SAMIS",
        compute=samis_loss,
        reads=("loss_sgd", "loss_sam"),
        seed_file="loss",
        assumes_learned=True,
    ),
    _of_pair(
        "samis_prob",
        r"$S_P(x_i)$",
        "SAMIS-P",
        paper="SAMIS",
        compute=samis_prob,
        reads=("logits_sgd", "logits_sam"),
        seed_file="prob",
        assumes_learned=True,
    ),
    _of_pair(
        "mean_loss",
        r"$\bar{\ell}(x_i)$",
        "mean loss of both models",
        paper="baseline",
        compute=mean_loss,
        reads=("loss_sgd", "loss_sam"),
    ),
)

STORED = {score.name: score for score in PAIR_SCORES if score.seed_file}
FIELDS = ("loss_sgd", "loss_sam", *STORED, "correct_sgd", "correct_sam")
"""The values computed for each example: both models' losses, the scores with their own files, and correctness."""


def score_batch(logits_sgd: Tensor, logits_sam: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute every stored value for one batch, so that its logits can be discarded.

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
            "loss_sgd": precise_cross_entropy(logits_sgd, labels),
            "loss_sam": precise_cross_entropy(logits_sam, labels),
            "correct_sgd": logits_sgd.argmax(dim=1) == labels,
            "correct_sam": logits_sam.argmax(dim=1) == labels,
        }
        for score in STORED.values():
            found[score.name] = score.compute(*(found[name] for name in score.reads))
    return {name: found[name] for name in FIELDS}


# ------------------------------------------------------------------------------------------------ pairs of models

SPLITS = tuple(range(1, 11))
PAIR = ("sgd", "sam")
_MAY_DIFFER = ("optimizer", "rho", "adaptive", "measure_proxies")
_OF_A_SPLIT = ("validation_split", "held_out", "examples", "measure_proxies")

# Settings that differ between seeds or splits, or that the scores record elsewhere.
_NOT_OF_THE_KIND = (
    *_OF_A_SPLIT, "seed", "optimizer", "dataset", "model", "labels", "images", "decoding", "lr_sched", "subset",
)  # fmt: skip


@dataclass(frozen=True)
class SamisConfig:
    """Which pairs of models to compare, and how.

    Attributes:
        model: The name of the architecture.
        seed: The seed of both models.
        epochs: The epoch of both checkpoints.
        protocol: ``"split"``, ``"full"``, or ``"auto"``. ``"auto"`` uses the splits if all twenty checkpoints of one
            schedule exist, otherwise the runs on the full training set.
        lr_sched: The learning rate schedule in the runs' names; None if only one exists.
        batch_size: Number of examples per batch.
        overwrite: Whether to replace scores that were made with different settings.

    Raises:
        ArgumentError: A value is out of range.
    """

    model: str
    seed: int = option(1, "seed of both models", SEED)
    epochs: int = option(160, "epoch of the checkpoints to compare", number(int, 1))
    protocol: str = option(
        "auto",
        "split: ten validation splits, scored out of sample; full: one pair trained on the full training set, scored "
        "in sample; auto: split if all its checkpoints exist, otherwise full",
        choices=("auto", "split", "full"),
    )
    lr_sched: str | None = option(
        None, "learning rate schedule in the runs' names (default: the only one found)", choices=tuple(SCHEDULES)
    )
    batch_size: int = option(512, "examples per batch", number(int, 1))
    overwrite: bool = option(False, "replace scores that were made with different settings")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Pair:
    """The checkpoints of one pair, their held-out split (None if trained on everything), and their schedule."""

    sgd: Path
    sam: Path
    split: int | None
    lr_sched: str


@dataclass(frozen=True)
class SamisRun:
    """The SAMIS scores of one seed: the pairs of models and the score files.

    Attributes:
        context: Device, precision, and data.
        config: Which models to compare.
        folders: The folders of checkpoints, splits, and scores.
    """

    context: RunContext
    config: SamisConfig
    folders: Folders

    def experiment(self, optimizer: str, lr_sched: str, split: int | None) -> str:
        """The name of a training run; ``split`` is None for the run on the full training set."""
        names = (self.config.model, self.context.entry.name, optimizer, lr_sched)
        return standard_experiment(*names) if split is None else split_experiment(*names, split)

    def schedules(self, split: int | None) -> list[str]:
        """The learning rate schedules for which a run with either optimizer exists."""
        if self.config.lr_sched is not None:
            return [self.config.lr_sched]
        folder, patterns = self.folders.models_folder, [self.experiment(optimizer, "*", split) for optimizer in PAIR]
        return sorted({name for p in patterns for name in training.find_schedules(folder, p, self.config.seed)})

    def find_pairs(self) -> tuple[str, list[Pair]]:
        """Find the pairs of models that the protocol compares.

        Returns:
            The protocol, and its ten pairs (split) or single pair (full).

        Raises:
            FileError: Checkpoints are missing; the message lists them and gives the command that creates the first.
            ArgumentError: Runs with several schedules match.
        """
        config, folder = self.config, self.folders.models_folder
        kinds = {"split": SPLITS, "full": (None,)}
        missing: dict[str, list[tuple[str, str, int | None]]] = {}
        for kind in ("split", "full") if config.protocol == "auto" else (config.protocol,):
            complete = []
            for lr_sched in self.schedules(kinds[kind][0]) or [config.lr_sched or "*"]:
                paths = {
                    (optimizer, split): training.find_checkpoint(
                        folder, self.experiment(optimizer, lr_sched, split), config.seed, config.epochs
                    )
                    for split in kinds[kind]
                    for optimizer in PAIR
                }
                absent = [(optimizer, lr_sched, split) for (optimizer, split), path in paths.items() if path is None]
                if not absent:
                    complete.append([Pair(paths["sgd", s], paths["sam", s], s, lr_sched) for s in kinds[kind]])
                elif kind not in missing or len(absent) < len(missing[kind]):
                    missing[kind] = absent
            if len(complete) > 1:
                names = ", ".join(pairs[0].lr_sched for pairs in complete)
                raise ArgumentError("lr_sched", f": runs with {len(complete)} schedules match; choose from {names}")
            if complete:
                return kind, complete[0]
        # Report the protocol that is closest to complete.
        kind = min(missing, key=lambda name: (len(missing[name]) / (2 * len(kinds[name])), name))
        optimizer, lr_sched, split = missing[kind][0]
        runs = [self.experiment(*run) for run in missing[kind]]
        shown = ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")
        flags = {
            "dataset": self.context.data.dataset,
            "model": config.model,
            "optimizer": optimizer,
            "seed": config.seed,
            "epochs": config.epochs,
            "lr_sched": lr_sched if lr_sched != "*" else "const" if split is None else "step",
            **({} if split is None else {"samis_validation_split_index": split}),
        }
        command = training.training_command("train_full.py" if split is None else "train_split.py", flags)
        raise FileError(
            f"{folder}: no checkpoint of epoch {config.epochs}, seed {config.seed} for {shown} (protocol {kind}); "
            f"create the first with: {command}"
        )

    def settings(self, protocol: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        """All settings that determine the scores.

        Raises:
            FileError: A checkpoint is damaged, or models with the same optimizer have different training settings.
        """
        config, context = self.config, self.context
        return {
            "dataset": context.entry.name,
            "model": config.model,
            "seed": config.seed,
            "epoch": config.epochs,
            "protocol": protocol,
            "precision": context.compute.precision,
            "subset": context.data_settings["subset"],
            **training.image_facts(context.full_train),
            **training_settings(pairs),
        }

    def load_pair(
        self, pair: Pair, held_out: np.ndarray | None
    ) -> tuple[nn.Module, nn.Module, dict[str, Any], float | None]:
        """Load both models and check that they are the requested ones and match the data.

        Args:
            pair: The checkpoints.
            held_out: The original indices of the pair's held-out split; None without a split.

        Returns:
            The SGD-trained model, the SAM-trained model, the state of the SGD checkpoint, and the cost of training
            both in epoch-equivalents (None if an older version trained them).

        Raises:
            FileError: A checkpoint is damaged or belongs to other data, another run, or another epoch, or the two
                checkpoints do not match.
        """
        asked = {
            **training.data_facts(self.context.full_train),
            "model": self.config.model,
            "seed": self.config.seed,
            "epoch": self.config.epochs,
            "lr_sched": pair.lr_sched,
            "validation_split": pair.split,
            "held_out": None if held_out is None else label_hash(held_out),
        }
        loaded = [training.load_model(getattr(pair, name), {**asked, "optimizer": name}) for name in PAIR]
        (sgd, first), (sam, second) = loaded
        for path, state in ((pair.sgd, first), (pair.sam, second)):
            if state["settings"].get("subset") != self.context.data_settings["subset"]:
                dataset = self.context.entry.name
                raise FileError(
                    f"{path}: was trained on a different subset of {dataset}; give the same --subset and --exclude"
                )
        if first["normalisation"] != second["normalisation"]:
            raise FileError(
                f"{pair.sam}: was trained with a different normalization than {pair.sgd}; train one of them again"
            )
        ignore = (*_MAY_DIFFER, *training.free_epochs(pair.lr_sched))
        if differing := diff_settings(first["settings"], second["settings"], ignore=ignore):
            log.warning("the two models differ in settings besides the optimizer: %s", ", ".join(differing))
        costs = [state.get("cost") for state in (first, second)]
        return sgd, sam, first, None if None in costs else sum(costs)

    def score(self, pair: Pair) -> tuple[np.ndarray, dict[str, np.ndarray], float | None]:
        """Score the examples of a pair: its held-out split, or the full training set.

        Returns:
            The original indices ``(n,)`` of the examples; ``FIELDS``, each ``(n,)``; and the cost of training both
            models and scoring the examples, in epoch-equivalents, or None if unknown.

        Raises:
            FileError: A checkpoint is refused (see :meth:`load_pair`), or a model's losses are not finite.
        """
        context, config = self.context, self.config
        images, held_out = context.train, None
        if pair.split is not None:
            held_out = validation_indices(
                self.folders.splits,
                context.entry.name,
                config.seed,
                pair.split,
                context.labels,
                context.entry.num_classes,
            )
            members = np.isin(images.indices.cpu().numpy(), held_out)
            images = images.subset(torch.from_numpy(np.flatnonzero(members)))
        sgd, sam, state, cost = self.load_pair(pair, held_out)
        if cost is not None:
            cost += STORED["samis_loss"].passes * len(images) / images.total
        if not len(images):
            return np.empty(0, np.int64), {name: np.empty(0) for name in FIELDS}, cost
        channels_last = model_entry(config.model).channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        models = [model.to(context.device, context.precision.dtype, memory_format=layout) for model in (sgd, sam)]
        batches = context.batches(
            images, config.batch_size, normalization=state["normalisation"], channels_last=channels_last
        )
        indices, fields = score_pair(*models, batches, precision=context.compute.precision)
        for optimizer, path in (("sgd", pair.sgd), ("sam", pair.sam)):
            if not np.isfinite(fields[f"loss_{optimizer}"]).all():
                raise FileError(f"{path}: its losses are not finite; train it again with a lower --learning_rate")
        return indices, fields, cost

    def check_files(self, settings: Mapping[str, Any]) -> None:
        """Refuse to replace scores that were made with different settings, unless ``config.overwrite`` is set.

        Raises:
            FileError: Such scores exist.
        """
        wanted = {**settings, "labels": self.context.label_hash}
        for score in STORED.values():
            load_seed(self.path(score), wanted, overwrite=self.config.overwrite)

    def path(self, score: Score) -> Path:
        """The path of the seed's file for a score."""
        config, name = self.config, self.context.entry.name
        return samis_path(self.folders.metrics_folder, name, config.model, config.seed, score.seed_file)

    def scored_seeds(self, settings: Mapping[str, Any]) -> list[int]:
        """The seeds that were scored with these settings."""
        loss = self.path(STORED["samis_loss"])
        files = {folder.name: folder / loss.name for folder in loss.parents[1].iterdir()}
        return sorted(
            int(seed)
            for seed, path in files.items()
            if seed.isdigit() and load_seed(path, settings, overwrite=True, ignore=("seed", "labels"))
        )


def training_settings(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The training settings of all pairs, without those that differ between seeds and splits.

    Returns:
        The settings of the SAM-trained models as ``training_{name}``. The settings of the SGD-trained models that
        differ, although the choice of optimizer does not require it, as ``training_sgd_{name}``.

    Raises:
        FileError: A checkpoint is damaged, or models with the same optimizer have different training settings.
    """
    free = training.free_epochs(pairs[0].lr_sched)
    sgd, sam = (_common_settings(pairs, optimizer, free) for optimizer in PAIR)
    names = sorted((sgd.keys() | sam.keys()) - {*_NOT_OF_THE_KIND, *free})
    record = {f"training_{name}": sam[name] for name in names if name in sam}
    for name in names:
        here = setting_value(sgd, name)
        if name not in _MAY_DIFFER and diff_settings({name: here}, {name: setting_value(sam, name)}):
            record[f"training_sgd_{name}"] = "none" if here is None else here
    return acting_settings({**record, "lr_sched": pairs[0].lr_sched})


def _common_settings(pairs: Sequence[Pair], optimizer: str, free: Sequence[str]) -> dict[str, Any]:
    """The training settings shared by all models with one optimizer; they may differ only in the split."""
    every = [(getattr(pair, optimizer), _settings(getattr(pair, optimizer))) for pair in pairs]
    remedy = "train all splits of an optimizer with the same settings"
    check_consistent(every, (*_OF_A_SPLIT, *free), what="was trained differently from", remedy=remedy)
    return every[0][1]


def _settings(path: Path) -> dict[str, Any]:
    settings = read_checkpoint(path).get("settings")
    return settings if isinstance(settings, dict) else {}  # load_pair reports the error


def score_pair(
    sgd: nn.Module, sam: nn.Module, batches: Batches, *, precision: str = "fp32"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score every example with one pair of models, both on the same batch. Logits are not kept.

    Args:
        sgd: The SGD-trained model.
        sam: The SAM-trained model.
        batches: Batches without augmentation, on the models' device.
        precision: A key of ``PRECISIONS``.

    Returns:
        The original indices ``(n,)`` of the scored examples, and ``FIELDS``, each ``(n,)``.
    """
    from src.models.base import eval_mode

    indices, parts = [], []
    with eval_mode(sgd), eval_mode(sam):
        for batch in batches:
            logits_sgd, logits_sam = (training.logits_of(model, batch.images, precision) for model in (sgd, sam))
            indices.append(batch.indices)
            parts.append(score_batch(logits_sgd, logits_sam, batch.labels))
    fields = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in FIELDS}
    return torch.cat(indices).cpu().numpy(), fields


# ------------------------------------------------------------------------------------------------ files of one seed

_MAKE_AGAIN = "recreate it with compute_sam_sgd.py"


def save_seed(
    metrics_folder: str | Path,
    scores: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    label_hash: str,
    data_hash: str | None = None,
    cost: float | None = None,
) -> list[Path]:
    """Save the unnormalized SAMIS scores of one seed as the npz files that averaging reads.

    Args:
        metrics_folder: The folder of scores.
        scores: ``FIELDS``, each float64 ``(total,)``, NaN for examples that were not scored. Each score is stored as
            ``arr_0`` in its own file, together with the losses and, in sample, the accuracy of the SGD-trained model.
        settings: All settings that determine the scores, see :meth:`SamisRun.settings`. Scores with different
            settings are not averaged.
        label_hash: ``artifacts.label_hash`` of the labels of the full training set.
        data_hash: ``ImageSet.digest``, if known.
        cost: The cost of all models and of scoring, in epoch-equivalents, if known.

    Returns:
        The paths of the files.

    Raises:
        FileError: A score is not finite, or no example was scored. Nothing is written in either case.
    """
    run = (settings["dataset"], settings["model"], settings["seed"])
    paths = {name: samis_path(metrics_folder, *run, score.seed_file) for name, score in STORED.items()}
    columns = np.stack([scores[name] for name in (*STORED, "loss_sgd", "loss_sam")])
    indices = np.flatnonzero(~np.isnan(columns).all(axis=0))
    if not len(indices) or not np.isfinite(columns[:, indices]).all():
        raise FileError(
            f"{paths['samis_loss'].parent}: not written, because a model's losses are not finite; "
            "train it with a lower --learning_rate"
        )
    accuracy = scores["correct_sgd"][indices].mean() if settings["protocol"] == "full" else None
    known = {"data_hash": data_hash, "cost": cost, "training_accuracy": accuracy}
    known = {name: value for name, value in known.items() if value is not None}
    return [
        write_npz(
            path,
            arr_0=scores[name],
            score=STORED[name].seed_file,
            settings=json.dumps(settings, sort_keys=True),
            loss_sgd=scores["loss_sgd"],
            loss_sam=scores["loss_sam"],
            indices=indices,
            seed=settings["seed"],
            epoch=settings["epoch"],
            protocol=settings["protocol"],
            label_hash=label_hash,
            **known,
        )
        for name, path in paths.items()
    ]


def read_seed(path: str | Path) -> dict[str, Any]:
    """Read a file written by :func:`save_seed`, or by the papers' code, which stores only ``arr_0``.

    Returns:
        ``arr_0``, ``loss_sgd``, and ``loss_sam`` as float64 ``(total,)``; the ``indices`` of the scored examples; the
        dict ``settings``; and the plain values ``seed``, ``epoch``, ``protocol``, ``label_hash``, ``data_hash``,
        ``score`` (``"loss"`` or ``"prob"``), ``cost``, and ``training_accuracy``, the last four None if unknown. For
        a file of the papers' code, only ``arr_0``, ``indices``, and ``settings``, which is None.

    Raises:
        FileError: The file is missing, damaged, or incomplete, or a score is not finite.
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
        raise FileError(f"{path}: its indices are out of range; {_MAKE_AGAIN}")
    if not all(np.isfinite(values[indices]).all() for values in (scores, *losses)):
        raise FileError(f"{path}: has scores that are not finite; {_MAKE_AGAIN}")
    facts = {"seed": "i", "epoch": "i", "protocol": "U", "label_hash": "U", "settings": "U"}
    for name, kind in facts.items():
        if name not in content or content[name].shape or content[name].dtype.kind != kind:
            raise FileError(f"{path}: does not record its {name}; {_MAKE_AGAIN}")
        content[name] = content[name].item()
    for name in ("data_hash", "score"):  # files of older versions lack them
        content[name] = str(content[name]) if name in content else None
    for name in ("cost", "training_accuracy"):
        if (value := content.setdefault(name, None)) is not None:
            if value.shape or value.dtype.kind != "f" or not value >= 0:
                raise FileError(f"{path}: its {name} is not a number; {_MAKE_AGAIN}")
            content[name] = float(value)
    return {**content, "settings": parse_settings(path, content["settings"])}


def load_seed(
    path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False, ignore: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Read a file with :func:`read_seed` if its settings, including ``labels``, match (see ``load_result``)."""

    def read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        content = read_seed(path)
        stored = content["settings"]
        return content, None if stored is None else {**stored, "labels": content["label_hash"]}

    return load_result(path, settings, read, overwrite=overwrite, ignore=ignore)
