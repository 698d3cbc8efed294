"""Pre-trained networks of the selection methods: trained once, kept under a hash of all that determines them."""

import hashlib
import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from src.artifacts import (
    DEFAULTS,
    claim_path,
    dynamics_folder,
    lock,
    pretrain_experiment,
    read_npz,
    write_npz,
)
from src.coresets import LastLayer
from src.devices import autocast_context
from src.errors import FileError, TrainingError
from src.jacobians import SquaredNorms
from src.models.base import eval_mode
from src.session import Session
from src.training import DYNAMICS_FILE, data_facts, load_model, read_dynamics

log = logging.getLogger(__name__)

# Settings without an effect that names of folders of pre-trained models contain all the same, and the images, which
# they do not: models of older versions are found. Images are compared when a run's settings are.
_IN_KEY = {name: DEFAULTS[name] for name in ("rho", "adaptive", "hess_init", "lr_min")} | {"delta": None}

SEED_STEP = 5  # between the seeds of independently initialised networks
WEIGHT_DECAY = 5e-4
LARGEST_FILE = 2**31  # bytes; larger features are computed anew by each run that needs them


class PretrainedNetwork:
    """One pre-trained network: SGD with Nesterov momentum 0.9 and weight decay 5e-4 on all training examples.

    Args:
        session: The session whose data and flags (``--coreset_pretrain_*``, augmentation, model) it follows.
        number: Which of the independently initialised networks, from 0: its seed is ``seed + 5 number``.
    """

    def __init__(self, session: Session, number: int = 0) -> None:
        args = session.args
        self.session = session.variant(
            seed=args.seed + SEED_STEP * number,
            epochs=args.coreset_pretrain_epochs,
            learning_rate=args.coreset_pretrain_lr,
            lr_sched=args.coreset_pretrain_lr_sched,
            batch_size=args.coreset_pretrain_batch_size,
            optimizer="sgd",
            momentum=0.9,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
            lr_min=0.0,
            rho=0.05,
            adaptive=False,
            delta=None,
            hess_init=0.1,
            save_epochs="last",
            measure_proxies=True,
            resume=True,
            overwrite=True,  # of these settings only, by the hash in its path: what is damaged is made anew
        )
        self.train = session.train
        facts = {**_IN_KEY, **self.session.settings(self.train)}
        facts = {name: value for name, value in facts.items() if name not in ("seed", "images")}
        if session.group.world > 1 and not args.sync_bn:  # BatchNorm then normalises smaller batches
            facts["processes"] = session.group.world
        self.settings, self.key = facts, settings_hash(facts)
        self.experiment = pretrain_experiment(session.entry.name, args.model, self.key)

    @property
    def lock(self) -> Path:
        """The lock file of whoever trains or scores this network."""
        args = self.session.args
        return claim_path(args.models_folder, self.experiment, args.seed)

    def settings_of(self, key: str) -> dict[str, Any]:
        """What another key stands for, from the results of its network; empty where they are not on disk."""
        experiment = pretrain_experiment(self.session.entry.name, self.session.args.model, key)
        try:
            stored = self.session.files(experiment).read_results().get("settings", {})
        except FileError:
            return {}
        return {name: value for name, value in stored.items() if name != "seed"}

    @property
    def is_trained(self) -> bool:
        """Whether the finished network and its dynamics are on disk."""
        return self._checkpoint.exists() and self.session.is_done(self.experiment, self.train, final_scores=False)

    @property
    def _checkpoint(self) -> Path:
        return self.session.files(self.experiment).checkpoints / "last.pt"

    def train_or_load(self) -> None:
        """Train the network, or go on with it, unless it is on disk. All processes of the group must call."""
        if self.is_trained:
            log.info("pre-training: %s, seed %d, is on disk", self.experiment, self.session.args.seed)
            self._forget_states()
            return
        self.session.group.wait()  # nobody starts before everybody has seen that there is something to do
        for name in _QUANTITIES:
            self._file(name).unlink(missing_ok=True)
        self.session.run(self.experiment, self.train, final_scores=False)
        self._forget_states()

    def _forget_states(self) -> None:
        if self.session.group.is_main_process:
            self.session.files(self.experiment).remove_states()

    def dynamics(self) -> dict[str, np.ndarray]:
        """The arrays recorded in pre-training, ``(epochs, n)`` in the order of the training examples."""
        args = self.session.args
        arrays = read_dynamics(dynamics_folder(args.metrics_folder, self.experiment, args.seed) / DYNAMICS_FILE)
        places = self.train.indices.cpu().numpy()
        return {name: values[:, places] for name, values in arrays.items() if getattr(values, "ndim", 0) == 2}

    def last_layer(self, *, embeddings: bool = False, gradient_norms: bool = False) -> LastLayer:
        """The network's last layer on the un-augmented training examples, from disk where it was stored before."""
        wanted = ["logits", *["embeddings"] * embeddings, *["gradient_norms"] * gradient_norms]
        found = {name: self._stored(name) for name in wanted}
        if found["logits"] is None or (embeddings and found["embeddings"] is None):
            found.update(self._forward(embeddings))
        if gradient_norms and found["gradient_norms"] is None:
            found["gradient_norms"] = self._gradient_norms()
        for name, values in found.items():
            if values is not None and not values.isfinite().all():
                raise TrainingError(
                    f"the pre-trained network's {name.replace('_', ' ')} are not finite; "
                    f"a smaller --coreset_pretrain_lr may help (it is {self.session.args.learning_rate:g})"
                )
        device = self.session.device
        return LastLayer(
            found["logits"].to(device),
            self.train.labels.to(device),
            *(found[name].to(device) if name in wanted else None for name in ("embeddings", "gradient_norms")),
        )

    # ------------------------------------------------------------------------------------------------- features

    def _file(self, name: str) -> Path:
        return self.session.files(self.experiment).checkpoints / f"{name}.npz"

    def _stored(self, name: str) -> torch.Tensor | None:
        try:
            values = read_npz(self._file(name))["values"]
        except (FileError, KeyError):
            return None
        right = values.dtype.kind == "f" and values.ndim == (1 if name == "gradient_norms" else 2)
        if name == "logits":
            right = right and values.shape[-1] == self.session.entry.num_classes
        return torch.from_numpy(values) if right and len(values) == len(self.train) else None

    def _store(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if values.numel() * values.element_size() <= LARGEST_FILE:
            write_npz(self._file(name), values=values.numpy())
        return values

    def _network(self) -> torch.nn.Module:
        try:
            args = self.session.args
            asked = {"model": args.model, "optimizer": "sgd", "seed": args.seed, "epoch": args.epochs}
            model, _ = load_model(self._checkpoint, {**data_facts(self.session.whole_train), **asked})
        except FileError as error:
            raise FileError(f"{error}; delete it, and it is trained anew") from error
        return model.to(self.session.device)

    def _forward(self, embeddings: bool) -> dict[str, torch.Tensor]:
        """Logits ``(n, C)`` and embeddings ``(n, d)``, in one pass."""
        model, session = self._network(), self.session
        logits, features = [], []
        batches = session.batches(self.train, alone=True)
        with torch.inference_mode(), eval_mode(model):
            for batch in tqdm(batches, desc="last layer", unit="batch", disable=None, dynamic_ncols=True):
                with autocast_context(session.device, session.precision):
                    h = model.features(batch.images)  # (b, d)
                    z = model.head(h)  # (b, C)
                logits.append(z.to(session.precision.dtype).cpu())
                if embeddings:
                    features.append(h.to(session.precision.dtype).cpu())
        found = {"logits": torch.cat(logits)}
        if embeddings:
            found["embeddings"] = torch.cat(features)
        # copies: tensors of inference mode cannot be used outside it
        return {name: self._store(name, values.clone()) for name, values in found.items()}

    def _gradient_norms(self) -> torch.Tensor:
        """Norms of each example's gradient in all parameters, ``(n,)``."""
        batches, parts = self.session.batches(self.train, alone=True), []
        with SquaredNorms(self._network()) as squared_norms:
            for batch in tqdm(batches, desc="gradient norms", unit="batch", disable=None, dynamic_ncols=True):
                norms, _ = squared_norms(batch.images, batch.labels, _losses)
                parts.append(norms[0, 0].sqrt().cpu())
        return self._store("gradient_norms", torch.cat(parts))


_QUANTITIES = ("logits", "embeddings", "gradient_norms")


def settings_hash(settings: dict[str, Any]) -> str:
    """16 hex digits that stand for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _losses(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.double(), labels, reduction="none")


def train_networks(session: Session, count: int) -> list[PretrainedNetwork]:
    """The first ``count`` pre-trained networks of a session, trained where they are not on disk yet.

    All processes of the group must call. If another start of a script trains one of them, this one waits for it.

    Args:
        session: The session.
        count: How many independently initialised networks.
    """
    networks = [PretrainedNetwork(session, number) for number in range(count)]
    group = session.group
    for network in networks:
        held = lock(network.lock, "pre-training this network", wait=True) if group.is_main_process else nullcontext()
        with held:
            group.wait()  # for the main process's lock
            network.train_or_load()
            group.wait()
    return networks
