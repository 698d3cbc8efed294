"""Flags of the SAMIS paper's scripts, which share one parser, that mean nothing here: accepted, and named."""

import argparse
from collections.abc import Callable

from src.cli import ignore

# What the paper's code parses and never reads (the last sleeps before the work): True where a value follows.
DEAD_FLAGS = {
    "coreset_epochs": True,
    "coreset_epoch_selection": True,
    "coreset_warmup_ratio": True,
    "lower_index": True,
    "m_samples": True,
    "ntk_velocity_epoch": True,
    "ntk_chosen_metric": True,
    "out_folder": True,
    "plots_folder": True,
    "cumulative": True,
    "weight_func": True,
    "mode": True,
    "pivots": True,
    "mid_point": True,
    "pivot_sample": True,
    "pretrain_epoch": True,
    "late_epoch": True,
    "pretrain_splits": True,
    "coeff_reg": True,
    "mem_scale_coeff": True,
    "coreset_splits": True,
    "alpha": True,
    "proxy": True,
    "starting_index": True,
    "deactivate_bn": False,
    "wait_start": False,
}


def add_dead_flags(parser: argparse.ArgumentParser) -> None:
    """Accept ``DEAD_FLAGS`` with a warning, except those that the parser has by now; they are not in ``--help``."""
    for name, valued in DEAD_FLAGS.items():
        if f"--{name}" not in parser._option_string_actions:
            kind = {} if valued else {"action": "store_true"}
            ignore(parser.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **kind))


def add_fixed_func_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """Accept ``--coreset_func`` with the one value that the paper's script of this kind requires."""
    parser.add_argument("--coreset_func", type=_only(name), help=argparse.SUPPRESS, default=argparse.SUPPRESS)


def _only(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text != name:
            raise argparse.ArgumentTypeError(f"{text!r}: this script accepts only {name}; use train_prune.py")
        return text

    return parse
