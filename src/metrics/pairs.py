"""Pairs of trained networks, one by SGD and one by SAM: finding them on disk, and scoring examples with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src.artifacts.io import label_hash, read_checkpoint
from src.artifacts.paths import split_experiment, standard_experiment
from src.artifacts.store import acting_settings, check_consistent, diff_settings, setting_value
from src.datasets import Batches, ImageSet
from src.errors import ArgumentError, FileError
from src.metrics.samis import FIELDS, score_batch
from src.models.base import eval_mode
from src.training import (
    data_facts,
    find_checkpoint,
    find_schedules,
    free_epochs,
    load_model,
    logits_of,
    training_command,
)

SPLITS = tuple(range(1, 11))
OPTIMIZERS = ("sgd", "sam")
_MAY_DIFFER = ("optimizer", "rho", "adaptive", "measure_proxies")
_OF_A_SPLIT = ("validation_split", "held_out", "examples", "measure_proxies")

# Settings that seeds and splits of one kind differ in, or that the scores' own facts say.
_NOT_OF_THE_KIND = (
    *_OF_A_SPLIT, "seed", "optimizer", "dataset", "model", "labels", "images", "decoding", "lr_sched", "subset",
)  # fmt: skip


@dataclass(frozen=True)
class Query:
    """Which networks are asked for.

    Attributes:
        models_folder: Where checkpoints are kept.
        model: The architecture.
        dataset: The data set's name in paths.
        seed: The seed of both networks.
        epoch: The epoch of both checkpoints.
        lr_sched: The schedule in the runs' names, or None for the only one there is.
        dataset_flag: What ``--dataset`` was given, for messages.
    """

    models_folder: Path
    model: str
    dataset: str
    seed: int
    epoch: int
    lr_sched: str | None
    dataset_flag: str

    def experiment(self, optimizer: str, lr_sched: str, split: int | None) -> str:
        """The name of a run; ``split`` None is the run on the whole training part."""
        if split is None:
            return standard_experiment(self.model, self.dataset, optimizer, lr_sched)
        return split_experiment(self.model, self.dataset, optimizer, lr_sched, split)

    def checkpoint(self, optimizer: str, lr_sched: str, split: int | None) -> Path | None:
        """The run's checkpoint of the epoch: its own file, or ``last.pt`` if that is of the epoch."""
        experiment = self.experiment(optimizer, lr_sched, split)
        return find_checkpoint(self.models_folder, experiment, self.seed, self.epoch)

    def schedules(self, split: int | None) -> list[str]:
        """The schedules for which there are runs of either optimiser."""
        if self.lr_sched is not None:
            return [self.lr_sched]
        patterns = [self.experiment(optimizer, "*", split) for optimizer in OPTIMIZERS]
        return sorted({name for p in patterns for name in find_schedules(self.models_folder, p, self.seed)})


@dataclass(frozen=True)
class Pair:
    """The checkpoints of one pair, the split that both left out (None: they saw everything), their schedule."""

    sgd: Path
    sam: Path
    split: int | None
    lr_sched: str


def find_pairs(query: Query, protocol: str) -> tuple[str, list[Pair]]:
    """Find the pairs of networks of a protocol.

    Args:
        query: Which networks.
        protocol: ``"split"``, ``"full"``, or ``"auto"``: the splits if all twenty checkpoints of one schedule exist,
            else the runs on the whole training part.

    Returns:
        The protocol found, and its ten pairs or its one.

    Raises:
        FileError: Checkpoints are missing; the message says which, and the command that makes the first.
        ArgumentError: Several schedules fit.
    """
    kinds = {"split": SPLITS, "full": (None,)}
    wanted = ("split", "full") if protocol == "auto" else (protocol,)
    missing: dict[str, list[tuple[str, str, int | None]]] = {}
    for kind in wanted:
        complete = []
        for lr_sched in query.schedules(kinds[kind][0]) or [query.lr_sched or "*"]:
            paths = {(o, s): query.checkpoint(o, lr_sched, s) for s in kinds[kind] for o in OPTIMIZERS}
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
    raise FileError(_what_is_missing(query, kind, missing[kind]))


def _what_is_missing(query: Query, kind: str, absent: list[tuple[str, str, int | None]]) -> str:
    """One line: the missing runs and the command that makes the first."""
    optimizer, lr_sched, split = absent[0]
    names = [query.experiment(o, sched, s) for o, sched, s in absent]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    script = "train_full.py" if split is None else "train_split.py"
    command = training_command(
        script,
        {
            "dataset": query.dataset_flag,
            "model": query.model,
            "optimizer": optimizer,
            "seed": query.seed,
            "epochs": query.epoch,
            "lr_sched": lr_sched if lr_sched != "*" else "const" if split is None else "step",
            **({} if split is None else {"samis_validation_split_index": split}),
        },
    )
    return (
        f"{query.models_folder}: no checkpoint of epoch {query.epoch}, seed {query.seed} for {shown} "
        f"(protocol {kind}); make the first with: {command}"
    )


def training_settings(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How the models of all pairs were trained, but for what differs from seed to seed and split to split.

    Returns:
        The SAM-trained models' settings as ``training_{name}``, and as ``training_sgd_{name}`` those of the
        SGD-trained models that are others, where the optimizers do not ask for it.

    Raises:
        FileError: A checkpoint is damaged, or the models of one optimizer were not all trained alike.
    """
    free = free_epochs(pairs[0].lr_sched)
    sgd, sam = (_common_settings(pairs, optimizer, free) for optimizer in OPTIMIZERS)
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


def load_pair(
    pair: Pair, query: Query, whole: ImageSet, held_out: np.ndarray | None, subset: str | None = None
) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Load both models and check that they are those that were asked for, and belong to the data.

    Args:
        pair: The checkpoints.
        query: What was asked for.
        whole: The whole training part.
        held_out: The original indices of the pair's split; None where it has none.
        subset: ``label_hash`` of the indices of ``--subset``, on which both must have been trained; None
            for all examples.

    Returns:
        The SGD-trained and the SAM-trained model, and the SGD checkpoint's description, with ``differing``: the
        settings in which the two differ beside the optimizer's own.

    Raises:
        FileError: A checkpoint is damaged, of other data, of another run or epoch, or the two do not match.
    """
    asked = {
        **data_facts(whole),
        "model": query.model,
        "seed": query.seed,
        "epoch": query.epoch,
        "lr_sched": pair.lr_sched,
        "validation_split": pair.split,
        "held_out": None if held_out is None else label_hash(held_out),
    }
    loaded = [load_model(getattr(pair, name), {**asked, "optimizer": name}) for name in OPTIMIZERS]
    (sgd, first), (sam, second) = loaded
    for path, state in ((pair.sgd, first), (pair.sam, second)):
        if state["settings"].get("subset") != subset:
            raise FileError(f"{path}: was trained on another subset of {query.dataset}; give the same --subset")
    if first["normalisation"] != second["normalisation"]:
        raise FileError(
            f"{pair.sam}: was trained with another normalization than {pair.sgd}; train one of them again"
        )
    ignore = (*_MAY_DIFFER, *free_epochs(pair.lr_sched))
    return sgd, sam, {**first, "differing": diff_settings(first["settings"], second["settings"], ignore=ignore)}


def score_pair(
    sgd: nn.Module, sam: nn.Module, batches: Batches, *, precision: str = "fp32"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score every example of a set with one pair, both networks on the same batch, keeping no logits.

    Args:
        sgd: The SGD-trained network.
        sam: The SAM-trained network.
        batches: Un-augmented batches on the networks' device.
        precision: A name of ``PRECISIONS``.

    Returns:
        The original indices ``(n,)`` of the scored examples, and ``samis.FIELDS``, each ``(n,)``.
    """
    indices, parts = [], []
    with eval_mode(sgd), eval_mode(sam):
        for batch in batches:
            logits_sgd, logits_sam = (logits_of(network, batch.images, precision) for network in (sgd, sam))
            indices.append(batch.indices)
            parts.append(score_batch(logits_sgd, logits_sam, batch.labels))
    fields = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in FIELDS}
    return torch.cat(indices).cpu().numpy(), fields
