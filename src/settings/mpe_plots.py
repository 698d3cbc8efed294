"""Flags of the figures of the Memory-Perturbation Equation."""

import argparse

from mpe.choices import CLASS_COVARIANCES
from src.settings.experiments import add_pickles_flag
from src.settings.values import file_name


def add_experiment_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """``--name_exp``: whose results are drawn."""
    parser.add_argument("--name_exp", type=file_name, default=default, metavar="NAME", help="name of the experiment")


def add_class_cov_flag(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``--class_cov``: which of the stored estimates are drawn, one or ``several``."""
    parser.add_argument(
        "--class_cov",
        choices=CLASS_COVARIANCES,
        nargs="+" if several else None,
        help="draw estimates with this covariance between the classes (default: as the experiment was run)",
    )


def add_figure_flags(parser: argparse.ArgumentParser) -> None:
    """``--pickles_folder``, ``--plots_folder`` and ``--show``."""
    add_pickles_flag(parser, plots=True)
    parser.add_argument("--show", action="store_true", help="open a window with the figure, and wait until it closes")
