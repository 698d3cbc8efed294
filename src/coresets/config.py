"""How training examples are chosen, and the models pre-trained for it: each setting is a flag of its name."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from src.cli import SEED, Parser, build, file_name, fraction, number, option, restrict, yes_or_no
from src.coresets.inputs import Method
from src.coresets.registry import METHODS, find_method
from src.errors import ArgumentError
from src.metrics.proxy import ScoreConfig
from src.optimizers import OPTIMIZERS, SCHEDULES

_CHOSEN = (lambda args: getattr(args, "selection", None) is None, "with --selection, which lists what is kept")
_COUNT = number(int, 1)


def parse_method(text: str) -> str:
    """The value of ``--coreset_func``; ``min_`` before a stored score's name is understood in both spellings.

    Raises:
        argparse.ArgumentTypeError: There is no such method.
    """
    names = {**{name: name for name in METHODS}, **{f"min_{m.needs.stored}": m.name for m in METHODS.values()}}
    if text not in names:
        close = difflib.get_close_matches(text, names, 1)
        hint = "several are separated by spaces; " if "," in text else f"did you mean {close[0]}? " if close else ""
        raise argparse.ArgumentTypeError(f"unknown method {text!r}; {hint}choose from {', '.join(METHODS)}")
    return names[text]


@dataclass(frozen=True)
class SelectionConfig:
    """Which training examples are kept, and how long a model trains on them.

    Attributes:
        coreset_func: A name of ``METHODS``.
        selection: A file of chosen indices in place of a method.
        coreset_mode: ``"large"`` (pruning) or ``"few_shot"``: stored scores keep their highest or lowest.
        coreset_fraction: Share to keep, in (0, 1].
        shots: Examples to keep of each class, in place of a share.
        shots_up_to: The same, but all of a smaller class are kept.
        per_class: Whether to choose within each class.
        coreset_epochs: Passes over the chosen examples.
        scores_folder: Where stored scores are searched, see ``score_folders``.
        options: An instance of the method's options; default its defaults.

    Raises:
        ArgumentError: A method that chooses again in each epoch is to keep examples per class.
    """

    coreset_func: str | None = option(
        None,
        f"how to choose: {', '.join(METHODS)}",
        parse_method,
        metavar="NAME",
        title="method",
        exclusive="method",
    )
    selection: Path | None = option(
        None,
        "train on the indices and weights of this npz file (default: none)",
        Path,
        metavar="FILE",
        title="method",
        exclusive="method",
    )
    coreset_mode: str = option(
        "large",
        "pruning or few-shot summarization: stored scores keep their highest (large) or lowest (few_shot); the other "
        "methods keep what their papers keep",
        choices=("large", "few_shot"),
        acts=_CHOSEN,
    )
    coreset_fraction: float | None = option(
        0.1, "share to keep, in (0, 1]", fraction, metavar="SHARE", exclusive="share", acts=_CHOSEN
    )
    shots: int | None = option(
        None, "examples to keep of each class (default: none)", _COUNT, metavar="N", exclusive="share", acts=_CHOSEN
    )
    shots_up_to: int | None = option(
        None,
        "examples to keep of each class, all of a smaller one (default: none)",
        _COUNT,
        metavar="N",
        exclusive="share",
        acts=_CHOSEN,
    )
    per_class: bool = option(
        True, "choose in each class", yes_or_no, nargs="?", const=True, metavar="1|0", acts=_CHOSEN
    )
    coreset_epochs: int = option(
        160, "passes over the chosen examples; the schedule runs over them", _COUNT, title="downstream training"
    )
    scores_folder: list[str] = field(default_factory=list)
    options: Any = None

    def __post_init__(self) -> None:
        if self.coreset_func is None:
            return
        if self.options is None:
            object.__setattr__(self, "options", self.method.options())
        for name in ("shots", "shots_up_to"):
            if self.method.dynamic and getattr(self, name):
                raise ArgumentError(
                    name, f": {self.coreset_func} visits a share of all examples; give a coreset_fraction"
                )

    @property
    def method(self) -> Method:
        """The method."""
        return find_method(self.coreset_func)

    @property
    def share(self) -> float | str:
        """How much is kept, in the name of a run."""
        if self.shots is not None:
            return f"shots_{self.shots}"
        return self.coreset_fraction if self.shots_up_to is None else f"shots_up_to_{self.shots_up_to}"


@dataclass(frozen=True)
class PretrainConfig:
    """The training of the models that selection methods look at.

    Attributes:
        coreset_pretrain_epochs: Its epochs.
        coreset_pretrain_lr: Its learning rate.
        coreset_pretrain_lr_sched: Its schedule.
        coreset_pretrain_batch_size: Its batch size, and that of scoring.
        coreset_networks: How many models methods average over that want several.
    """

    coreset_pretrain_epochs: int = option(160, "epochs of pre-training", _COUNT, acts=_CHOSEN)
    coreset_pretrain_lr: float = option(0.4, "its learning rate", number(float, 0, open_low=True), acts=_CHOSEN)
    coreset_pretrain_lr_sched: str = option("const", "its schedule", choices=tuple(SCHEDULES), acts=_CHOSEN)
    coreset_pretrain_batch_size: int = option(256, "its batch size, and that of scoring", _COUNT, acts=_CHOSEN)
    coreset_networks: int = option(
        5,
        "independently initialized models of grand and el2n, of seeds seed, seed + 5, seed + 10, ...",
        _COUNT,
        metavar="R",
        acts=_CHOSEN,
    )


@dataclass(frozen=True)
class GridConfig:
    """A grid of runs: methods x shares x seeds.

    Attributes:
        funcs: Names of ``METHODS``.
        fractions: Shares to keep.
        shots: Examples to keep of each class, in place of shares.
        shots_up_to: The same, but all of smaller classes are kept.
        seeds: Seeds of selection and training.
        full: Whether to train on everything too.
        name: Name of table and figure.
        table_only: Whether to train nothing.
    """

    funcs: list[str] = option([], "methods, see train_prune.py", parse_method, nargs="+", metavar="NAME")
    fractions: list[float] = option(
        [], "shares to keep, in (0, 1] (default: none)", fraction, nargs="+", metavar="SHARE", exclusive="share"
    )
    shots: list[int] = option(
        [], "examples to keep of each class (default: none)", _COUNT, nargs="+", metavar="N", exclusive="share"
    )
    shots_up_to: list[int] = option(
        [],
        "examples to keep of each class, all of a smaller one (default: none)",
        _COUNT,
        nargs="+",
        metavar="N",
        exclusive="share",
    )
    seeds: list[int] = option([1, 2, 3], "seeds of selection and training", SEED, nargs="+", metavar="SEED")
    full: bool = option(False, "train on everything too, as the reference")
    name: str = option("comparison", "name of table and figure", file_name)
    table_only: bool = option(False, "train nothing: table and figure of what is done")

    def __post_init__(self) -> None:
        for name in ("funcs", "fractions", "shots", "shots_up_to", "seeds"):  # each once, in the order given
            object.__setattr__(self, name, list(dict.fromkeys(getattr(self, name))))


def _chosen(args: argparse.Namespace) -> list[Method]:
    """The methods that were asked for; none where a file lists what is kept."""
    return [METHODS[name] for name in getattr(args, "funcs", None) or [args.coreset_func] if name is not None]


def add_selection_flags(parser: Parser, *, skip: Collection[str] = (), required: Collection[str] = ()) -> None:
    """Add the flags of selection, pre-training and the options of all methods.

    The SAMIS paper's commands give ``--coreset_mode``, ``--per_class`` and the flags of pre-training with every
    method, so every method accepts them. An option is refused where no chosen method takes it.

    Args:
        parser: The script's parser.
        skip: Fields of ``SelectionConfig`` that are no flags of this script.
        required: Flags, or names of exclusive groups, that must be given.
    """
    parser.add(SelectionConfig, "selection", skip=skip, required=required)
    parser.add(PretrainConfig, "selection")
    takers: dict[str, list[str]] = {}
    for method in METHODS.values():
        parser.add(method.options, "selection", skip=takers)  # several take the same one
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
    """Stop, before torch is imported, at an optimizer that needs the mean loss, which dynamic pruning scales."""
    for method in _chosen(args):
        if method.dynamic and OPTIMIZERS[getattr(args, "optimizer", "sgd")].needs_sampling:
            raise ArgumentError(
                "optimizer", f"{args.optimizer}: does not go with {method.name}, which scales the loss; choose sgd"
            )


def build_selection(args: argparse.Namespace, **values: Any) -> SelectionConfig:
    """The selection that the flags ask for, with its method's options; ``values`` take the place of flags."""
    name = values.get("coreset_func", getattr(args, "coreset_func", None))
    options = None if name is None else build(METHODS[name].options, args)
    return build(SelectionConfig, args, options=options, **values)


def _takes(name: str, args: argparse.Namespace) -> bool:
    """Whether a chosen method takes an option."""
    return any(name in method.option_names for method in _chosen(args))
