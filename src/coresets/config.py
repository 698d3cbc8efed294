"""Settings for coreset selection and pre-training; each one becomes a flag of the same name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from src.cli import SEED, Parser, build, file_name, fraction, number, option, restrict, yes_or_no
from src.coresets.inputs import Method
from src.coresets.registry import METHODS, find_method
from src.errors import ArgumentError
from src.metrics import get_score
from src.metrics.proxy import ScoreConfig, score_folders
from src.optimizers import OPTIMIZERS, SCHEDULES

_CHOSEN = (lambda args: getattr(args, "selection", None) is None, "with --selection, which lists the kept examples")
_COUNT = number(int, 1)


def parse_method(text: str) -> str:
    """Parse the value of ``--coreset_func``; both spellings of a ``min_`` score are accepted.

    ``min_NAME`` of a score that is not built in may be registered, which depends on the folders to search.

    Raises:
        argparse.ArgumentTypeError: No such method exists.
    """
    names = {**{name: name for name in METHODS}, **{f"min_{m.needs.stored}": m.name for m in METHODS.values()}}
    if text not in names and re.fullmatch(r"min_\w+", text, re.ASCII):
        return text  # a registered score; build_selection checks that it exists
    if text not in names:
        close = difflib.get_close_matches(text, names, 1)
        hint = "separate several names by spaces; " if "," in text else f"did you mean {close[0]}? " if close else ""
        raise argparse.ArgumentTypeError(f"unknown method {text!r}; {hint}choose from {', '.join(METHODS)}")
    return names[text]


@dataclass(frozen=True)
class SelectionConfig:
    """Which training examples to keep and how long to train on them.

    Attributes:
        coreset_func: A name in ``METHODS``.
        selection: A file of selected indices, used instead of a method.
        coreset_mode: ``"large"`` (pruning) or ``"few_shot"``: methods that read a stored score keep the highest or
            the lowest scores.
        coreset_fraction: Fraction of examples to keep, in (0, 1].
        shots: Examples to keep per class, instead of a fraction.
        shots_up_to: The same, but a class with fewer examples is kept in full.
        per_class: Whether to select within each class.
        coreset_epochs: Epochs over the selected examples.
        scores_folder: Folders to search for stored scores; see ``score_folders``.
        options: An instance of the method's options dataclass; its defaults if None.

    Raises:
        ArgumentError: ``shots`` or ``shots_up_to`` is set for a method that selects again in each epoch, or
            ``options`` have another mode.
    """

    coreset_func: str | None = option(
        None,
        f"selection method: {', '.join(METHODS)}, or min_NAME for a registered score",
        parse_method,
        metavar="NAME",
        title="method",
        exclusive="method",
    )
    selection: Path | None = option(
        None,
        "train on the indices and weights in this npz file (default: none)",
        Path,
        metavar="FILE",
        title="method",
        exclusive="method",
    )
    coreset_mode: str = option(
        "large",
        "pruning (large) or few-shot summarization (few_shot): methods that read a stored score keep the highest or "
        "the lowest scores; other methods follow their papers in both modes",
        choices=("large", "few_shot"),
        acts=_CHOSEN,
    )
    coreset_fraction: float | None = option(
        0.1, "fraction of examples to keep, in (0, 1]", fraction, metavar="SHARE", exclusive="share", acts=_CHOSEN
    )
    shots: int | None = option(
        None, "examples to keep per class (default: none)", _COUNT, metavar="N", exclusive="share", acts=_CHOSEN
    )
    shots_up_to: int | None = option(
        None,
        "examples to keep per class; classes with fewer are kept in full (default: none)",
        _COUNT,
        metavar="N",
        exclusive="share",
        acts=_CHOSEN,
    )
    per_class: bool = option(
        True, "select within each class", yes_or_no, nargs="?", const=True, metavar="1|0", acts=_CHOSEN
    )
    coreset_epochs: int = option(
        160, "epochs over the selected examples; the schedule spans them", _COUNT, title="downstream training"
    )
    scores_folder: list[str] = field(default_factory=list)
    options: Any = None

    def __post_init__(self) -> None:
        if self.coreset_func is None:
            return
        if self.options is None:
            mode = {"coreset_mode": self.coreset_mode} if "coreset_mode" in self.method.option_names else {}
            object.__setattr__(self, "options", self.method.options(**mode))
        if (mode := getattr(self.options, "coreset_mode", self.coreset_mode)) != self.coreset_mode:
            raise ArgumentError("coreset_mode", f"{self.coreset_mode}: the method's options have {mode}; give one")
        for name in ("shots", "shots_up_to"):
            if self.method.dynamic and getattr(self, name):
                raise ArgumentError(
                    name, f": {self.coreset_func} trains on a fraction of all examples; use --coreset_fraction"
                )

    @property
    def method(self) -> Method:
        """The selection method."""
        return find_method(self.coreset_func)

    @property
    def share(self) -> float | str:
        """The amount kept, as it appears in the name of a run."""
        if self.shots is not None:
            return f"shots_{self.shots}"
        return self.coreset_fraction if self.shots_up_to is None else f"shots_up_to_{self.shots_up_to}"


@dataclass(frozen=True)
class PretrainConfig:
    """How to pre-train the models that selection methods use.

    Attributes:
        coreset_pretrain_epochs: Pre-training epochs.
        coreset_pretrain_lr: Learning rate.
        coreset_pretrain_lr_sched: Learning-rate schedule.
        coreset_pretrain_batch_size: Batch size of pre-training and scoring.
        coreset_networks: Number of models, for methods that average over several.
    """

    coreset_pretrain_epochs: int = option(160, "pre-training epochs", _COUNT, acts=_CHOSEN)
    coreset_pretrain_lr: float = option(
        0.4, "pre-training learning rate", number(float, 0, open_low=True), acts=_CHOSEN
    )
    coreset_pretrain_lr_sched: str = option(
        "const", "pre-training learning-rate schedule", choices=tuple(SCHEDULES), acts=_CHOSEN
    )
    coreset_pretrain_batch_size: int = option(256, "batch size of pre-training and scoring", _COUNT, acts=_CHOSEN)
    coreset_networks: int = option(
        5,
        "independently initialized models for grand and el2n, with seeds seed, seed + 5, seed + 10, ...",
        _COUNT,
        metavar="R",
        acts=_CHOSEN,
    )


@dataclass(frozen=True)
class GridConfig:
    """A grid of runs: methods x fractions x seeds.

    Attributes:
        funcs: Names in ``METHODS``.
        fractions: Fractions of examples to keep.
        shots: Examples to keep per class, instead of fractions.
        shots_up_to: The same, but classes with fewer examples are kept in full.
        seeds: Seeds of selection and training.
        full: Whether to also train on the full training set.
        name: Name of the table and figure.
        table_only: Whether to skip training.
    """

    funcs: list[str] = option([], "selection methods; see train_prune.py", parse_method, nargs="+", metavar="NAME")
    fractions: list[float] = option(
        [],
        "fractions of examples to keep, in (0, 1] (default: none)",
        fraction,
        nargs="+",
        metavar="SHARE",
        exclusive="share",
    )
    shots: list[int] = option(
        [], "examples to keep per class (default: none)", _COUNT, nargs="+", metavar="N", exclusive="share"
    )
    shots_up_to: list[int] = option(
        [],
        "examples to keep per class; classes with fewer are kept in full (default: none)",
        _COUNT,
        nargs="+",
        metavar="N",
        exclusive="share",
    )
    seeds: list[int] = option([1, 2, 3], "seeds of selection and training", SEED, nargs="+", metavar="SEED")
    full: bool = option(False, "also train on the full training set, as the reference")
    name: str = option("comparison", "name of the table and figure", file_name)
    table_only: bool = option(False, "train nothing; make the table and figure from completed runs")

    def __post_init__(self) -> None:
        for name in ("funcs", "fractions", "shots", "shots_up_to", "seeds"):  # drop repeats, keep the order
            object.__setattr__(self, name, list(dict.fromkeys(getattr(self, name))))


def _chosen(args: argparse.Namespace) -> list[Method]:
    """The requested methods; none if a file lists the kept examples."""
    names = getattr(args, "funcs", None) or [args.coreset_func]
    return [find_method(name) for name in names if name is not None]


def add_selection_flags(parser: Parser, *, skip: Collection[str] = (), required: Collection[str] = ()) -> None:
    """Add the flags for selection, for pre-training, and for the options of all methods.

    The SAMIS paper's commands pass ``--coreset_mode``, ``--per_class`` and the pre-training flags with every
    method, so every method accepts them. Any other option is refused unless a chosen method uses it.

    Args:
        parser: The script's parser.
        skip: Fields of ``SelectionConfig`` that are not flags of this script.
        required: Required flags, or names of exclusive groups.
    """
    parser.add(SelectionConfig, "selection", skip=skip, required=required)
    parser.add(PretrainConfig, "selection")
    takers: dict[str, list[str]] = {}
    for method in METHODS.values():
        parser.add(method.options, "selection", skip=takers)  # several methods share an option
        for name in method.option_names:
            takers.setdefault(name, []).append(method.name)
    del takers["coreset_mode"]
    parser.add(ScoreConfig, "scores")
    stored = (
        lambda args: any(method.needs.stored for method in _chosen(args)),
        "without a method that reads a stored score (min_*)",
    )
    restrict(parser, {("--scores_folder",): stored})
    parser.checks.append(_check_optimizer)
    for name, methods in takers.items():
        for rule in (_CHOSEN, (partial(_takes, name), f"without {' or '.join(methods)}")):
            restrict(parser, {(f"--{name}",): rule})


def _check_optimizer(args: argparse.Namespace) -> None:
    """Refuse, before importing torch, an optimizer that needs the mean loss: dynamic pruning rescales the loss."""
    for method in _chosen(args):
        if method.dynamic and OPTIMIZERS[getattr(args, "optimizer", "sgd")].needs_sampling:
            raise ArgumentError(
                "optimizer", f"{args.optimizer}: incompatible with {method.name}, which scales the loss; choose sgd"
            )


def build_selection(args: argparse.Namespace, **values: Any) -> SelectionConfig:
    """Build the selection config from the flags, with its method's options; ``values`` override flags.

    Raises:
        ArgumentError: The method ranks by a score that is neither built in nor registered.
    """
    name = values.get("coreset_func", getattr(args, "coreset_func", None))
    if name is None:
        return build(SelectionConfig, args, **values)
    method = find_method(name)
    if mode := method.needs.stored:
        get_score(mode, score_folders(args.scores_folder, mode, args.metrics_folder))
    return build(SelectionConfig, args, options=build(method.options, args), **values)


def _takes(name: str, args: argparse.Namespace) -> bool:
    """Whether a chosen method has this option."""
    return any(name in method.option_names for method in _chosen(args))
