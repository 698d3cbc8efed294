"""What compute_ntk.py does with its flags: kernels and velocities, group by group, found on disk or computed."""

import logging
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.artifacts import (
    differences,
    file_digest,
    label_hash,
    ntk_run,
    read_checkpoint,
    require_writable,
    standard_experiment,
)
from src.curvature.choices import CHECKED
from src.curvature.ntk import forecast, kernel_bytes, ntk_kernel, relative_error, velocity
from src.curvature.ntk_files import KernelFiles
from src.datasets import parse_subset
from src.devices import available_memory
from src.errors import FileError, FlagError
from src.formatting import duration, gib
from src.trained import TrainedNetworks
from src.training import only_schedule, training_facts

log = logging.getLogger(__name__)


class Kernels:
    """The kernels and velocities of one script's run.

    Args:
        args: The flags.
        networks: The data, and the trained networks.
        ranked: Indices in the order of their scores.
        scores: All scores by index.
        epochs: The epochs t.
        lowers: Ranks of the groups' first examples.
    """

    def __init__(
        self,
        args: Namespace,
        networks: TrainedNetworks,
        ranked: np.ndarray,
        scores: np.ndarray,
        epochs: list[int],
        lowers: list[int],
    ) -> None:
        self.args, self.networks, self.ranked, self.scores = args, networks, ranked, scores
        self.seeds, self.lowers = list(dict.fromkeys(args.seeds)), lowers
        name = networks.train.entry.name
        pattern = standard_experiment(args.model, name, args.optimizer, "*")
        lr_sched = only_schedule(args.models_folder, pattern, self.seeds[0], args.lr_sched) or "const"
        experiment = standard_experiment(args.model, name, args.optimizer, lr_sched)
        flags = {"model": args.model, "optimizer": args.optimizer, "lr_sched": lr_sched}
        self.asked = {"optimizer": args.optimizer, "lr_sched": lr_sched, "validation_split": None}
        wanted = sorted({e for t in epochs for e in (t, t + 1)})
        self.paths = {
            (seed, epoch): path
            for seed in self.seeds
            for epoch, path in networks.find_all(experiment, seed, wanted, **flags).items()
        }
        self.training = self._training()
        self.digests = {place: file_digest(path) for place, path in self.paths.items()}
        run = ntk_run(args.model, args.optimizer, lr_sched)
        metric = args.ntk_chosen_metric
        self.files = KernelFiles(args.ntk_folder, name, run, metric, args.m_samples, args.overwrite)
        subset = None
        if args.subset is not None:
            subset = label_hash(parse_subset(args.subset, networks.train.total, networks.train.labels.cpu().numpy()))
        self.common = {
            "dataset": name,
            **networks.facts,
            "subset": subset,
            "m_samples": args.m_samples,
            "ntk_classes": args.ntk_classes,
            "projection_dim": args.projection_dim,
            "projection_seed": args.projection_seed if args.projection_dim is not None else None,
            "precision": args.precision,
        }
        self.per_example = networks.train.entry.num_classes if args.ntk_classes == "all" else 1
        require_writable(args.ntk_folder)
        self._loaded: dict[tuple[int, int], tuple[nn.Module, dict[str, Any]]] = {}
        self._announced = False
        self._sketch_error: float | None = None

    def _training(self) -> dict[str, Any]:
        """How the models were trained, but for the seed: they are averaged over seeds.

        Raises:
            FileError: Two were trained with different settings.
        """
        first = None
        for path in self.paths.values():
            settings = read_checkpoint(path).get("settings")
            facts = training_facts(settings if isinstance(settings, dict) else {})  # else loading it says so
            first = first or (path, facts)
            if found := differences(first[1], facts):
                raise FileError(
                    f"{path}: was not trained as {first[0]} was: {', '.join(found)}; train all seeds with the same "
                    "settings, or choose others"
                )
        return first[1]

    def velocities(self, seed: int, epoch: int, bar: tqdm) -> dict[int, float]:
        """The velocities of all groups between an epoch and the next, written one by one as they come."""
        settings = {
            **self.common,
            "metric": self.args.ntk_chosen_metric,
            "training": self.training,
            "ranking": label_hash(self.ranked),
            "checkpoints": [self.digests[seed, epoch], self.digests[seed, epoch + 1]],
        }
        groups = self.files.read_velocities(seed, epoch, settings)
        for lower in self.lowers:
            if str(lower) not in groups:
                started = time.perf_counter()
                found = self.velocity(seed, epoch, lower)
                chosen = self.scores[self.group(lower)]
                group = {
                    "velocity": found,
                    "mean_score": float(chosen.mean()),
                    "percentile": 100 * (lower + len(chosen) / 2) / len(self.ranked),
                    "seconds": time.perf_counter() - started,
                    "sketch_error": self._sketch_error,
                }
                groups = self.files.add_velocities(seed, epoch, settings, {str(lower): group})
            bar.update()
        if not self.files.velocities(seed, epoch).exists():  # an interruption came between it and its json
            self.files.add_velocities(seed, epoch, settings, {})
        return {lower: groups[str(lower)]["velocity"] for lower in self.lowers}

    def velocity(self, seed: int, epoch: int, lower: int) -> float:
        """One group's velocity between an epoch and the next."""
        kernels = [self.kernel(seed, e, lower) for e in (epoch, epoch + 1)]
        try:
            return velocity(*kernels)
        except ValueError as error:
            raise FileError(f"{self.paths[seed, epoch]}: {error}; train it anew") from error

    def group(self, lower: int) -> np.ndarray:
        """The indices of a group's examples."""
        return self.ranked[lower : lower + self.args.m_samples]

    def kernel(self, seed: int, epoch: int, lower: int) -> np.ndarray:
        """A group's kernel, from its file or computed, and stored unless it is not to be kept."""
        indices = self.group(lower)
        settings = {**self.common, "indices": label_hash(indices), "checkpoint": self.digests[seed, epoch]}
        if self.files.has_kernel(seed, epoch, lower, settings):
            return self.files.read_kernel(seed, epoch, lower, len(indices) * self.per_example)
        network, state = self.network(seed, epoch)
        images, labels = self.examples(indices, state)
        if not self._announced:
            self.announce(self.paths[seed, epoch], network, images, labels)
        started = time.perf_counter()
        found = self.compute(network, images, labels)
        if not np.isfinite(found).all():
            raise FileError(
                f"{self.paths[seed, epoch]}: its kernel is not finite; train it anew with a lower --learning_rate"
            )
        if self.args.keep_kernels:
            facts = {"seconds": time.perf_counter() - started, "example_indices": indices.tolist()}
            self.files.write_kernel(seed, epoch, lower, found, settings, facts)
        return found

    def compute(self, network: nn.Module, images: Tensor, labels: Tensor, *, exact: bool = False) -> np.ndarray:
        """The kernel of some examples by the flags, or ``exact``."""
        args = self.args
        return ntk_kernel(
            network,
            images,
            labels,
            args.ntk_classes,
            projection_dim=None if exact else args.projection_dim,
            seed=args.projection_seed,
            memory_mb=args.memory_mb,
        )

    def network(self, seed: int, epoch: int) -> tuple[nn.Module, dict[str, Any]]:
        """A network and its description; the last two are kept."""
        if (seed, epoch) not in self._loaded:
            path = self.paths[seed, epoch]
            network, state = self.networks.load(path, self.args.model, **self.asked, seed=seed, epoch=epoch)
            trained_on = state["settings"].get("subset")
            if trained_on is not None and trained_on != self.common["subset"]:
                raise FileError(f"{path}: was trained on a subset of the data; give the same --subset")
            while len(self._loaded) > 1:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[seed, epoch] = network, state
        return self._loaded[seed, epoch]

    def examples(self, indices: np.ndarray, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and labels of some examples, as the network saw them in training, un-augmented."""
        chosen = self.networks.train.subset(torch.from_numpy(indices))
        batch = next(iter(self.networks.batches(chosen, len(indices), state)))
        return batch.images, batch.labels

    def announce(self, path: Path, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Say what a kernel takes, and how large a sketch's error is; refuse what does not fit.

        Args:
            path: The network's checkpoint, for messages.
            network: The network on which it is tried.
            images: A group's images.
            labels: Their labels.

        Raises:
            FlagError: The kernel does not fit the memory; the message names cheaper options.
        """
        args, self._announced = self.args, True
        free = available_memory(self.networks.device)
        size, per_example = len(images), self.per_example
        least = kernel_bytes(size * per_example)
        if free is not None and least > free:
            fits = int((free / kernel_bytes(1)) ** 0.5 // per_example)
            cheaper = (
                ""
                if per_example == 1
                else (f"--ntk_classes=true_label or sum_logits ({gib(kernel_bytes(size))}), or ")
            )
            raise FlagError(
                f"--m_samples {size}: a kernel of {size * per_example} rows takes {gib(least)}, and {gib(free)} are "
                f"free; give {cheaper}--m_samples={max(fits // 2, 1)}"
            )
        try:
            told = forecast(network, images, labels, size, args.ntk_classes, projection_dim=args.projection_dim,
                            memory_mb=args.memory_mb)  # fmt: skip
        except ValueError as error:
            raise FileError(f"{path}: {error}") from error
        log.info(
            "a kernel of %d examples has %d rows and takes about %s and %s (Psi, which is not formed: %s)",
            size, told.rows, gib(told.peak_bytes), duration(told.seconds), gib(told.psi_bytes),
        )  # fmt: skip
        if args.keep_kernels:
            log.info(
                "kernels take %s on the disk, each %s",
                gib(len(self.paths) * len(self.lowers) * 4 * told.rows**2),
                gib(4 * told.rows**2),
            )
        if free is not None and told.peak_bytes > free:
            log.warning(
                "%s are free: give a smaller --memory_mb, --m_samples, or --ntk_classes=true_label", gib(free)
            )
        if args.projection_dim is not None:
            few = slice(0, CHECKED)
            exact = self.compute(network, images[few], labels[few], exact=True)
            self._sketch_error = relative_error(exact, self.compute(network, images[few], labels[few]))
            log.info(
                "a sketch of %d numbers is off by %.2g of the kernel's norm (measured on %d examples)",
                args.projection_dim, self._sketch_error, len(images[few]),
            )  # fmt: skip
