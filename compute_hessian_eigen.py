#!/usr/bin/env python3
r"""Measure the curvature of a trained model's loss: top Hessian eigenvalues, spectral density, trace.

Reads a checkpoint of train_full.py under --models_folder (with --exp: of any other run; with --checkpoint: any file,
also a state dict from elsewhere). In the path below, epoch_{epochs} is then checkpoint_{8 digits of its sha256}, and
optimizer and schedule are "unknown" if the file does not record them.
The loss is the mean cross-entropy over the training or test set, un-augmented. Writes
{hessian_folder}/{eigen_split}_{high_low_spec or all}_{model}_over_{dataset}_with_{optimizer}_sched_{lr_sched}_{bn or
nobn}/{seed}/epoch_{epochs}/pyhessian_eigen_{eigen_mode}.pkl (eigenvals, trace, density_eigen, density_weight) and a
json record next to it: settings, residuals, standard errors, costs. plot_hessian.py plots and tabulates the results.
--resume continues an interrupted measurement; only power iteration (--eigen_mode=power_iter) starts over.

  python compute_hessian_eigen.py --dataset=digits --model=lenet --optimizer=sgd --seed=1 --epochs=20
  python compute_hessian_eigen.py --dataset=cifar10 --model=resnet18 --optimizer=sam --seed=1234 --epochs=160 \
      --subset=10000 --basis=half --resume
"""

from __future__ import annotations

import logging
from argparse import SUPPRESS, Namespace
from typing import TYPE_CHECKING, Any

from src.artifacts.io import label_hash
from src.artifacts.paths import Folders, eigen_name, hessian_path
from src.artifacts.store import load_result, record_path
from src.cli import FULL_DATA_FLAGS, Parser, build, print_next, restrict, run_script
from src.curvature.config import (
    FLOAT_PRECISIONS,
    NOT_FILE,
    NOT_NAMED,
    TRAINING_SET,
    CheckpointConfig,
    SpectrumConfig,
)
from src.datasets import DataConfig
from src.devices import TRAINING_ONLY, ComputeConfig
from src.errors import ArgumentError, FileError
from src.metrics import Proxy, get_score
from src.metrics.proxy import ScoreConfig, score_folders
from src.models import model_entry, model_flag

if TYPE_CHECKING:
    from src.context import RunContext
    from src.curvature.spectrum import TrainedModel
    from src.datasets import ImageSet

log = logging.getLogger("compute_hessian_eigen")


def parse() -> Namespace:
    """Parse and check the flags."""
    parser = Parser(__doc__)
    parser.add(DataConfig, "data")
    parser.add(CheckpointConfig, "model")
    parser.add(SpectrumConfig, "spectrum")
    parser.add(ScoreConfig, "scores")
    parser.add(ComputeConfig, "computing", skip=TRAINING_ONLY, choices={"precision": FLOAT_PRECISIONS})
    parser.add(Folders, "folders", only=("datasets_folder", "models_folder", "metrics_folder", "hessian_folder"))
    parser.add_argument("--deactivate_bn", action="store_true", help=SUPPRESS)
    parser.accept_paper_flags()
    orders = (lambda args: args.high_low_spec is not None, "without --high_low_spec")
    restrict(parser, {("--subset", "--exclude"): TRAINING_SET, ("--scores_folder",): orders})
    for rule in (NOT_FILE, NOT_NAMED):
        restrict(parser, {("--optimizer", "--lr_sched"): rule})
    return parser.parse_args()


def main() -> None:
    """Parse, find the model, measure, save, print."""
    args = parse()
    config, folders = build(SpectrumConfig, args), build(Folders, args)
    chosen, data, compute = build(CheckpointConfig, args), build(DataConfig, args), build(ComputeConfig, args)
    if config.high_low_spec is not None:
        metric = config.high_low_spec.metric
        get_score(metric, score_folders(args.scores_folder, metric, args.metrics_folder))
    import torch

    from src.context import RunContext
    from src.curvature.operators import OPERATORS
    from src.curvature.spectrum import SpectrumState, find_model, measure_spectrum

    context = RunContext(data, compute, folders.datasets_folder)
    trained = find_model(chosen, folders.models_folder, context)
    images = examples(config, context, args)
    settings = result_settings(config, context, trained, images)
    warn_of_other_examples(trained, settings)

    last = model_entry(trained.state["model"]).channels_last and context.device.type == "cpu"
    model = trained.model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    normalization = trained.state["normalisation"]
    batches = context.batches(images, config.batch_size, normalization=normalization, channels_last=last)
    operator = OPERATORS[config.operator](model, batches, len(images))
    if config.top_n > operator.size:
        raise ArgumentError("top_n", f"{config.top_n}: must be at most {operator.size}, the number of parameters")

    norm = "bn" if trained.has_batchnorm else "nobn"
    if args.deactivate_bn:
        if norm == "bn":
            raise ArgumentError(
                "deactivate_bn", ": this model has BatchNorm, and the model determines bn or nobn; omit this flag"
            )
        log.info("--deactivate_bn: has no effect; the model has no BatchNorm, so results are named nobn anyway")
    path = hessian_path(
        folders.hessian_folder,
        config.eigen_split,
        settings["high_low_spec"] or "all",
        trained.experiment,
        norm,
        trained.seed,
        trained.which,
        eigen_name(config.eigen_mode, config.operator),
    )
    record = None if config.overwrite else load_result(path, settings)
    if record is None:
        report(measure_spectrum(operator, config, path, settings, {"checkpoint": str(trained.path)}))
    else:
        print("already measured with these settings; use --overwrite to measure again")
        SpectrumState(path.with_suffix(".state"), settings).clear()  # left if a run ended right after its result
        try:
            report(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise FileError(f"{record_path(path)}: is damaged ({error}); measure again with --overwrite") from error
    print(path, record_path(path), sep="\n")

    if args.exp is not None or args.checkpoint is not None:
        print_next("plot_hessian.py", (), files=[path])
        return
    print_next(
        "plot_hessian.py",
        [
            *FULL_DATA_FLAGS,
            "hessian_folder",
            "eigen_split",
            "operator",
            "eigen_mode",
        ],
        model=model_flag(trained.state["model"]),
        optimizers=[args.optimizer],
        lr_sched=args.lr_sched,
        seeds=[args.seed],
        epochs=args.epochs,
        high_low_specs=None if config.high_low_spec is None else [config.high_low_spec],
    )


def examples(config: SpectrumConfig, context: RunContext, args: Namespace) -> ImageSet:
    """The examples over which the loss is averaged."""
    if config.eigen_split == "test":
        return context.test
    if config.high_low_spec is None:
        return context.train
    from src.curvature.spectrum import select_by_score

    metric, side, fraction = config.high_low_spec
    folders = score_folders(args.scores_folder, metric, args.metrics_folder)
    checks = {"n": context.train.total, "label_hash": context.label_hash, "data_hash": context.train.digest}
    scores = Proxy(metric, context.entry.name, folder=folders, **checks).scores
    return select_by_score(context.train, scores, side, fraction)


def result_settings(
    config: SpectrumConfig, context: RunContext, trained: TrainedModel, images: ImageSet
) -> dict[str, Any]:
    """All settings that the result depends on."""
    from src.training import image_facts, training_facts

    return {
        "dataset": context.entry.name,
        "labels": context.label_hash,
        **image_facts(context.full_train),
        "subset": context.data_settings["subset"],
        "model": trained.state["model"],
        "experiment": trained.experiment,
        "seed": trained.seed,
        "epoch": trained.state["epoch"],
        "checkpoint": trained.digest,
        "training": training_facts(trained.state["settings"]),
        "examples": len(images),
        "example_hash": label_hash(images.indices.cpu().numpy()),
        "precision": context.compute.precision,
        **config.as_dict(),
    }


def warn_of_other_examples(trained: TrainedModel, settings: dict[str, Any]) -> None:
    """Warn if the loss is not over the training examples of the model: a subset, a split or a coreset."""
    if settings["eigen_split"] != "train" or settings["high_low_spec"] is not None:
        return
    stored = trained.state["settings"]
    if not stored:  # weights from elsewhere, trained on unknown examples
        return
    count = stored.get("examples", settings["examples"])
    if stored.get("subset") != settings["subset"] or count != settings["examples"]:
        log.warning(
            "%s: was trained on %s examples, but the loss is over %d, which may be other examples or a subset "
            "(see --subset)",
            trained.path, count, settings["examples"],
        )  # fmt: skip


def report(record: dict) -> None:
    """Print the eigenvalues with their residuals, and the trace."""
    print(f"loss {record['loss']:.6g}, gradient norm {record['gradient_norm']:.4g}, {record['products']} products")
    for number, (value, residual) in enumerate(zip(record["eigenvalues"], record["residuals"], strict=True), 1):
        print(f"eigenvalue {number}: {value:.6g} (residual at most {residual:.1e})")
    if not record["converged"]:
        more = "--max_steps" if record["settings"]["eigen_mode"] == "lanczos" else "--power_iterations"
        log.warning("not all eigenvalues are within the tolerance; raise %s", more)
    if record["smallest_node"] < -abs(record["eigenvalues"][-1]) and record["settings"]["order"] == "largest":
        log.warning(
            "an eigenvalue of %.4g is larger in magnitude than some of these; --eigen_order=magnitude includes it",
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
        print(
            f"trace from the density's quadrature: {record['trace_quadrature']:.6g} (rough; {starts} start vectors)"
        )


if __name__ == "__main__":
    run_script(main, {"mode": "high_low_spec"})
