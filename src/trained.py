"""What the scripts of loss geometry share: from parsed flags to data, and to trained networks that belong to them."""

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from src.artifacts import experiment_folder, label_hash
from src.datasets import Batches, ImageSet, load_dataset
from src.devices import PRECISIONS, prepare, resolve_device
from src.errors import FileError
from src.training import (
    data_facts,
    find_checkpoint,
    image_facts,
    load_model,
    missing_epochs,
    training_command,
)


class TrainedNetworks:
    """The data set of a script's flags, and the networks that were trained on it.

    Args:
        args: The flags of ``add_data_flags`` and ``add_compute_flags``, ``models_folder``.

    Attributes:
        train: The whole training part, on the device.
        test: The whole test part, on the device.
        labels: Hash of the training part's labels.
        facts: What settings say of the data: labels, images, decoding.
        device: Where to compute.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.device = resolve_device(args.device)
        self.precision = PRECISIONS[args.precision]
        prepare(self.device, self.precision, args.deterministic)
        parts = load_dataset(args.dataset, args.datasets_folder, image_size=args.image_size, channels=args.channels)
        self.labels = label_hash(parts[0].labels.numpy())
        self.facts = {"labels": self.labels, **image_facts(parts[0])}
        self.train, self.test = (part.to(self.device) for part in parts)

    def find(
        self, experiment: str, seed: int, epoch: int, script: str | None = "train_full.py", **flags: Any
    ) -> Path:
        """The checkpoint of one epoch of a run; see ``find_all``."""
        return self.find_all(experiment, seed, [epoch], script, **flags)[epoch]

    def find_all(
        self,
        experiment: str,
        seed: int,
        epochs: Collection[int],
        script: str | None = "train_full.py",
        **flags: Any,
    ) -> dict[int, Path]:
        """The checkpoints of several epochs of a run.

        Args:
            experiment: The run's name.
            seed: Its seed.
            epochs: The epochs, from 1.
            script: What trains it, for the message; None where that is unknown.
            flags: The other flags of that script.

        Returns:
            Epoch to path.

        Raises:
            FileError: One is missing; the message names all that are, and the command that makes them.
        """
        folder = self.args.models_folder
        paths = {epoch: find_checkpoint(folder, experiment, seed, epoch) for epoch in epochs}
        missing = sorted(epoch for epoch, path in paths.items() if path is None)
        if missing:
            listed = ", ".join(map(str, missing))
            line = f"{folder}: no checkpoint of epoch {listed}, seed {seed} for {experiment}"
            if script is not None:
                own = {"dataset": self.args.dataset, **flags, "seed": seed}
                more = missing_epochs(experiment_folder(folder, experiment, seed), max(epochs), missing, epochs)
                line += f"; make it with: {training_command(script, {**own, **more})}"
            raise FileError(line)
        return paths

    def load(self, path: str | Path, model: str | None = None, **asked: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The network of a checkpoint, on the device, in the precision's type and in eval mode.

        Args:
            path: The checkpoint.
            model: The architecture that it must be of; None for any.
            asked: What else is known of it, such as ``seed`` and ``epoch``; see ``load_model``.

        Returns:
            The network, and the checkpoint without its weights.

        Raises:
            FileError: The file is missing or damaged, of another architecture, run or epoch than asked for or of
                other data, or a weight is not finite.
        """
        network, state = load_model(path, {**data_facts(self.train), **asked})
        if model is not None and state["model"] != model:
            raise FileError(f"{path}: is of the network {state['model']}, not {model}; give --model={state['model']}")
        for name, value in network.state_dict().items():
            if not value.isfinite().all():
                raise FileError(f"{path}: {name} is not finite; train it anew with a lower --learning_rate")
        # gradients of gradients and per-example ones are taken in the plain layout
        return network.to(self.device, self.precision.dtype), state

    def batches(
        self, images: ImageSet, batch_size: int, state: dict[str, Any], channels_last: bool = False
    ) -> Batches:
        """Un-augmented batches of a part of the data, in order, as the network of ``state`` saw them.

        Args:
            images: A part of ``train`` or ``test``.
            batch_size: Examples at a time.
            state: The checkpoint's description.
            channels_last: Whether to lay images out with the channels last in memory.
        """
        return Batches(
            images,
            batch_size,
            normalisation=state["normalisation"],
            device=self.device,
            dtype=self.precision.dtype,
            channels_last=channels_last,
        )
