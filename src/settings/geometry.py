"""Flags of the scripts of loss geometry."""

import argparse
from pathlib import Path
from typing import NamedTuple

from src.cli import restrict
from src.curvature.choices import OPERATOR_NAMES, ORDERS, STORAGES, SpectrumPlan
from src.errors import FlagError
from src.metrics.registry import SCORES
from src.models import model_names
from src.optimizers import OPTIMIZERS, SCHEDULES
from src.settings import values
from src.settings.common import add_overwrite_flag

EIGEN_PRECISIONS = ("fp32", "tf32", "fp64")
EIGEN_MODES = ("lanczos", "power_iter")


class HighLow(NamedTuple):
    """``metric:low|high:fraction``: the part of the examples with the lowest or the highest scores."""

    metric: str
    side: str
    fraction: float

    def __str__(self) -> str:
        return f"{self.metric}:{self.side}:{self.fraction:g}"


def high_low(text: str) -> HighLow:
    """A type for ``--high_low_spec``."""
    parts = text.split(":")
    if len(parts) != 3 or parts[1] not in ("low", "high"):
        raise argparse.ArgumentTypeError(f"{text!r} is not metric:low|high:fraction, such as mem:low:0.3")
    if parts[0] not in SCORES:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no score {parts[0]!r}; choose from {', '.join(SCORES)}")
    return HighLow(parts[0], parts[1], values.fraction(parts[2]))


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Which trained network: by the flags of train_full.py, by its run's name, or by its file."""
    group = parser.add_argument_group("network")
    add = group.add_argument
    add(
        "--model",
        choices=model_names(),
        metavar="NAME",
        help=f"one of {', '.join(model_names())} (default: resnet50, or what --exp and --checkpoint hold)",
    )
    add("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="optimiser in the run's name")
    add("--lr_sched", choices=tuple(SCHEDULES), help="schedule in the run's name (default: the only one there is)")
    add("--seed", type=values.SEED, default=1, help="seed of the run")
    add("--epochs", type=values.number(int, 1), default=160, help="epoch whose checkpoint is read")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--exp",
        metavar="NAME",
        help="any other run by its name, the folder under --models_folder, such as one of train_split.py or "
        "train_prune.py (default: that of train_full.py)",
    )
    either.add_argument("--checkpoint", type=Path, metavar="FILE", help="this very file (default: none)")
    restrict(
        group,
        {
            ("--seed", "--epochs", "--optimizer", "--lr_sched"): (
                lambda args: args.checkpoint is None,
                "with --checkpoint, which names the file",
            ),
            ("--optimizer", "--lr_sched"): (lambda args: args.exp is None, "with --exp, which names the run"),
        },
    )


def add_spectrum_flags(parser: argparse.ArgumentParser) -> None:
    """What to measure of the Hessian, on which examples, and how well."""
    plain = SpectrumPlan()
    group = parser.add_argument_group("examples")
    add = group.add_argument
    add("--eigen_split", choices=("train", "test"), default="train", help="the part whose loss it is")
    add(
        "--high_low_spec",
        type=high_low,
        metavar="METRIC:low|high:FRACTION",
        help="only the training examples with the lowest or highest scores, such as mem:low:0.3 (default: all)",
    )
    add("--batch_size", type=values.number(int, 1), default=512, help="examples at a time")
    group = parser.add_argument_group("spectrum")
    add = group.add_argument
    add("--operator", choices=OPERATOR_NAMES, default="hessian", help="the Hessian, or the Gauss-Newton matrix")
    add(
        "--eigen_mode",
        choices=EIGEN_MODES,
        default="lanczos",
        help="top eigenvalues from the density's own Lanczos run, or by power iteration (pyhessian's; slow)",
    )
    add("--top_n", type=values.number(int, 1), default=plain.top_n, help="how many top eigenvalues")
    add(
        "--eigen_order",
        choices=tuple(ORDERS),
        help="which ones those are (default: largest; power_iter finds those of largest magnitude)",
    )
    add(
        "--tolerance",
        type=values.number(float, 0, open_low=True),
        default=plain.tolerance,
        help="relative residual at which an eigenvalue is found; power_iter: its change in an iteration",
    )
    add("--lanczos_steps", type=values.number(int, 1), default=plain.steps, help="steps of the density")
    add(
        "--max_steps",
        type=values.number(int, 1),
        default=plain.max_steps,
        help="steps after which eigenvalues are given as they are, with their residuals",
    )
    add("--power_iterations", type=values.number(int, 1), default=100, help="power_iter: most per eigenvalue")
    add("--probes", type=values.number(int, 1), default=plain.probes, help="start vectors of the density")
    add("--trace_probes", type=values.number(int, 0), default=plain.trace_probes, help="most probes of the trace")
    add(
        "--trace_tolerance",
        type=values.number(float, 0),
        default=plain.trace_tolerance,
        help="relative standard error at which the trace takes no more",
    )
    add("--probe_seed", type=values.SEED, default=plain.seed, help="seed of all random vectors")
    add(
        "--basis",
        choices=tuple(STORAGES),
        default=plain.basis,
        help="how the Lanczos vectors are kept; " + "; ".join(f"{name}: {what}" for name, what in STORAGES.items()),
    )
    restrict(
        group,
        {
            ("--subset", "--high_low_spec"): (
                lambda args: args.eigen_split == "train",
                "with --eigen_split=test: it chooses training examples",
            ),
            ("--max_steps",): (
                lambda args: args.eigen_mode != "power_iter",
                "with --eigen_mode=power_iter, which stops after --power_iterations",
            ),
            ("--power_iterations",): (
                lambda args: args.eigen_mode == "power_iter",
                "without --eigen_mode=power_iter",
            ),
            ("--trace_tolerance",): (lambda args: args.trace_probes > 0, "with --trace_probes=0"),
        },
    )


def add_drawn_flags(parser: argparse.ArgumentParser) -> None:
    """Which of a network's spectra are drawn."""
    group = parser.add_argument_group("spectra")
    add = group.add_argument
    add("--eigen_split", choices=("train", "test"), default="train", help="the part whose loss it is")
    add(
        "--high_low_specs",
        nargs="+",
        type=lambda text: text if text == "all" else high_low(text),
        default=["all"],
        metavar="SPEC",
        help="the parts of the examples to compare: all, or such as mem:low:0.3",
    )
    add("--operator", choices=OPERATOR_NAMES, default="hessian", help="the Hessian, or the Gauss-Newton matrix")
    add("--eigen_mode", choices=EIGEN_MODES, default="lanczos", help="how top eigenvalues were found")


def add_measurement_flags(parser: argparse.ArgumentParser) -> None:
    """How an interrupted measurement goes on."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted measurement, if there is one; an unfinished power iteration starts over",
    )
    group.add_argument(
        "--save_every", type=values.number(int, 1), default=10, help="products between two states to go on from"
    )
    add_overwrite_flag(group)


def refuse_contradictions(args: argparse.Namespace) -> None:
    """Stop at values of compute_hessian_eigen.py that contradict each other.

    Raises:
        FlagError: There are some.
    """
    if args.eigen_mode == "power_iter":
        if args.operator != "hessian":
            raise FlagError(
                f"--eigen_mode power_iter: supports the Hessian only, not --operator={args.operator}; use lanczos"
            )
        if args.eigen_order == "largest":
            raise FlagError("--eigen_order largest: power_iter finds eigenvalues of largest magnitude; use lanczos")
