"""The runtime context of a script (device, precision, processes, data), and the models trained or loaded in it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from src.artifacts.io import label_hash, read_checkpoint, require_writable
from src.artifacts.paths import Folders, dynamics_folder, experiment_folder, resume_folder
from src.artifacts.store import diff_settings
from src.cli import log_to
from src.datasets import (
    Augmentation,
    Batches,
    DataConfig,
    DatasetEntry,
    ImageSet,
    Normalization,
    training_indices,
)
from src.datasets.own import TEST_FRACTION
from src.devices import PRECISIONS, ComputeConfig, prepare, resolve_device
from src.errors import ArgumentError, FileError
from src.jacobians import check_per_example
from src.metrics.dynamics import (
    EndConfig,
    has_end_of_training_scores,
    remove_end_of_training_scores,
    write_end_of_training_scores,
)
from src.models import MODELS, build_model, model_entry, model_flag, report_model_error
from src.models.base import two_images
from src.optimizers import SCHEDULES
from src.training import (
    DYNAMICS_FILE,
    Dynamics,
    EpochPlan,
    ProcessGroup,
    RunConfig,
    RunFiles,
    Trainer,
    data_facts,
    find_checkpoint,
    image_facts,
    load_model,
    model_description,
    read_dynamics,
    run_training,
    training_command,
)

log = logging.getLogger(__name__)


class RunContext:
    """Device, precision, processes and data of one script invocation.

    As a context manager, it leaves the process group on exit, and reports errors that the user's model raised while
    running in one line with file and line.

    Args:
        data: The data set, and the training examples to use.
        compute: Device, precision and distributed settings.
        datasets_folder: The folder of data sets.
        seed: Seed of the global generators; None does not seed them.
        normalization: The data set's normalization to use: ``"samis"`` or ``"mpe"``.

    Attributes:
        device: The compute device.
        precision: The compute precision.
        group: The processes that share the work.
        train: The selected training examples, on the device.
        full_train: All training examples, on the device.
        test: The test set, on the device.

    Raises:
        ArgumentError: The device or the subset does not exist.
        FileError: The data are missing or damaged.
    """

    def __init__(
        self,
        data: DataConfig,
        compute: ComputeConfig,
        datasets_folder: str | Path,
        *,
        seed: int | None = None,
        normalization: str = "samis",
    ) -> None:
        self.data, self.compute, self._normalization = data, compute, normalization
        self.group = ProcessGroup.from_environment() if compute.distributed_training else ProcessGroup.local()
        self.device = resolve_device(compute.device, self.group.local_rank)
        self.precision = PRECISIONS[compute.precision]
        prepare(self.device, self.precision, compute.deterministic)
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed)
        if compute.distributed_training:
            self.group.start(self.device)
        for main_process in (True, False):  # the main process goes first, so the data are downloaded once
            if self.group.is_main_process == main_process:
                train, test = data.load(datasets_folder)
            self.group.wait()
        self.full_train, self.test = train.to(self.device), test.to(self.device)
        self.train = self.full_train
        chosen = training_indices(data, train.examples)
        if chosen is not None:
            self.train = self.train.subset(chosen)

    def __enter__(self) -> RunContext:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.group.stop()
        report_model_error(error)

    @property
    def entry(self) -> DatasetEntry:
        """The data set."""
        return self.full_train.entry

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of all training examples, int64 ``(total,)``."""
        return self.full_train.labels.cpu().numpy()

    @cached_property
    def label_hash(self) -> str:
        """Hash of the labels of all training examples."""
        return label_hash(self.labels)

    @property
    def normalization(self) -> Normalization:
        """The normalization applied to images."""
        return self.entry.normalizations[self._normalization]

    @cached_property
    def data_settings(self) -> dict[str, Any]:
        """The settings that identify the data of a result."""
        entry = self.entry
        used = self.train.indices.cpu().numpy()
        subset = None if self.train is self.full_train else label_hash(used)
        draw = {}
        if self.full_train.drawn is not None:  # images and subset also differ, but do not name the flag
            fraction, seed = self.data.test_fraction, self.data.test_seed
            draw = {"test_fraction": TEST_FRACTION if fraction is None else fraction, "test_seed": seed}
        return {
            "dataset": entry.name,
            "image_size": entry.image_size,
            "channels": entry.channels,
            **image_facts(self.full_train),
            "labels": self.label_hash,
            "subset": subset,
            **draw,
        }

    def batches(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        normalization: Normalization | None = None,
        channels_last: bool = False,
        local: bool = True,
        order: str = "sequential",
        augmentation: Augmentation | None = None,
        seed: int = 1,
    ) -> Batches:
        """Iterate over images in batches on the device, in the precision's dtype.

        Args:
            images: The examples.
            batch_size: Examples per batch.
            normalization: The normalization; None for the context's.
            channels_last: Whether to use the channels-last memory format.
            local: Whether this process gets full batches instead of its share of each.
            order: The order of the examples; see ``Batches``.
            augmentation: The augmentation; None for none.
            seed: Seed of order and augmentation.
        """
        return Batches(
            images,
            batch_size,
            normalization=normalization or self.normalization,
            device=self.device,
            order=order,
            augmentation=augmentation,
            seed=seed,
            dtype=self.precision.dtype,
            channels_last=channels_last,
            rank=0 if local else self.group.rank,
            world=1 if local else self.group.world,
        )

    def find_checkpoints(
        self,
        models_folder: Path,
        experiment: str,
        seed: int,
        epochs: Collection[int],
        script: str | None = "train_full.py",
        **flags: Any,
    ) -> dict[int, Path]:
        """Find the checkpoints of several epochs of a run.

        Args:
            models_folder: The folder of checkpoints.
            experiment: The run's name.
            seed: The run's seed.
            epochs: The epochs, from 1.
            script: The script that trains the run, for the error message; None if unknown.
            flags: The other flags of that script.

        Returns:
            A dict from epoch to path.

        Raises:
            FileError: Some are missing; the message names them and the command that creates them.
        """
        paths = {epoch: find_checkpoint(models_folder, experiment, seed, epoch) for epoch in epochs}
        missing = sorted(epoch for epoch, path in paths.items() if path is None)
        if missing:
            listed = ", ".join(map(str, missing))
            line = f"{models_folder}: no checkpoint of epoch {listed}, seed {seed} for {experiment}"
            if script is not None:
                folder = experiment_folder(models_folder, experiment, seed)
                more = _missing_epochs(folder, max(epochs), missing, epochs)
                line += "; create it with: "
                line += training_command(script, {"dataset": self.data.dataset, **flags, "seed": seed, **more})
            raise FileError(line)
        return paths

    def load_model(
        self, path: str | Path, state: dict[str, Any] | None = None, **asked: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Load a checkpoint that was trained on this data.

        Args:
            path: The checkpoint.
            state: Its contents, if already read.
            asked: Other values that the checkpoint must match, such as ``model``, ``seed`` and ``epoch``; see
                ``load_model``.

        Returns:
            The model on the device, in eval mode and the precision's dtype, and the checkpoint without its weights.

        Raises:
            FileError: The file is missing or damaged, contains a different model, run or epoch than requested, was
                trained on different data, or has a weight that is not finite.
        """
        model_name = asked.pop("model", None)
        model, state = load_model(path, {**data_facts(self.full_train), **asked}, state)
        if model_name not in (None, state["model"]):
            flag = model_flag(state["model"])
            raise FileError(f"{path}: contains {state['model']}, not {model_name}; give --model={flag}")
        return self._placed(model, path, "train it again with a lower --learning_rate"), state

    def _placed(self, model: nn.Module, path: str | Path, remedy: str) -> nn.Module:
        """Return a model with the weights of a file on the device, after checking that they are finite."""
        for name, value in model.state_dict().items():
            if not value.isfinite().all():
                raise FileError(f"{path}: {name} is not finite; {remedy}")
        # per-example gradients and second derivatives use the default memory format
        return model.to(self.device, self.precision.dtype)

    def load_file(self, path: Path, model_name: str | None, **asked: Any) -> tuple[nn.Module, dict[str, Any]]:
        """Load a checkpoint of this project that was trained on this data, or any state dict of a named model.

        Args:
            path: The file.
            model_name: The model; None for the one that the checkpoint names.
            asked: See ``load_model``; ignored for a state dict, which records nothing.

        Returns:
            The same as ``load_model``. A state dict has no settings and no epoch, and this context's normalization.

        Raises:
            FileError: See ``load_model``; or the weights do not fit the model or are not finite.
        """
        checkpoint = None if path.suffix == ".safetensors" else read_checkpoint(path)
        if checkpoint is not None and {"format", "settings", "normalisation"} & checkpoint.keys():
            return self.load_model(path, checkpoint, model=model_name, **asked)
        if model_name is None:
            raise FileError(f"{path}: is not a checkpoint of this project; give --model for the weights in it")
        entry = self.entry
        model = build_model(model_name, entry.num_classes, entry.channels, entry.image_size, seed=0, init=path).eval()
        model = self._placed(model, path, "give other weights")
        log.info(
            "%s: has no settings; the images are normalized with mean %s and standard deviation %s",
            path,
            self.normalization.mean,
            self.normalization.std,
        )
        state = {
            "model": model_name,
            **data_facts(self.full_train),
            "normalisation": self.normalization,
            "epoch": None,
            "settings": {},
        }
        return model, state


def _missing_epochs(folder: Path, last: int, missing: Collection[int], epochs: Collection[int]) -> dict[str, Any]:
    """Return the flags that make a training script write the missing epochs of a run.

    A run that ended too early is continued if its schedule does not depend on its length. A run that did not keep
    the epochs, or cannot continue, is retrained from scratch.

    Args:
        folder: The run's folder.
        last: The last epoch needed.
        missing: The epochs without a checkpoint.
        epochs: All epochs needed.
    """
    kept = ",".join(map(str, sorted(epochs)))
    try:
        stored = RunFiles(folder, folder).read_results()
        settings, done = stored.get("settings", {}), len(stored.get("history", []))
        planned, schedule = int(settings.get("epochs", 0)), SCHEDULES.get(settings.get("lr_sched"))
    except (FileError, TypeError, ValueError):  # training reports what is wrong
        planned, schedule, done = 0, None, 0
    flags = {"epochs": max(last, planned), "save_epochs": kept}
    if not done:
        return flags
    continues = min(missing) > done and schedule is not None and not (last > planned and schedule.depends_on_epochs)
    return {**flags, "resume" if continues else "overwrite": True}


@dataclass
class TrainingRun:
    """One model to train in a context, and the files of its run.

    Attributes:
        context: Device, processes and data.
        config: The run's settings.
        folders: The folders to write to.
        experiment: The run's name in paths.
        train: The training examples, with their original indices.
        more_settings: Settings in addition to those of context and config, such as the held-out split.
        end_scores: With ``config.measure_proxies``, scores of the trained model to measure; None to write only the
            recorded dynamics, without input gradients.
    """

    context: RunContext
    config: RunConfig
    folders: Folders
    experiment: str
    train: ImageSet
    more_settings: Mapping[str, Any] = field(default_factory=dict)
    end_scores: Sequence[str] | None = EndConfig().end_scores

    @property
    def files(self) -> RunFiles:
        """The run's files."""
        seed, folders = self.config.training.seed, self.folders
        return RunFiles(
            experiment_folder(folders.models_folder, self.experiment, seed),
            resume_folder(folders.resume_ckpts_folder, self.experiment, seed),
        )

    @property
    def dynamics_folder(self) -> Path:
        """The folder of the recorded dynamics and per-seed scores."""
        return dynamics_folder(self.folders.metrics_folder, self.experiment, self.config.training.seed)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the result."""
        data = dict(self.context.data_settings)
        data |= {"examples": len(self.train), "subset": data.pop("subset")}
        return {**self.config.as_dict(data, sync_bn=self.context.compute.sync_bn), **self.more_settings}

    def batches(self, images: ImageSet, **keywords: Any) -> Batches:
        """Iterate in batches of the run's size, seed and memory format; see ``RunContext.batches``."""
        last, config = model_entry(self.config.model.model).channels_last, self.config
        return self.context.batches(
            images, config.batch_size, seed=config.training.seed, channels_last=last, **keywords
        )

    def fit(self, *, weights: torch.Tensor | None = None, plan: EpochPlan | None = None) -> list[dict[str, Any]]:
        """Train the model, or continue training, and write the run's files.

        Also logs to the run's log file, until the next run replaces it.

        Args:
            weights: Sample weights, one per training example.
            plan: Chooses the examples of each epoch; None for all examples.

        Returns:
            The history: one record per epoch.
        """
        context, config, folder = self.context, self.config, self.dynamics_folder
        entry, name, training = context.entry, config.model.model, config.training
        log_file = self.folders.log_folder / self.experiment / f"seed_{training.seed}.log"
        if context.group.is_main_process:
            log_to(log_file)
            if config.measure_proxies:
                require_writable(folder)
        log.info(
            "%s, seed %d: %d training and %d test examples, %d epochs; log: %s",
            self.experiment,
            training.seed,
            len(self.train),
            len(context.test),
            training.epochs,
            log_file,
        )
        if model_entry(name).pretrain is not None and not (config.model.pretrained or config.model.init):
            log.info(
                "%s is initialized randomly; the SAMIS experiments start from ImageNet weights (--pretrained)",
                name,
            )
        model = build_model(
            name,
            entry.num_classes,
            entry.channels,
            entry.image_size,
            training.seed,
            config.model.pretrained,
            config.model.init,
        ).to(context.device, context.precision.dtype)
        if model_entry(name).channels_last:
            model = model.to(memory_format=torch.channels_last)
        if config.measure_proxies and self.end_scores and name not in MODELS:
            images = two_images(entry.channels, entry.image_size).to(context.device, context.precision.dtype)
            try:
                check_per_example(model, images)
            except ValueError as error:
                raise ArgumentError(
                    "end_scores", f": {error}; give --end_scores without values for model {name}"
                ) from error
        dynamics = None
        if config.measure_proxies:
            dynamics = Dynamics(self.train.total, entry.num_classes, context.device, config.input_gradients)
        augmentation = entry.training_augmentation(
            config.data_augmentation,
            alternate_flips=config.alternate_flips,
            cutout_holes=config.cutout_holes,
            cutout_length=config.cutout_length,
        )
        trainer = Trainer(
            model,
            self.batches(self.train, local=False, order="shuffled", augmentation=augmentation),
            self.batches(context.test, local=False),
            training,
            weights=weights,
            plan=plan,
            dynamics=dynamics,
            group=context.group,
            compile_model=context.compute.compile,
            sync_batchnorm=context.compute.sync_bn,
        )
        history = run_training(
            trainer,
            self.files,
            self.settings,
            model_description(name, context.full_train, context.normalization),
            resume=config.resume,
            overwrite=config.overwrite,
            save_epochs=config.save_epochs,
        )
        if dynamics is not None and context.group.is_main_process:
            remove_end_of_training_scores(folder)  # an earlier run's scores could be mistaken for this run's
            dynamics.write(folder / DYNAMICS_FILE, context.labels, self.settings, history)
            if self.end_scores is not None:
                batches = self.batches(self.train)
                write_end_of_training_scores(folder, model, batches, dynamics.arrays(), self.end_scores)
            log.debug("per-example dynamics and scores are in %s", folder)
        context.group.wait()
        return history

    def is_done(self) -> bool:
        """Whether a run with these settings has finished and written all its scores."""
        try:
            results = self.files.read_results()
            if not results.get("finished") or diff_settings(results["settings"], self.settings):
                return False
            if not self.config.measure_proxies:
                return True
            stored = read_dynamics(self.dynamics_folder / DYNAMICS_FILE)["settings"]
        except FileError:  # starting the run reports or replaces the file
            return False
        scores = self.end_scores
        complete = scores is None or has_end_of_training_scores(self.dynamics_folder, scores)
        return complete and not diff_settings(stored, self.settings)
