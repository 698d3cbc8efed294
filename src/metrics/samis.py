"""SAMIS scores: how differently an SGD-trained and a SAM-trained copy of one model see an example.

For logits ``z`` of example i: ``p = softmax(z)`` and ``l = -log p_y``. Logits stay float32 as the model makes them;
softmax and logarithm are taken in float64, so that saturated examples do not tie.
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
from src.models import MODELS
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


_of_pair = partial(Score, source="pair", folder="sam_sgd", cost="SGD run + SAM run")

PAIR_SCORES = (
    _of_pair(
        "samis_loss",
        r"$S_L(x_i)$",
        "SAMIS-L",
        paper="SAMIS",
        compute=samis_loss,
        reads=("loss_sgd", "loss_sam"),
        seed_file="loss",
    ),
    _of_pair(
        "samis_prob",
        r"$S_P(x_i)$",
        "SAMIS-P",
        paper="SAMIS",
        compute=samis_prob,
        reads=("logits_sgd", "logits_sam"),
        seed_file="prob",
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

# Settings that seeds and splits of one kind differ in, or that the scores' own facts say.
_NOT_OF_THE_KIND = (
    *_OF_A_SPLIT, "seed", "optimizer", "dataset", "model", "labels", "images", "decoding", "lr_sched", "subset",
)  # fmt: skip


@dataclass(frozen=True)
class SamisConfig:
    """Which pairs of models are compared, and how.

    Attributes:
        model: The name of the architecture.
        seed: The seed of both models.
        epochs: The epoch of both checkpoints.
        protocol: ``"split"``, ``"full"``, or ``"auto"``: the splits if all twenty checkpoints of one schedule exist,
            else the runs on the full training set.
        lr_sched: The schedule in the runs' names, or None for the only one there is.
        batch_size: How many examples are scored at a time.
        overwrite: Whether scores that were made with different settings are replaced.

    Raises:
        ArgumentError: A value is out of its range.
    """

    model: str
    seed: int = option(1, "seed of both models", SEED)
    epochs: int = option(160, "epoch whose checkpoints are compared", number(int, 1))
    protocol: str = option(
        "auto",
        "split: ten validation splits, out of sample; full: one pair trained on everything, in sample; "
        "auto: split if all its checkpoints exist, else full",
        choices=("auto", "split", "full"),
    )
    lr_sched: str | None = option(
        None, "schedule in the runs' names (default: the only one there is)", choices=tuple(SCHEDULES)
    )
    batch_size: int = option(512, "examples scored at a time", number(int, 1))
    overwrite: bool = option(False, "replace scores that were made with different settings")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Pair:
    """The checkpoints of one pair, the split that both left out (None: they saw everything), their schedule."""

    sgd: Path
    sam: Path
    split: int | None
    lr_sched: str


@dataclass(frozen=True)
class SamisRun:
    """The SAMIS scores of one seed of a data set: its pairs of models, and its files.

    Attributes:
        context: Device, precision and data.
        config: Which models.
        folders: Where checkpoints, splits and scores are.
    """

    context: RunContext
    config: SamisConfig
    folders: Folders

    def experiment(self, optimizer: str, lr_sched: str, split: int | None) -> str:
        """The name of a training run; ``split`` None is the run on the full training set."""
        names = (self.config.model, self.context.entry.name, optimizer, lr_sched)
        return standard_experiment(*names) if split is None else split_experiment(*names, split)

    def schedules(self, split: int | None) -> list[str]:
        """The schedules for which there are runs of either optimizer."""
        if self.config.lr_sched is not None:
            return [self.config.lr_sched]
        folder, patterns = self.folders.models_folder, [self.experiment(optimizer, "*", split) for optimizer in PAIR]
        return sorted({name for p in patterns for name in training.find_schedules(folder, p, self.config.seed)})

    def find_pairs(self) -> tuple[str, list[Pair]]:
        """Find the pairs of models of the protocol.

        Returns:
            The protocol found, and its ten pairs or its one.

        Raises:
            FileError: Checkpoints are missing; the message says which, and the command that makes the first.
            ArgumentError: Several schedules fit.
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
                raise ArgumentError("lr_sched", f": runs of {len(complete)} schedules fit; choose one of {names}")
            if complete:
                return kind, complete[0]
        # Speak of the protocol that lacks the smaller share of its runs.
        kind = min(missing, key=lambda name: (len(missing[name]) / (2 * len(kinds[name])), name))
        optimizer, lr_sched, split = missing[kind][0]
        names = [self.experiment(*run) for run in missing[kind]]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
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
            f"make the first with: {command}"
        )

    def settings(self, protocol: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Everything that determines the scores.

        Raises:
            FileError: A checkpoint is damaged, or the models of one optimizer were not all trained alike.
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

    def load_pair(self, pair: Pair, held_out: np.ndarray | None) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
        """Load both models and check that they are those that were asked for, and belong to the data.

        Args:
            pair: The checkpoints.
            held_out: The original indices of the pair's split; None where it has none.

        Returns:
            The SGD-trained and the SAM-trained model, and the SGD checkpoint's description.

        Raises:
            FileError: A checkpoint is damaged, of other data, of another run or epoch, or the two do not match.
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
                raise FileError(f"{path}: was trained on another subset of {dataset}; give the same --subset")
        if first["normalisation"] != second["normalisation"]:
            raise FileError(
                f"{pair.sam}: was trained with another normalization than {pair.sgd}; train one of them again"
            )
        ignore = (*_MAY_DIFFER, *training.free_epochs(pair.lr_sched))
        if differing := diff_settings(first["settings"], second["settings"], ignore=ignore):
            log.warning("the two models differ in more than the optimizer: %s", ", ".join(differing))
        return sgd, sam, first

    def score(self, pair: Pair) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Score the examples that belong to a pair: those of its split, or all.

        Returns:
            The original indices ``(n,)`` of the examples, and ``FIELDS``, each ``(n,)``.

        Raises:
            FileError: See :meth:`load_pair`; or a model gives losses that are not finite.
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
        sgd, sam, state = self.load_pair(pair, held_out)
        if not len(images):
            return np.empty(0, np.int64), {name: np.empty(0) for name in FIELDS}
        channels_last = MODELS[config.model].channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        models = [model.to(context.device, context.precision.dtype, memory_format=layout) for model in (sgd, sam)]
        batches = context.batches(
            images, config.batch_size, normalization=state["normalisation"], channels_last=channels_last
        )
        indices, fields = score_pair(*models, batches, precision=context.compute.precision)
        for optimizer, path in (("sgd", pair.sgd), ("sam", pair.sam)):
            if not np.isfinite(fields[f"loss_{optimizer}"]).all():
                raise FileError(
                    f"{path}: gives losses that are not finite; train it again with a lower --learning_rate"
                )
        return indices, fields

    def check_files(self, settings: Mapping[str, Any]) -> None:
        """Refuse to replace scores that were made with different settings, unless ``config.overwrite``.

        Raises:
            FileError: There are such scores.
        """
        wanted = {**settings, "labels": self.context.label_hash}
        for score in STORED.values():
            load_seed(self.path(score), wanted, overwrite=self.config.overwrite)

    def path(self, score: Score) -> Path:
        """The seed's file of a score."""
        config, name = self.config, self.context.entry.name
        return samis_path(self.folders.metrics_folder, name, config.model, config.seed, score.seed_file)

    def scored_seeds(self, settings: Mapping[str, Any]) -> list[int]:
        """The seeds that are scored with these settings."""
        loss = self.path(STORED["samis_loss"])
        files = {folder.name: folder / loss.name for folder in loss.parents[1].iterdir()}
        return sorted(
            int(seed)
            for seed, path in files.items()
            if seed.isdigit() and load_seed(path, settings, overwrite=True, ignore=("seed", "labels"))
        )


def training_settings(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How the models of all pairs were trained, but for what differs from seed to seed and split to split.

    Returns:
        The SAM-trained models' settings as ``training_{name}``, and as ``training_sgd_{name}`` those of the
        SGD-trained models that are others, where the optimizers do not ask for it.

    Raises:
        FileError: A checkpoint is damaged, or the models of one optimizer were not all trained alike.
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
    """The settings of the models of one optimizer, which must be the same but for what makes a split."""
    every = [(getattr(pair, optimizer), _settings(getattr(pair, optimizer))) for pair in pairs]
    remedy = "train all splits of an optimizer with the same settings"
    check_consistent(every, (*_OF_A_SPLIT, *free), what="was not trained as", remedy=remedy)
    return every[0][1]


def _settings(path: Path) -> dict[str, Any]:
    settings = read_checkpoint(path).get("settings")
    return settings if isinstance(settings, dict) else {}  # load_pair says what is wrong


def score_pair(
    sgd: nn.Module, sam: nn.Module, batches: Batches, *, precision: str = "fp32"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score every example of a set with one pair, both models on the same batch, keeping no logits.

    Args:
        sgd: The SGD-trained model.
        sam: The SAM-trained model.
        batches: Un-augmented batches on the models' device.
        precision: A name of ``PRECISIONS``.

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

_MAKE_AGAIN = "make it again with compute_sam_sgd.py"


def save_seed(
    metrics_folder: str | Path,
    scores: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    label_hash: str,
    data_hash: str | None = None,
) -> list[Path]:
    """Store the SAMIS scores of one seed, not normalized, as the npz files that averaging reads.

    Args:
        metrics_folder: Where scores are kept.
        scores: ``FIELDS`` but for correctness, each float64 ``(total,)``, NaN where an example was not scored. Each
            score is stored as ``arr_0`` of its own file, beside the losses.
        settings: Everything that determines the scores, see :meth:`SamisRun.settings`; averaging refuses to mix them.
        label_hash: ``artifacts.label_hash`` of the labels of the full training set.
        data_hash: ``ImageSet.digest``, where it is known.

    Returns:
        The paths of the files.

    Raises:
        FileError: A score of a scored example is not finite, or nothing was scored; nothing is written then.
    """
    run = (settings["dataset"], settings["model"], settings["seed"])
    paths = {name: samis_path(metrics_folder, *run, score.seed_file) for name, score in STORED.items()}
    columns = np.stack([scores[name] for name in (*STORED, "loss_sgd", "loss_sam")])
    indices = np.flatnonzero(~np.isnan(columns).all(axis=0))
    if not len(indices) or not np.isfinite(columns[:, indices]).all():
        raise FileError(
            f"{paths['samis_loss'].parent}: not written, a model gives losses that are not finite; "
            "train it with a lower rate"
        )
    known = {} if data_hash is None else {"data_hash": data_hash}
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
