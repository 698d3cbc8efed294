#!/usr/bin/env python3
r"""Measure the curvature of a trained network's loss: top Hessian eigenvalues, spectral density, trace.

Reads a checkpoint of train_full.py under --models_folder (any other run's by --exp, any file by --checkpoint). The
loss is the mean cross-entropy over the training or test part, un-augmented. Writes
{hessian_folder}/{eigen_split}_{high_low_spec or all}_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_{bn or
nobn}/{seed}/epoch_{epochs}/pyhessian_eigen_{eigen_mode}.pkl (eigenvals, trace, density_eigen, density_weight) and a
json beside it: settings, residuals, standard errors, costs. plot_hessian.py draws and tabulates them. --resume
continues an interrupted measurement; power iteration (--eigen_mode=power_iter) alone starts from scratch then.

  python compute_hessian_eigen.py --dataset=digits --model=lenet --optimizer=sgd --seed=1 --epochs=20
  python compute_hessian_eigen.py --dataset=cifar10 --model=resnet18 --optimizer=sam --seed=1234 --epochs=160 \
      --subset=10000 --basis=half --resume
"""

from __future__ import annotations

import logging
from argparse import SUPPRESS, Namespace
from typing import TYPE_CHECKING

from src.cli import Parser, print_next, restrict, run_script
from src.errors import FileError, FlagError
from src.metrics import Proxy
from src.settings import add_compute_flags, add_data_flags, add_folder_flags, add_score_flags, score_folders
from src.settings.geometry import (
    EIGEN_PRECISIONS,
    add_checkpoint_flags,
    add_measurement_flags,
    add_spectrum_flags,
    refuse_contradictions,
)

if TYPE_CHECKING:
    import numpy as np

    from src.curvature.hessian_runs import HessianRun
    from src.trained import TrainedNetworks

log = logging.getLogger("compute_hessian_eigen")


def parse() -> Namespace:
    """The flags."""
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_checkpoint_flags(parser)
    add_spectrum_flags(parser)
    add_measurement_flags(parser)
    add_score_flags(parser)
    restrict(parser, {("--scores_folder",): (lambda args: args.high_low_spec is not None, "without --high_low_spec")})
    add_compute_flags(parser, precisions=EIGEN_PRECISIONS)
    add_folder_flags(parser, "datasets", "models", "metrics", "hessian")
    parser.add_argument("--deactivate_bn", action="store_true", help=SUPPRESS)
    parser.accept_paper_flags()
    args = parser.parse_args()
    refuse_contradictions(args)
    return args


def main() -> None:
    """Parse, find the network, measure, save, print."""
    args = parse()
    from src.curvature.hessian_runs import HessianRun
    from src.trained import TrainedNetworks

    networks = TrainedNetworks(args)
    run = HessianRun(args, networks, read_scores(args, networks))
    if args.deactivate_bn and run.norm == "bn":
        raise FlagError("--deactivate_bn: the model has BatchNorm, and bn or nobn follows from that; leave it out")
    if args.deactivate_bn:
        log.info("--deactivate_bn: the model has no BatchNorm, so that nobn follows from it without this flag")
    if not args.overwrite and run.files.is_done(run.settings):
        print("done already with these settings; --overwrite measures again")
        run.forget_state()
        try:
            report(run.files.read_record())
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{run.files.record}: is damaged ({error}); measure again with --overwrite") from error
    else:
        report(run.measure()[1])
    print(run.files.path, run.files.record, sep="\n")
    print_figure(args, run)


def print_figure(args: Namespace, run: HessianRun) -> None:
    """Print the command that draws the spectrum."""
    if args.exp is not None or args.checkpoint is not None:
        print_next("plot_hessian.py", (), files=[run.files.path])
        return
    settings = run.settings
    print_next(
        "plot_hessian.py",
        (
            "dataset",
            "image_size",
            "channels",
            "datasets_folder",
            "hessian_folder",
            "eigen_split",
            "operator",
            "eigen_mode",
        ),
        model=settings["model"],
        optimizers=[args.optimizer],
        lr_sched=args.lr_sched,
        seeds=[args.seed],
        epochs=args.epochs,
        high_low_specs=None if args.high_low_spec is None else [args.high_low_spec],
    )


def read_scores(args: Namespace, networks: TrainedNetworks) -> np.ndarray | None:
    """The scores by which ``--high_low_spec`` chooses."""
    if args.high_low_spec is None:
        return None
    metric, train = args.high_low_spec.metric, networks.train
    folders = score_folders(args.scores_folder, metric, args.metrics_folder)
    checks = {"n": train.total, "label_hash": networks.labels, "data_hash": train.digest}
    return Proxy(metric, train.entry.name, folder=folders, **checks).scores


def report(record: dict) -> None:
    """Print eigenvalues with their residuals, and the trace."""
    print(f"loss {record['loss']:.6g}, gradient norm {record['gradient_norm']:.4g}, {record['products']} products")
    for place, (value, residual) in enumerate(zip(record["eigenvalues"], record["residuals"], strict=True), 1):
        print(f"eigenvalue {place}: {value:.6g} (residual at most {residual:.1e})")
    if not record["converged"]:
        more = "--max_steps" if record["settings"]["eigen_mode"] == "lanczos" else "--power_iterations"
        log.warning("not all eigenvalues are within the tolerance; raise %s", more)
    if record["smallest_node"] < -abs(record["eigenvalues"][-1]) and record["settings"]["order"] == "largest":
        log.warning(
            "an eigenvalue of %.4g is larger in magnitude than some of these; --eigen_order=magnitude counts it in",
            record["smallest_node"],
        )
    if record["trace"] is not None:
        error, count = record["trace_standard_error"], record["trace_probes"]
        text = "" if error is None else f" +- {error:.3g}"
        print(f"trace: {record['trace']:.6g}{text} ({count} probes, {record['trace_estimator']})")
        wanted = record["settings"]["trace_tolerance"] * abs(record["trace"])
        if error is None or error > wanted:
            log.warning("the trace's standard error is above --trace_tolerance; raise --trace_probes")
    else:
        starts = record["settings"]["probes"]
        print(f"trace by the density's quadrature: {record['trace_quadrature']:.6g} (rough, {starts} random vectors)")


if __name__ == "__main__":
    run_script(main)
