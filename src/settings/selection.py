"""Flags of the scripts that choose training examples."""

import argparse
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from src.cli import restrict
from src.coresets import METHODS, Method
from src.errors import FlagError
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.settings import values
from src.settings.common import add_score_flags

FRACTION = 0.1  # kept where neither --coreset_fraction nor --shots says otherwise


def add_method_flags(parser: argparse.ArgumentParser, *, file: bool = False) -> None:
    """``--coreset_func`` and, with ``file``, ``--selection`` in its place."""
    group, listing = parser.add_argument_group("method"), f"how to choose: {', '.join(METHODS)}"
    if not file:
        group.add_argument("--coreset_func", type=values.method_name, required=True, metavar="NAME", help=listing)
        return
    either = group.add_mutually_exclusive_group(required=True)
    either.add_argument("--coreset_func", type=values.method_name, metavar="NAME", help=f"{listing} (default: none)")
    either.add_argument(
        "--selection",
        type=Path,
        metavar="FILE",
        help="train on the indices and weights of this npz file (default: none)",
    )


def add_downstream_flags(parser: argparse.ArgumentParser) -> None:
    """``--coreset_epochs``, the length of training on the chosen examples."""
    parser.add_argument_group("downstream training").add_argument(
        "--coreset_epochs",
        type=values.number(int, 1),
        default=160,
        help="passes over the chosen examples; the schedule runs over them",
    )
    parser.checks.append(_check_dynamic)


def _chosen(args: argparse.Namespace) -> list[Method]:
    """The methods that were asked for; none where a file says what is kept."""
    return [METHODS[name] for name in getattr(args, "funcs", None) or [args.coreset_func] if name is not None]


def _check_dynamic(args: argparse.Namespace) -> None:
    """Stop at what a method that chooses in each epoch cannot have."""
    for method in _chosen(args):
        if not method.dynamic:
            continue
        for flag in ("shots", "shots_up_to"):
            if getattr(args, flag, None):
                raise FlagError(f"--{flag}: {method.name} visits a share of all examples; give --coreset_fraction")
        if OPTIMIZERS[args.optimizer].needs_sampling:
            raise FlagError(
                f"--optimizer {args.optimizer}: does not go with {method.name}, which scales the loss; choose sgd"
            )


def add_selection_flags(parser: argparse.ArgumentParser, *, share: bool = True) -> None:
    """How to choose training examples: mode, share, pre-training, options of the methods, folders of stored scores.

    Args:
        parser: The script's parser.
        share: Whether ``--coreset_fraction`` and ``--shots`` say how much to keep; else the script takes several.
    """
    group = parser.add_argument_group("selection")
    add = group.add_argument
    add(
        "--coreset_mode",
        choices=("large", "few_shot"),
        default="large",
        help="pruning or few-shot summarization: stored scores keep their highest (large) or lowest (few_shot); "
        "the other methods keep what their papers keep",
    )
    if share:
        amount = group.add_mutually_exclusive_group()
        amount.add_argument(
            "--coreset_fraction",
            type=values.fraction,
            default=FRACTION,
            metavar="SHARE",
            help="share to keep, in (0, 1]",
        )
        amount.add_argument(
            "--shots", type=values.number(int, 1), metavar="N", help="examples to keep of each class (default: none)"
        )
        amount.add_argument(
            "--shots_up_to",
            type=values.number(int, 1),
            metavar="N",
            help="examples to keep of each class, all of a smaller one (default: none)",
        )
    add(
        "--per_class",
        type=values.yes_or_no,
        nargs="?",
        const=True,
        default=True,
        metavar="1|0",
        help="choose in each class",
    )
    add("--coreset_pretrain_epochs", type=values.number(int, 1), default=160, help="epochs of pre-training")
    add("--coreset_pretrain_lr", type=values.number(float, 0, open_low=True), default=0.4, help="its learning rate")
    add("--coreset_pretrain_lr_sched", choices=tuple(SCHEDULES), default="const", help="its schedule")
    add(
        "--coreset_pretrain_batch_size",
        type=values.number(int, 1),
        default=256,
        help="its batch size, and that of scoring",
    )
    add(
        "--coreset_networks",
        type=values.number(int, 1),
        default=5,
        metavar="R",
        help="independently initialised networks of grand and el2n, of seeds seed, seed + 5, seed + 10, ...",
    )
    plain = SimpleNamespace(**{f.name: f.default for m in METHODS.values() for f in fields(m.options)})
    add("--grand_gradient", choices=("last", "full"), default=plain.grand_gradient, help="grand: gradient of what")
    add(
        "--glister_eta",
        type=values.number(float, 0, open_low=True),
        default=plain.glister_eta,
        help="glister: its step",
    )
    add(
        "--glister_refresh",
        type=values.number(int, 1),
        default=plain.glister_refresh,
        help="glister: picks between two refreshes of the validation gradient",
    )
    add(
        "--gradmatch_lambda",
        type=values.number(float, 0),
        default=plain.gradmatch_lambda,
        help="gradmatch: its ridge",
    )
    add(
        "--ccs_cutoff",
        type=values.number(float, 0, 1, open_high=True),
        help="ccs: share of hardest examples to leave out (default: the paper's, by fraction)",
    )
    add("--ccs_bins", type=values.number(int, 1), default=plain.ccs_bins, help="ccs: strata")
    add("--d2_neighbors", type=values.number(int, 0), default=plain.d2_neighbors, help="d2: neighbours in its graph")
    add("--d2_gamma", type=values.number(float, 0), default=plain.d2_gamma, help="d2: decay of its reverse messages")
    add(
        "--dual_beta",
        action=argparse.BooleanOptionalAction,
        default=plain.dual_beta,
        help="dual: sample by its Beta density; else keep the highest scores",
    )
    add(
        "--dual_c",
        type=values.number(float, 0, open_low=True),
        default=plain.dual_c,
        help="dual: how fast its density moves with pruning",
    )
    add(
        "--score_window",
        type=values.number(int, 2),
        default=plain.score_window,
        help="dual, tdds: epochs of a window",
    )
    add(
        "--infobatch_delta",
        type=values.number(float, 0, 1),
        default=plain.infobatch_delta,
        help="infobatch_dynamic: share of the epochs after which everything is trained on",
    )
    add(
        "--selection_memory",
        type=values.number(int, 1),
        default=plain.selection_memory,
        metavar="MIB",
        help="memory for pairwise similarities; larger ones are computed in blocks",
    )
    add_score_flags(parser)
    _restrict(group)


def _restrict(group: Any) -> None:
    """Declare where the flags of ``add_selection_flags`` act.

    The SAMIS paper's commands give ``--coreset_mode``, ``--per_class`` and the flags of pre-training with every
    method, so every method accepts them (and ``--coreset_networks``, which is one of pre-training).
    """
    own = {flag: action for flag, action in group._option_string_actions.items() if action in group._group_actions}
    unchosen = "with --selection, which lists what is kept"
    restrict(group, {tuple(own): (lambda args: getattr(args, "selection", None) is None, unchosen)})
    for name in dict.fromkeys(name for method in METHODS.values() for name in method.option_names):
        readers = " or ".join(method.name for method in METHODS.values() if name in method.option_names)
        acts = (lambda args, name=name: any(name in m.option_names for m in _chosen(args)), f"without {readers}")
        if name != "coreset_mode":
            restrict(group, {tuple(flag for flag, action in own.items() if action.dest == name): acts})
    restrict(
        group,
        {
            ("--dual_c",): (lambda args: args.dual_beta, "with --no-dual_beta"),
            ("--scores_folder",): (
                lambda args: any(m.needs.stored for m in _chosen(args)),
                "without a method that reads a stored score (min_*)",
            ),
        },
    )
