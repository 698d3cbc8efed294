"""Code shared by the experiments: data, model, base training, variances, and resumable results."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpe.config import CLASS_COVARIANCES, SHUFFLE_ORDERS, ExperimentConfig
from mpe.laplace_torch import LaplaceTorchVariances
from mpe.posterior import EPS, Predictions, laplace_posterior, optimizer_posterior, predict
from src.artifacts.io import file_digest, read_checkpoint, read_pickle, require_writable, write_pickle
from src.artifacts.paths import (
    Folders,
    checkpoint_name,
    experiment_folder,
    mpe_experiment,
    pickle_path,
    resume_folder,
)
from src.artifacts.store import acting_settings, check_settings_match, load_result
from src.cli import log_to
from src.context import RunContext
from src.datasets import Batches, DataConfig, ImageSet, empty_images
from src.devices import ComputeConfig
from src.errors import ArgumentError, FileError
from src.jacobians import (
    DensePosterior,
    DenseVariances,
    OutputVariances,
    Posterior,
    check_dense,
    gradient_covariances,
    gram_matrix,
    output_variances,
)
from src.models import build_model, model_entry
from src.models.base import eval_mode, load_weights
from src.training import (
    RunFiles,
    Trainer,
    TrainingConfig,
    evaluate,
    model_description,
    run_training,
)

log = logging.getLogger(__name__)

LOSS_CAP = -math.log(EPS)  # nats
DATA_AND_MODEL = (  # settings shared by base training and retraining
    "dataset",
    "image_size",
    "channels",
    "labels",
    "images",
    "decoding",
    "subset",
    "examples",
    "model",
    "initialization",
    "base_shuffle",
)
_FREE = (  # flags that affect neither a result nor its name
    "device",
    "resume",
    "overwrite",
    "datasets_folder",
    "cache_folder",
    "decode",  # its effect is recorded as "decoding"
    "exclude",  # its effect is recorded as "subset"
    "test_fraction",  # its effect is recorded as "subset" and "images"
    "test_seed",
    "models_folder",
    "metrics_folder",
    "log_folder",
    "resume_ckpts_folder",
    "pickles_folder",
    "memory_mb",
    "bs_jacs",
    "ensemble_size",
    "ensemble",
    "retrain_part",
    "iblr_backend",
    "write_scores",
)


def forms_of(class_cov: str) -> tuple[str, ...]:
    """The forms of class covariance that one pass with ``class_cov`` can compute, including ``class_cov`` itself."""
    return ("diag",) if class_cov == "diag" else CLASS_COVARIANCES


def of_two_classes(images: ImageSet, classes: Sequence[int]) -> ImageSet:
    """Select the examples of two classes, with labels 0 and 1 in the given order. Original indices are kept."""
    first, second = (images.labels == c for c in classes)
    found = images.subset((first | second).nonzero().squeeze(1))
    found.labels = (found.labels == classes[1]).long()
    found.class_names = [images.class_names[c] for c in classes]
    found.entry = replace(images.entry, num_classes=2)
    return found


class Experiment:
    """One experiment: its model, base training, and the variances of its predictions.

    Args:
        config: The settings shared by all experiments.
        data: The data set, and which of its training examples to use.
        compute: Device, precision, and other compute settings.
        folders: The folders for data, checkpoints, resume states, and logs.
        kind: The suffix of the result file, after the experiment's name.
        flags: The flags, to be recorded in the result file.
        classes: Two classes, for a binary problem with only their examples; None for all classes.

    Attributes:
        context: Device and data, with normalization ``"mpe"``.
        record: The flags as plain values.
        train: The training examples.
        normalization: The normalization of the images: ``"mpe"``, or that of the checkpoint.
        count: N, the number of training examples.
        files: Checkpoints and resume states of the base run.
        model: The model: newly built, trained, or with the weights of ``config.checkpoint``.

    Raises:
        ArgumentError: The model does not support the data, or one of ``classes`` has no examples.
        FileError: The checkpoint is damaged, or does not fit the model or the data.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        data: DataConfig,
        compute: ComputeConfig,
        folders: Folders,
        kind: str,
        flags: Mapping[str, Any],
        classes: Sequence[int] | None = None,
    ) -> None:
        log_to(folders.log_folder / "mpe" / f"{config.name_exp}_{kind}.log")
        self.config, self.kind = config, kind
        self.context = RunContext(data, compute, folders.datasets_folder, seed=config.seed, normalization="mpe")
        record = {**asdict(compute), **flags}
        self.record = {name: str(value) if isinstance(value, Path) else value for name, value in record.items()}
        if classes is not None:
            self._keep_classes(classes)
        self.train = self.context.train
        self.count = len(self.train)
        run = mpe_experiment(config.name_exp, kind)
        self.files = RunFiles(
            experiment_folder(folders.models_folder, run, config.seed),
            resume_folder(folders.resume_ckpts_folder, run, config.seed),
        )
        self.normalization = self.context.normalization
        self.model = self.build()  # refuses data that the model does not support
        if config.checkpoint is None:
            self.record.pop("checkpoint", None)  # as in the files of older versions
        else:
            self.record["checkpoint"] = file_digest(config.checkpoint)
            # leave-one-out estimates are about the examples that the model was trained on
            examples = {
                "examples": self.count,
                "subset": self.context.data_settings["subset"],
                "validation_split": None,
            }
            model, state = self.context.load_file(config.checkpoint, config.model, **examples)
            self.model, self.normalization = self._laid_out(model), state["normalisation"]
        require_writable(config.pickles_folder)

    def _keep_classes(self, classes: Sequence[int]) -> None:
        """Restrict training and test set to two classes."""
        context, given = self.context, " ".join(map(str, classes))
        if len(set(classes)) != 2:
            raise ArgumentError("classes", f"{given}: give two different classes")
        for images in (context.train, context.test):
            if missing := [c for c in classes if not (images.labels == c).any()]:
                raise ArgumentError(
                    "classes",
                    f"{given}: the {images.part} examples used of {context.entry.name} have none of class "
                    f"{missing[0]}; its classes are 0 to {context.entry.num_classes - 1}",
                )
        full = of_two_classes(context.full_train, classes)
        chosen = context.train is not context.full_train
        context.train = of_two_classes(context.train, classes) if chosen else full
        context.full_train, context.test = full, of_two_classes(context.test, classes)

    def build(self) -> nn.Module:
        """Build the untrained model, which depends only on the seed."""
        entry, config = self.context.entry, self.config
        model = build_model(config.model, entry.num_classes, entry.channels, entry.image_size, config.seed)
        return self._laid_out(model)

    def _laid_out(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the precision and memory format of training."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.context.device, self.context.precision.dtype, memory_format=layout)

    @property
    def channels_last(self) -> bool:
        """Whether the model and its images use the channels-last memory format, which trains faster on a CPU."""
        return model_entry(self.config.model).channels_last

    def batches(
        self, images: ImageSet, size: int, order: str = "sequential", channels_last: bool | None = None
    ) -> Batches:
        """Create batches without augmentation, in the model's memory format unless ``channels_last`` is given."""
        last = self.channels_last if channels_last is None else channels_last
        return self.context.batches(
            images, size, order=order, seed=self.config.seed, channels_last=last, normalization=self.normalization
        )

    def prepared(self, images: ImageSet) -> Tensor:
        """Normalize all images ``(n, c, h, w)`` once, for repeated training.

        Raises:
            ValueError: There are no images.
        """
        found: Tensor | None = None
        start = 0
        for batch in self.batches(images, 1000):
            if found is None:  # allocated in full, since concatenating parts would need twice the memory
                found = empty_images(batch.images, len(images))
            stop = start + len(batch.images)
            found[start:stop] = batch.images
            start = stop
        if found is None:
            raise ValueError("there are no images to normalize")
        return found

    # ------------------------------------------------------------------------------------------ results

    def settings(self) -> dict[str, Any]:
        """All settings that determine the result."""
        return {
            **acting_settings({name: value for name, value in self.record.items() if name not in _FREE}),
            **model_entry(self.config.model).settings,
            **self.context.data_settings,
            "examples": self.count,
        }

    def data_and_model(self) -> dict[str, Any]:
        """The settings of the data and the model, which base training and retraining share."""
        settings = self.settings()
        return {name: settings[name] for name in DATA_AND_MODEL if name in settings}

    def result(self, kind: str | None = None, **settings: Any) -> "Result":
        """Open a result file of this experiment, by default of its own kind, with additional ``settings``."""
        config = self.config
        path = pickle_path(config.pickles_folder, config.name_exp, kind or self.kind)
        more = {"resume": config.resume, "overwrite": config.overwrite}
        return Result(path, self.record, {**self.settings(), **settings}, **more)

    # ------------------------------------------------------------------------------------------ training

    def train_base(
        self,
        *,
        measure: Callable[[Trainer], None] = lambda trainer: None,
        after_step: Sequence[Callable[[Trainer, int, int], None]] = (),
    ) -> Trainer:
        """Train ``self.model`` on all examples. Training can be resumed. The weights of a checkpoint are not trained.

        The objective is ``mean CE + delta / (2 N) |w|^2``. The L2 term is implemented as weight decay delta / N for
        sgd and adam, as decoupled weight decay for adamw, and as the prior for iblr.

        Args:
            measure: Called after each epoch, before its state is written.
            after_step: Called after each step.

        Returns:
            The trainer, which has the optimizer and the history; for a checkpoint, one record with test metrics.
        """
        config, training = self.config, self._training
        trainer = Trainer(
            self.model,
            self.batches(self.train, config.bs, SHUFFLE_ORDERS[config.base_shuffle]),
            self.batches(self.context.test, max(config.bs, 1000)),
            training,
            compile_model=self.context.compute.compile,
            after_step=after_step,
            test_loss_cap=LOSS_CAP,
        )
        if config.checkpoint is not None:
            accuracy, loss = self.test_metrics()
            trainer.history.append({"epoch": 1, "test_accuracy": accuracy, "test_loss": loss})
            return trainer
        run_training(
            trainer,
            self.files,
            self._base_settings,
            model_description(config.model, self.context.full_train, self.normalization),
            resume=config.resume,
            overwrite=config.overwrite,
            save_epochs="last",
            measure=measure,
        )
        return trainer

    @property
    def _training(self) -> TrainingConfig:
        """The settings of the base training."""
        config = self.config
        prior = {"delta": config.delta} if config.optimizer == "iblr" else {"weight_decay": config.delta / self.count}
        return TrainingConfig(
            epochs=config.epochs,
            optimizer=config.optimizer,
            learning_rate=config.lr,
            lr_sched="cosine",
            lr_min=config.lrmin,
            hess_init=config.hess_init,
            iblr_backend=config.iblr_backend,
            seed=config.seed,
            precision=self.context.precision.name,
            **prior,
        )

    @property
    def _base_settings(self) -> dict[str, Any]:
        """All settings that determine the base model."""
        return {**self._training.as_dict(), **self.data_and_model(), "batch_size": self.config.bs}

    def load_base(self) -> None:
        """Load the weights of a finished base training into ``self.model``, without writing to its folder.

        Several processes can do this at once. The weights of a checkpoint are already loaded.

        Raises:
            FileError: The base training is missing, unfinished or damaged, or has different settings.
        """
        if self.config.checkpoint is not None:
            return
        results, last = self.files.read_results(), self.files.checkpoints / checkpoint_name("last")
        if not results.get("finished"):
            raise FileError(f"{last}: the base model is not trained yet; train it first")
        check_settings_match(self.files.results, results["settings"], self._base_settings)
        try:
            load_weights(self.model, read_checkpoint(last)["model_state"])
        except (ValueError, RuntimeError, LookupError) as error:
            raise FileError(
                f"{last}: its weights do not fit the model {self.config.model}; train it again"
            ) from error

    def cost(self, trainer: Trainer) -> float | None:
        """Cost of the base training and of predicting with variances once, in epoch-equivalents.

        Variances need a forward pass and a backward pass per class. A Laplace posterior also needs its GGN: a forward
        pass and a backward pass per class but one. A forward pass counts as 1/3, a backward pass as 2/3.

        Returns:
            The cost relative to one pass over the full training set; None if an older version trained some epochs.
        """
        classes = self.context.entry.num_classes
        passes = (1 + 2 * classes) / 3
        if not self.record.get("optim_var"):
            passes += (1 + 2 * (classes - 1)) / 3
        return None if trainer.cost is None else trainer.cost + passes * self.count / self.train.total

    def test_metrics(self, model: nn.Module | None = None) -> tuple[float, float]:
        """Compute the test accuracy and mean NLL of a model, by default ``self.model``."""
        batches = self.batches(self.context.test, max(self.config.bs, 1000))
        loss, accuracy = evaluate(
            model or self.model, batches, precision=self.context.precision.name, loss_cap=LOSS_CAP
        )
        return accuracy, loss

    # ------------------------------------------------------------------------------------------ variances

    def laplace(
        self,
        delta: float,
        *,
        time: float | None = None,
        model: nn.Module | None = None,
        images: ImageSet | None = None,
    ) -> Predictions:
        """Predict on the training examples, with variances of a Laplace posterior.

        Args:
            delta: Prior precision.
            time: Training time; see ``laplace_posterior``.
            model: The model; by default ``self.model``.
            images: The training examples; by default all.
        """
        config, model = self.config, self._channels_first(model or self.model)
        batches = self.batches(images or self.train, config.bs_jacs, channels_last=False)
        more: dict[str, Any] = {"structure": config.var_version, "memory_mb": config.memory_mb}
        if config.laplace_backend == "laplace-torch":
            engine = LaplaceTorchVariances(model, batches, delta, full=config.class_cov != "diag", **more)
            return predict(engine, batches, progress=True)
        posterior = laplace_posterior(model, batches, delta, time=time, progress=True, **more)
        with self._engine(model, posterior) as engine:
            return predict(engine, batches, progress=True)

    def group_covariances(self, delta: float, groups: Tensor) -> Tensor:
        """Compute covariances of the logit difference of two classes, under a Laplace posterior.

        The exact GGN (``ggn``) is not formed, so the number of parameters is not limited, but N^2 numbers are needed:
        with the Jacobian J and ``K = J J^T``, ``J (J^T L J + delta I)^-1 J^T = (K L + delta I)^-1 K``.

        Args:
            delta: Prior precision.
            groups: Positions in the training set, int64 ``(G, K)``.

        Returns:
            Float64 ``(G, K, K)``, between the members of each group: ``grad f_M^T S grad f_M`` of Eq. 14.
        """

        def difference(logits: Tensor, labels: Tensor) -> Tensor:
            return logits[:, 1] - logits[:, 0]

        config, model = self.config, self._channels_first(self.model)
        batches = self.batches(self.train, config.bs_jacs, channels_last=False)
        if config.var_version == "ggn":
            images = torch.cat([batch.images for batch in batches])
            with torch.no_grad(), eval_mode(model):
                p = torch.cat([difference(model(part), part) for part in images.split(config.bs_jacs)]).sigmoid()
            gram = gram_matrix(model, images, difference, memory_mb=config.memory_mb).double()
            system = gram * (p * (1.0 - p)).double()
            system.diagonal().add_(delta)
            found = torch.linalg.solve(system, gram).cpu()
            return found[groups.unsqueeze(2), groups.unsqueeze(1)]
        more: dict[str, Any] = {"structure": config.var_version, "memory_mb": config.memory_mb}
        posterior = laplace_posterior(model, batches, delta, progress=True, **more)
        assert isinstance(posterior, Posterior)  # not the exact GGN
        blocks = []
        for group in groups:
            members = self.batches(self.train.subset(group), config.bs_jacs, channels_last=False)
            output = (members, difference)
            blocks.append(gradient_covariances(model, posterior, output, output, memory_mb=config.memory_mb))
        return torch.stack(blocks)

    def from_optimizer(self, trainer: Trainer) -> Predictions:
        """Predict on the training examples, with variances of the posterior in the optimizer's state (iblr, adam)."""
        posterior = optimizer_posterior(
            trainer.optimizer, trainer.model, num_examples=self.count, delta=self.config.delta
        )
        with self._engine(self._channels_first(trainer.model), posterior) as engine:
            return predict(engine, self.batches(self.train, self.config.bs_jacs, channels_last=False), progress=True)

    def _channels_first(self, model: nn.Module) -> nn.Module:
        """The model or a copy in channels-first format, which makes per-example gradients up to 1.6 times faster."""
        return copy.deepcopy(model).to(memory_format=torch.contiguous_format) if self.channels_last else model

    def _engine(self, model: nn.Module, posterior: Posterior | DensePosterior) -> OutputVariances | DenseVariances:
        config = self.config
        return output_variances(model, posterior, full=config.class_cov != "diag", memory_mb=config.memory_mb)

    def check_variances(self, delta: float = 1.0, *, dense: bool = True) -> None:
        """Compute the variances of two examples, in order to refuse unsupported models before training.

        This project's engine does not need a posterior for this check: it refuses the same models with a unit
        covariance.

        Args:
            delta: Prior precision.
            dense: Whether the exact GGN, if requested, is formed, which limits the number of parameters.
        """
        two = self.train.subset(torch.arange(min(2, self.count)))
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            if dense and self.config.var_version == "ggn":
                check_dense(sum(p.numel() for p in parameters.values()))
            if self.config.laplace_backend == "laplace-torch":
                self.laplace(delta, images=two)
                return
            model = self._channels_first(self.model)
            posterior = Posterior({name: torch.ones_like(p) for name, p in parameters.items()})
            with self._engine(model, posterior) as engine:
                engine(next(iter(self.batches(two, 2, channels_last=False))).images)
        except ValueError as error:
            raise ArgumentError("model", f"{self.config.model}: {error}") from error


class Result:
    """One result file, written incrementally.

    Args:
        path: The pickle's path.
        record: The flags, stored under the key ``args``.
        settings: All settings that determine the result, stored under the key ``settings``.
        resume: Whether to continue from an existing result.
        overwrite: Whether to replace a result with different settings.

    Attributes:
        stored: The existing content to continue from; empty when starting from scratch.
        replaces: Whether an existing file, damaged or with different settings, will be replaced.

    Raises:
        FileError: The file has a result with different settings, or is damaged.
    """

    def __init__(
        self, path: Path, record: Mapping[str, Any], settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.path, self.record, self.settings = path, dict(record), dict(settings)
        found = load_result(path, settings, _read, overwrite=overwrite)
        self.replaces = found is None and path.exists()
        self.stored: dict[str, Any] = found if found and resume else {}

    def write(self, **content: Any) -> Path:
        """Write the result: plain values and numpy arrays by name, with ``args`` and ``settings``."""
        return write_pickle(self.path, {**content, "args": self.record, "settings": self.settings})

    def rows_before(self, rows: Mapping[int, Any], wanted: Iterable[int], now: int, what: str) -> dict[int, Any]:
        """Select the rows measured before ``now``, the epoch or step at which training continues.

        Args:
            rows: The measurements, by epoch or step.
            wanted: The epochs or steps to measure at.
            now: The current epoch or step.
            what: A description of a row, for the message.

        Raises:
            FileError: A row is missing.
        """
        missing = [time for time in sorted(wanted) if time < now and time not in rows]
        if missing:
            raise FileError(
                f"{self.path}: has no {what} {missing[0]}, but training is already past it; start without --resume"
            )
        return {time: row for time, row in rows.items() if time < now}


def _read(path: Path) -> tuple[Any, Mapping[str, Any] | None]:
    """Read a result and the settings that it records."""
    found = read_pickle(path)
    settings = found.get("settings") if isinstance(found, dict) else None
    return found, settings if isinstance(settings, dict) else None
