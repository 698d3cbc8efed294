"""One measurement of a spectrum, from the flags of compute_hessian_eigen.py: model, examples, operator, files."""

import logging
import re
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from src.artifacts import (
    differences,
    eigen_name,
    file_digest,
    hessian_path,
    label_hash,
    refuse_other_settings,
    require_writable,
    sole,
    standard_experiment,
    without_idle,
)
from src.curvature.choices import SpectrumPlan
from src.curvature.hessian import OPERATORS, CurvatureOperator
from src.curvature.hessian_files import HessianFiles, describe
from src.curvature.lanczos import basis_bytes
from src.curvature.power import power_iteration
from src.curvature.spectrum import DEFLATED, Spectrum, SpectrumRun, SpectrumState, true_residuals
from src.datasets import ImageSet, parse_subset
from src.devices import available_memory
from src.errors import FileError, FlagError
from src.formatting import gib
from src.models import MODELS
from src.trained import TrainedNetworks
from src.training import find_checkpoint, only_schedule, training_facts

DEFAULT_MODEL = "resnet50"
_RUN = r"(?P<model>.+)_over_.+_with_(?P<optimizer>.+)_sched_(?P<lr_sched>.+)"
_NAMES = {
    "train_full.py": re.compile(f"standard_{_RUN}"),
    "train_split.py": re.compile(rf"split_{_RUN}_val_split_(?P<samis_validation_split_index>\d+)"),
}
"""The scripts whose runs' names hold the flags that define them."""
_MAKERS = {
    "_static_coreset_": "runs of this name are made by train_prune.py",
    "pretrain/": "runs of this name are made by train_prune.py and select_coreset.py",
    "mpe/": "runs of this name are made by the scripts in examples/",
}


@dataclass(frozen=True)
class Subject:
    """The network that is measured.

    Attributes:
        path: Its checkpoint.
        experiment: Its run.
        seed: The run's seed.
        which: The folder of the result below the run's: the epoch, or digits of the checkpoint's content.
    """

    path: Path
    experiment: str
    seed: int
    which: str


def find_subject(args: Namespace, networks: TrainedNetworks) -> tuple[Subject, nn.Module, dict[str, Any]]:
    """The network of the flags, and its checkpoint without its weights.

    Raises:
        FlagError: Several schedules fit.
        FileError: There is no such checkpoint (the message has the command that makes it), or it does not fit.
    """
    name = networks.train.entry.name
    if args.checkpoint is not None:
        network, state = networks.load(args.checkpoint, args.model)
        settings = state["settings"]
        words = (settings.get(key, "unknown") for key in ("optimizer", "lr_sched"))
        experiment = standard_experiment(state["model"], name, *words)
        which = f"checkpoint_{file_digest(args.checkpoint)[:8]}"
        return Subject(args.checkpoint, experiment, int(settings.get("seed", 0)), which), network, state
    asked = {"seed": args.seed, "epoch": args.epochs}
    if args.exp is not None:
        path, said = _find_named(args, networks)
        model, experiment = args.model, args.exp
        asked |= said
    else:
        model = args.model or DEFAULT_MODEL
        pattern = standard_experiment(model, name, args.optimizer, "*")
        lr_sched = only_schedule(args.models_folder, pattern, args.seed, args.lr_sched) or "const"
        experiment = standard_experiment(model, name, args.optimizer, lr_sched)
        flags = {"model": model, "optimizer": args.optimizer, "lr_sched": lr_sched}
        path = networks.find(experiment, args.seed, args.epochs, **flags)
        asked |= {"optimizer": args.optimizer, "lr_sched": lr_sched, "validation_split": None}
    network, state = networks.load(path, model, **asked)
    return Subject(path, experiment, args.seed, f"epoch_{args.epochs}"), network, state


def _find_named(args: Namespace, networks: TrainedNetworks) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a run that is called by its name, and what the name says of it.

    Raises:
        FileError: There is none.
    """
    for script, pattern in _NAMES.items():
        if found := pattern.fullmatch(args.exp):
            path = networks.find(args.exp, args.seed, args.epochs, script=script, **found.groupdict())
            split = found.groupdict().get("samis_validation_split_index")
            said = {name: found[name] for name in ("optimizer", "lr_sched")}
            return path, {**said, "validation_split": None if split is None else int(split)}
    path = find_checkpoint(args.models_folder, args.exp, args.seed, args.epochs)
    if path is None:
        makers = (maker for sign, maker in _MAKERS.items() if sign in args.exp)
        raise FileError(
            f"{args.models_folder}: no checkpoint of epoch {args.epochs}, seed {args.seed} for {args.exp}; "
            + next(makers, "look for its name there")
        )
    return path, {}


def chosen_examples(args: Namespace, networks: TrainedNetworks, scores: np.ndarray | None) -> ImageSet:
    """The examples over which the loss is taken.

    Args:
        args: The flags.
        networks: The data.
        scores: By original index, where ``--high_low_spec`` is given.

    Raises:
        FlagError: Nothing is left.
        FileError: An example has no score.
    """
    if args.eigen_split == "test":
        return networks.test
    images = subset_of(args, networks.train)
    if args.high_low_spec is None:
        return images
    own = scores[images.indices.cpu().numpy()]
    missing = int(np.isnan(own).sum())
    if missing:
        raise FileError(
            f"--high_low_spec {args.high_low_spec}: {missing} of the {len(own)} examples have no score; score them, "
            "or leave them out with --subset"
        )
    return images.subset(torch.from_numpy(by_score(own, args.high_low_spec.side, args.high_low_spec.fraction)))


def subset_of(args: Namespace, images: ImageSet) -> ImageSet:
    """The part of the training examples that ``--subset`` says; all of them without it."""
    if args.subset is None:
        return images
    return images.subset(torch.from_numpy(parse_subset(args.subset, images.total, images.labels.cpu().numpy())))


def by_score(scores: np.ndarray, side: str, fraction: float) -> np.ndarray:
    """Positions, ascending, of the lowest or the highest scores; ties are broken by position.

    Args:
        scores: ``(n,)``, without NaN.
        side: ``"low"`` or ``"high"``.
        fraction: Share to take, of n, rounded half up.

    Raises:
        FlagError: That is none.
    """
    count = min(int(np.floor(fraction * len(scores) + 0.5 + 1e-9)), len(scores))
    if not count:
        raise FlagError(f"--high_low_spec: {fraction:g} of {len(scores)} examples is none; give a larger fraction")
    order = np.argsort(scores, kind="stable")
    return np.sort(order[:count] if side == "low" else order[-count:])


log = logging.getLogger(__name__)


class HessianRun:
    """One measurement of the flags.

    Args:
        args: The flags.
        networks: The data, and the trained networks.
        scores: By original index, where ``--high_low_spec`` is given.

    Attributes:
        files: Where the result is written.
        settings: All that it depends on.
        norm: ``"bn"`` for a model with BatchNorm, ``"nobn"`` for others.
    """

    def __init__(self, args: Namespace, networks: TrainedNetworks, scores: np.ndarray | None = None) -> None:
        self.args = args
        subject, network, state = find_subject(args, networks)
        images = chosen_examples(args, networks, scores)
        last = MODELS[state["model"]].channels_last and networks.device.type == "cpu"
        network = network.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        batches = networks.batches(images, args.batch_size, state, channels_last=last)
        self.operator: CurvatureOperator = OPERATORS[args.operator](network, batches, len(images))
        if args.top_n > self.operator.size:
            raise FlagError(f"--top_n {args.top_n}: must be at most {self.operator.size}, the number of parameters")
        self.norm = "bn" if any(isinstance(module, _BatchNorm) for module in network.modules()) else "nobn"
        spec = str(args.high_low_spec) if args.high_low_spec is not None else "all"
        name = eigen_name(args.eigen_mode, args.operator)
        where = (subject.experiment, self.norm, subject.seed, subject.which, name)
        self.files = HessianFiles(hessian_path(args.hessian_folder, args.eigen_split, spec, *where))
        self.plan = SpectrumPlan(
            top_n=args.top_n,
            order=args.eigen_order or ("magnitude" if args.eigen_mode == "power_iter" else "largest"),
            tolerance=args.tolerance,
            steps=args.lanczos_steps,
            max_steps=args.lanczos_steps if args.eigen_mode == "power_iter" else args.max_steps,
            probes=args.probes,
            trace_probes=args.trace_probes,
            trace_tolerance=args.trace_tolerance,
            seed=args.probe_seed,
            basis=args.basis,
        )
        self.settings = {
            "dataset": images.entry.name,
            **networks.facts,
            "model": state["model"],
            "experiment": subject.experiment,
            "seed": subject.seed,
            "epoch": state["epoch"],
            "checkpoint": file_digest(subject.path),
            "eigen_split": args.eigen_split,
            "high_low_spec": None if args.high_low_spec is None else spec,
            "subset": None
            if args.subset is None
            else label_hash(subset_of(args, networks.train).indices.cpu().numpy()),
            "examples": len(images),
            "example_hash": label_hash(images.indices.cpu().numpy()),
            "operator": args.operator,
            "eigen_mode": args.eigen_mode,
            **{("probe_seed" if name == "seed" else name): v for name, v in without_idle(asdict(self.plan)).items()},
            "power_iterations": args.power_iterations if args.eigen_mode == "power_iter" else None,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "training": training_facts(state["settings"]),
        }
        self.path = subject.path
        self._warn_of_other_examples(state["settings"])

    def _warn_of_other_examples(self, trained: dict[str, Any]) -> None:
        """Say so where the loss is not over the examples trained on: a subset, a split, a coreset."""
        settings = self.settings
        if settings["eigen_split"] != "train" or settings["high_low_spec"] is not None:
            return
        count = trained.get("examples", settings["examples"])
        if trained.get("subset") != settings["subset"] or count != settings["examples"]:
            log.warning(
                "%s: was trained on %s examples; the loss is measured on other ones, or on a part of them: %d "
                "(see --subset)",
                self.path, count, settings["examples"],
            )  # fmt: skip

    def measure(self) -> tuple[Spectrum, dict[str, Any]]:
        """Measure, write the files, and remove the state.

        Returns:
            The spectrum, and its record: what the json file holds.

        Raises:
            MeasurementError: Something is not finite.
            FileError: A file cannot be written, the state does not fit, or another process is measuring it.
        """
        require_writable(self.files.path.parent)
        with sole(self.files.claim, "measuring this spectrum"):
            return self._measure()

    def _measure(self) -> tuple[Spectrum, dict[str, Any]]:
        args, operator, plan = self.args, self.operator, self.plan
        self._announce()
        began = time.monotonic()
        state = SpectrumState(self.files.state, self.settings)
        run = SpectrumRun(operator, plan, state, args.save_every)
        resumed = self._resume(run, state)
        loss, gradient = operator.loss_and_gradient()
        norm = torch.linalg.vector_norm(gradient).item()
        log.info("loss %.6g over %d examples, gradient norm %.4g", loss, self.settings["examples"], norm)
        outside = self._power(state) if args.eigen_mode == "power_iter" else None
        spectrum = run.run(progress=True)
        if outside is not None:
            spectrum.eigenvalues, spectrum.residuals = np.array(outside["values"]), np.array(outside["residuals"])
        record = {
            "settings": self.settings,
            "checkpoint": str(self.path),
            "parameters": operator.size,
            "loss": loss,
            "gradient_norm": norm,
            **describe(spectrum, plan),
            "products": operator.products,
            "seconds": run.seconds + (outside["seconds"] if outside is not None else 0.0),
            "last_start_seconds": time.monotonic() - began,
            "resumed": resumed,
            "device": str(operator.device),
        }
        self.files.write(spectrum, record)
        state.clear()
        return spectrum, record

    def forget_state(self) -> None:
        """Remove the state of a measurement that ended before it removed its state itself."""
        SpectrumState(self.files.state, self.settings).clear()

    def _announce(self) -> None:
        """Say what memory the vectors take: usually, and at most."""
        plan, operator = self.plan, self.operator
        counts = [min(steps, operator.size) + 1 for steps in (plan.steps, max(plan.steps, plan.max_steps))]
        usual, most = (basis_bytes(count, operator.size, operator.dtype, plan.basis) for count in counts)
        ritz = 0
        if plan.basis != "none" and plan.trace_probes:
            ritz = min(DEFLATED, operator.size) * operator.size * operator.dtype.itemsize
        log.info(
            "%d parameters; the Lanczos basis takes %s (%d vectors), up to %s (%d) if eigenvalues converge slowly, "
            "and the trace's vectors %s",
            operator.size, gib(usual), counts[0], gib(most), counts[1], gib(ritz),
        )  # fmt: skip
        where = torch.device("cpu") if plan.basis == "host" else operator.device
        need = most + (ritz if where == operator.device else 0)
        free = available_memory(where)
        if free is not None and need > free:
            less = "" if plan.basis == "half" else "--basis=half takes half of it, "
            log.warning("only %s are free: %s--basis=none nothing, a lower --max_steps less", gib(free), less)

    def _resume(self, run: SpectrumRun, state: SpectrumState) -> bool:
        """Go on from the state, or remove it; whether the run goes on.

        Raises:
            FileError: It is of other settings, or (with ``--resume``) damaged, and ``--overwrite`` is not given.
        """
        args = self.args
        try:
            stored = state.settings_there()
        except FileError:
            if args.resume and not args.overwrite:
                raise
            stored = {}
            state.clear()
        if not args.overwrite:
            for path, settings in stored.items():
                refuse_other_settings(path, settings, self.settings)
        elif any(differences(settings, self.settings) for settings in stored.values()):
            state.clear()
        if not args.resume:
            if stored:
                log.info("%s: an interrupted measurement is dropped (--resume would go on with it)", state.folder)
            state.clear()
            return False
        try:
            resumed = run.resume()
        except FileError:
            if not args.overwrite:
                raise
            state.clear()
            return False
        if resumed:
            log.info("going on after %d products", self.operator.products)
        return resumed

    def _power(self, state: SpectrumState) -> dict[str, Any]:
        """Power iteration's eigenvalues, from an earlier start or now."""
        kept = state.kept("power")
        operator, plan = self.operator, self.plan
        if kept is None:
            began = time.monotonic()
            with tqdm(desc="power iteration", unit="product", disable=None) as bar:
                values, vectors = power_iteration(
                    operator,
                    plan.top_n,
                    iterations=self.args.power_iterations,
                    tolerance=plan.tolerance,
                    seed=plan.seed,
                    done=bar.update,
                )
            residuals = true_residuals(operator, values, vectors)
            kept = {"values": values.tolist(), "residuals": residuals.tolist(), "products": operator.products}
            kept["seconds"] = time.monotonic() - began
            state.keep("power", kept)
        elif not all(isinstance(kept.get(name), list) for name in ("values", "residuals")) or not all(
            isinstance(kept.get(name), int | float) for name in ("products", "seconds")
        ):
            raise FileError(f"{state.folder}: its state is damaged; remove it, or leave --resume out")
        operator.products = max(operator.products, kept["products"])
        return kept
