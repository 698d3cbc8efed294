"""Pre-trained models for selection methods, trained once and stored under a hash of their settings."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from src.artifacts.io import read_npz, write_npz
from src.artifacts.locks import lock
from src.artifacts.paths import LOCK_NAME, Folders, pretrain_experiment
from src.artifacts.store import DEFAULTS
from src.context import RunContext, TrainingRun
from src.coresets.config import PretrainConfig
from src.coresets.inputs import LastLayer
from src.devices import autocast_context
from src.errors import ArgumentError, FileError, TrainingError
from src.jacobians import SquaredNorms, check_per_example
from src.models import MODELS, FeatureReader, build_model, model_flag
from src.models.base import two_images
from src.training import DYNAMICS_FILE, RunConfig, TrainingConfig, read_dynamics

log = logging.getLogger(__name__)

# Pre-trained models made by older versions are still found: the key includes settings that have no effect, and
# excludes the images and the draw of test images. These are compared when a run's settings are.
_IN_KEY = {name: DEFAULTS[name] for name in ("rho", "adaptive", "hess_init", "lr_min")} | {"delta": None}
_NOT_IN_KEY = ("seed", "images", "test_fraction", "test_seed")

_SEED_STEP = 5  # seed difference between independently initialized models
_WEIGHT_DECAY = 5e-4
_LARGEST_FILE = 2**31  # bytes; larger features are not stored, and each run recomputes them


class PretrainedModel:
    """One pre-trained model: SGD with Nesterov momentum 0.9 and weight decay 5e-4 on all training examples in use.

    Args:
        context: Device and data.
        pretrain: Pre-training settings.
        run: The downstream run, which determines the model, seed, precision and augmentation.
        folders: Output folders.
        number: Index of the independently initialized model, from 0; its seed is ``seed + 5 number``.

    Attributes:
        settings: Everything that determines the model, except its seed.
        key: The hash of the settings.
    """

    def __init__(
        self, context: RunContext, pretrain: PretrainConfig, run: RunConfig, folders: Folders, number: int = 0
    ) -> None:
        config = RunConfig(
            run.model,
            TrainingConfig(
                seed=run.training.seed + _SEED_STEP * number,
                epochs=pretrain.coreset_pretrain_epochs,
                learning_rate=pretrain.coreset_pretrain_lr,
                lr_sched=pretrain.coreset_pretrain_lr_sched,
                weight_decay=_WEIGHT_DECAY,
                nesterov=True,
                precision=run.training.precision,
            ),
            batch_size=pretrain.coreset_pretrain_batch_size,
            data_augmentation=run.data_augmentation,
            cutout_holes=run.cutout_holes,
            cutout_length=run.cutout_length,
            resume=True,
            overwrite=True,  # the path contains a hash of the settings, so only a damaged run is retrained
            save_epochs="last",
            measure_proxies=True,
        )
        self._run = TrainingRun(context, config, folders, "", context.train, end_scores=None)
        facts = {**_IN_KEY, **self._run.settings}
        facts = {name: value for name, value in facts.items() if name not in _NOT_IN_KEY}
        if context.group.world > 1 and not context.compute.sync_bn:  # BatchNorm then sees smaller batches
            facts["processes"] = context.group.world
        self.settings, self.key = facts, settings_hash(facts)
        self._run.experiment = self._experiment(self.key)

    def _experiment(self, key: str) -> str:
        return pretrain_experiment(self._run.context.entry.name, self._run.config.model.model, key)

    def settings_of(self, key: str) -> dict[str, Any]:
        """The settings with this hash; empty if their model is not on disk."""
        if key == self.key:
            return self.settings
        try:
            stored = replace(self._run, experiment=self._experiment(key)).files.read_results()
        except FileError:
            stored = {}
        return {name: value for name, value in stored.get("settings", {}).items() if name != "seed"}

    @property
    def _checkpoint(self) -> Path:
        return self._run.files.checkpoints / "last.pt"

    def train(self) -> None:
        """Train the model, or resume its training, unless it is on disk. All processes of the group must call it."""
        run, group = self._run, self._run.context.group
        alone = lock(run.files.checkpoints / LOCK_NAME, "pre-training this model", wait=True)
        with alone if group.is_main_process else nullcontext():
            group.wait()  # until the main process has the lock
            if self._checkpoint.exists() and run.is_done():
                log.info("pre-training: found %s, seed %d, on disk", run.experiment, run.config.training.seed)
            else:
                group.wait()  # no process may start before all have seen that there is no finished model
                for name in ("logits", "embeddings", "gradient_norms"):
                    self._file(name).unlink(missing_ok=True)
                try:
                    run.fit()
                except ArgumentError as error:
                    if error.name != "batch_size":
                        raise
                    raise ArgumentError("coreset_pretrain_batch_size", error.text.lstrip()) from error
                except TrainingError as error:
                    raise TrainingError(f"pre-training: {error}; see --coreset_pretrain_lr") from error
            if group.is_main_process:
                run.files.remove_states()
            group.wait()

    def check_model(self, method: str, *, full_gradient: bool) -> None:
        """Check, before training, that a selection method can measure the model.

        Args:
            method: The method's name, for the message.
            full_gradient: Whether the method needs per-example gradients of all parameters instead of embeddings.

        Raises:
            ArgumentError: The model has none.
        """
        name, entry = self._run.config.model.model, self._run.context.entry
        if name in MODELS:
            return
        model = build_model(name, entry.num_classes, entry.channels, entry.image_size, seed=0)
        check, what = (check_per_example, "gradients") if full_gradient else (FeatureReader, "embeddings")
        try:
            check(model, two_images(entry.channels, entry.image_size))
        except ValueError as error:
            raise ArgumentError(
                "model", f"{model_flag(name)}: {method} needs {what}, but {error}; choose another model or method"
            ) from error

    def dynamics(self) -> dict[str, np.ndarray]:
        """The arrays recorded during pre-training, ``(epochs, n)``, in the order of the training examples."""
        arrays = read_dynamics(self._run.dynamics_folder / DYNAMICS_FILE)
        positions = self._run.train.indices.cpu().numpy()
        per_example = arrays["loss"].shape  # the test losses are recorded per class
        return {name: each[:, positions] for name, each in arrays.items() if np.shape(each) == per_example}

    def last_layer(self, *, embeddings: bool = False, gradient_norms: bool = False) -> LastLayer:
        """Return the model's last layer on the un-augmented training examples, from disk if it was stored earlier.

        Raises:
            TrainingError: A value is not finite.
        """
        wanted = ["logits", *["embeddings"] * embeddings, *["gradient_norms"] * gradient_norms]
        found = {name: self._stored(name) for name in wanted}
        if found["logits"] is None or (embeddings and found["embeddings"] is None):
            found.update(self._forward(embeddings))
        if gradient_norms and found["gradient_norms"] is None:
            found["gradient_norms"] = self._gradient_norms()
        ready = {name: values for name, values in found.items() if values is not None}
        for name, values in ready.items():
            if not values.isfinite().all():
                raise TrainingError(
                    f"the pre-trained model's {name.replace('_', ' ')} are not finite; try a smaller "
                    f"--coreset_pretrain_lr than {self._run.config.training.learning_rate:g}"
                )
        device = self._run.context.device
        return LastLayer(
            labels=self._run.train.labels.to(device), **{name: ready[name].to(device) for name in wanted}
        )

    # ------------------------------------------------------------------------------------------------- features

    def _file(self, name: str) -> Path:
        return self._run.files.checkpoints / f"{name}.npz"

    def _stored(self, name: str) -> torch.Tensor | None:
        try:
            values = read_npz(self._file(name))["values"]
        except (FileError, KeyError):
            return None
        right = values.dtype.kind == "f" and values.ndim == (1 if name == "gradient_norms" else 2)
        if name == "logits":
            right = right and values.shape[-1] == self._run.context.entry.num_classes
        return torch.from_numpy(values) if right and len(values) == len(self._run.train) else None

    def _store(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if values.numel() * values.element_size() <= _LARGEST_FILE:
            write_npz(self._file(name), values=values.numpy())
        return values

    def _model(self) -> torch.nn.Module:
        model, training = self._run.config.model.model, self._run.config.training
        try:
            return self._run.context.load_model(
                self._checkpoint, seed=training.seed, epoch=training.epochs, model=model, optimizer="sgd"
            )[0]
        except FileError as error:
            raise FileError(f"{error}; delete it to retrain the model") from error

    def _forward(self, embeddings: bool) -> dict[str, torch.Tensor]:
        """Compute logits ``(n, C)`` and embeddings ``(n, d)`` in one pass."""
        model, context = self._model(), self._run.context
        dtype = context.precision.dtype
        logits, features = [], []
        batches = self._run.batches(self._run.train)
        read = FeatureReader(model, next(iter(batches)).images[:2]) if embeddings else None
        with torch.inference_mode():
            for batch in tqdm(batches, desc="last layer", unit="batch", disable=None, dynamic_ncols=True):
                with autocast_context(context.device, context.precision):
                    # (b, d) and (b, C)
                    h, z = (None, model(batch.images)) if read is None else read(batch.images)
                logits.append(z.to(dtype).cpu())
                if h is not None:
                    features.append(h.to(dtype).cpu())
        found = {"logits": torch.cat(logits)}
        if embeddings:
            found["embeddings"] = torch.cat(features)
        # clone: inference-mode tensors cannot be used outside inference mode
        return {name: self._store(name, values.clone()) for name, values in found.items()}

    def _gradient_norms(self) -> torch.Tensor:
        """Compute the norm of each example's gradient in all parameters, ``(n,)``."""

        def losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(outputs.double(), labels, reduction="none")

        batches, parts = self._run.batches(self._run.train), []
        with SquaredNorms(self._model()) as squared_norms:
            for batch in tqdm(batches, desc="gradient norms", unit="batch", disable=None, dynamic_ncols=True):
                norms, _ = squared_norms(batch.images, batch.labels, losses)
                parts.append(norms[0, 0].sqrt().cpu())
        return self._store("gradient_norms", torch.cat(parts))


def settings_hash(settings: dict[str, Any]) -> str:
    """Hash settings to 16 hex digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
