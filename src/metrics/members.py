"""Train models on random subsets, side by side or one after another, and estimate memorization from them.

The estimator and the files of members are in ``memorization.py``. Shapes: m members, n training examples, t test
examples, C classes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from tqdm import tqdm

from src import training
from src.artifacts.io import label_hash, write_npz, write_with
from src.artifacts.locks import lock
from src.artifacts.paths import Folders, members_folder, memorization_path, split_experiment
from src.artifacts.store import check_consistent, check_score_target, read_record, write_scores
from src.datasets.files import write_score_table
from src.datasets.splits import rounded_share, validation_indices
from src.errors import ArgumentError, FileError, MeasurementError, TrainingError
from src.formatting import duration
from src.lazy import torch
from src.metrics.memorization import (
    BLOCK,
    MEMBER_SCORES,
    UNIT,
    MemberFiles,
    Members,
    MemorizationConfig,
    Results,
    Tally,
    included_examples,
    largest_error,
    member_seed,
    members_needed,
    spans,
)
from src.models import build_model, model_entry
from src.models.base import two_images
from src.optimizers import rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.context import RunContext
    from src.datasets import Batches, ImageSet, Normalization
    from src.training import RunConfig

log = logging.getLogger(__name__)

_EVALUATED = 256  # fewest examples per batch when members are measured
_PASS = 1 / 3  # cost of a forward pass, as a share of a forward and backward pass
_SPLITS = range(1, 11)
_LARGEST = 65504.0  # of float16
_INFLUENCES = 2**24  # influences computed at once
_OF_A_SPLIT = ("validation_split", "held_out", "examples", "measure_proxies")

Fit = Callable[[Sequence[int], np.ndarray], Members]


def train_members(
    files: MemberFiles,
    fit: Fit,
    masks: Callable[[int], np.ndarray],
    config: MemorizationConfig,
    *,
    together: int = 1,
) -> int:
    """Train the members that are not on disk yet, and write each when it is finished.

    Args:
        files: The folder.
        fit: Trains and measures members, given their numbers and the examples of each, bool ``(m, n)``.
        masks: Returns the examples of a member, bool ``(n,)``.
        config: Which members to train.
        together: How many members ``fit`` trains at once.

    Returns:
        The last member trained: the last one requested, unless the target standard error was reached earlier.
    """
    first, last = config.members
    tally, seconds, trained, began = None, 0.0, 0, time.perf_counter()
    with tqdm(total=last - first + 1, unit="member", disable=None, dynamic_ncols=True) as bar:
        for start in range((first - 1) // BLOCK * BLOCK + 1, last + 1, BLOCK):
            numbers = range(max(first, start), min(start + BLOCK, last + 1))
            with lock(files.path(start).with_suffix(".lock"), "training these members"):
                block = files.read(start)
                there = set() if block is None else set(block.numbers.tolist())
                chunks = [list(numbers[at : at + together]) for at in range(0, len(numbers), together)]
                for chunk in chunks:
                    missing = [number for number in chunk if number not in there]
                    if missing:
                        part = fit(missing, np.stack([masks(number) for number in missing]))
                        block = part if block is None else block + part
                        files.write(block)
                        trained += len(missing)
                        seconds = (time.perf_counter() - began) / trained
                        if trained == len(missing):
                            total = duration(seconds * (last - missing[0] + 1))
                            log.info("%s per member, about %s in total", duration(seconds), total)
                    rows = np.isin(block.numbers, chunk)
                    tally = tally or Tally(block.included.shape[1])
                    tally.add(block.included[rows], block.correct[rows])
                    bar.update(len(chunk))
                    error = tally.typical_error()
                    bar.set_postfix(standard_error=f"{error:.3f}")
                    before, done = (
                        (number - first) * 10 // (last - first + 1) for number in (chunk[0], chunk[-1] + 1)
                    )
                    if missing and before < done < 10:  # for log files, which have no progress bar
                        left = duration(seconds * (last - chunk[-1]))
                        log.info("member %d of %d; median standard error %.4f; %s left", chunk[-1], last, error, left)
                    whole = chunk[-1] % (config.unit or 1) == 0
                    if config.target_se is not None and error <= config.target_se and whole:
                        log.info("median standard error %.4f after member %d; stopping", error, chunk[-1])
                        return chunk[-1]
    return last


@dataclass(frozen=True)
class MemorizationRun:
    """The memorization of one data set and model: the members, and the files of scores.

    Attributes:
        context: Device, precision and data.
        run: How each member is trained. The seed is the base seed, from which those of the members are derived.
        config: Which members.
        folders: The folders of scores and, for ``from_splits``, of checkpoints and splits.
    """

    context: RunContext
    run: RunConfig
    config: MemorizationConfig
    folders: Folders

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels of the selected training examples, int64 ``(n,)``."""
        return self.context.train.labels.cpu().numpy()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that determine a member, given its number."""
        data = dict(self.context.data_settings)
        data |= {"examples": len(self.labels), "subset": data.pop("subset")}
        config = self.config
        return {
            **self.run.as_dict(data),
            "protocol": "subsets",
            "fraction": config.share,
            "complementary": config.complementary,
            **({} if config.folds is None else {"folds": config.folds}),
        }

    @property
    def files(self) -> MemberFiles:
        """The folder of members."""
        name, run = self.context.entry.name, self.run
        folder = members_folder(self.folders.metrics_folder, name, run.model.model, run.training.seed)
        return MemberFiles(folder, self.settings, run.overwrite)

    def masks(self, member: int) -> np.ndarray:
        """The training examples of a member, bool ``(n,)``."""
        config = self.config
        return included_examples(
            self.labels, config.fraction, self.run.training.seed, member, config.complementary, config.folds
        )

    @cached_property
    def why_not_together(self) -> str | None:
        """Why members cannot be trained side by side, or None if they can."""
        from src.training.ensemble import ENSEMBLE_OPTIMIZERS, why_not_vectorised

        settings = self.run.training
        if settings.optimizer not in ENSEMBLE_OPTIMIZERS or settings.nesterov:
            return f"{settings.optimizer}{' with Nesterov momentum' * settings.nesterov} is not supported"
        if self.context.precision.autocast is not None:
            return f"precision {self.context.compute.precision} is not supported"
        return why_not_vectorised(self._model(settings.seed), two_images(*self.context.train.image_shape[:2]))

    @cached_property
    def together(self) -> int:
        """The number of members trained side by side.

        Raises:
            ArgumentError: Training side by side is requested but not possible.
        """
        from src.training.ensemble import vectorised_is_faster

        config, run = self.config, self.run
        if config.ensemble == "vectorised" and self.why_not_together:
            raise ArgumentError("ensemble", f"vectorised: {self.why_not_together}; give auto or sequential")
        faster = config.ensemble == "vectorised" or (
            config.ensemble == "auto"
            and not self.why_not_together
            and vectorised_is_faster(self._model(run.training.seed), self.context.device, run.batch_size)
        )
        return config.ensemble_size // 2 * 2 if faster else 1

    @property
    def cost(self) -> float:
        """The cost of one member in epoch-equivalents: 1 is a forward and backward pass over the training set."""
        settings, size = self.run.training, rounded_share(len(self.labels), self.config.share)
        passes = 2 if settings.optimizer == "sam" else 1
        return settings.epochs * passes * size / len(self.context.labels) + self._cost_of_measuring

    @property
    def _cost_of_measuring(self) -> float:
        """The cost of the predictions of one model on the training and test set."""
        return _PASS * (len(self.labels) + len(self.context.test)) / len(self.context.labels)

    def train(self) -> int:
        """Train the members, or join those of other folders. Return the last one."""
        config, files = self.config, self.files
        first, last = config.members
        self.check_targets(self.settings, {"members": last})
        size = rounded_share(len(self.labels), config.share)
        if not 0 < size < len(self.labels):
            name = "subset" if config.complementary else "fraction"
            raise ArgumentError(
                name, f": each member would be trained on {size} of {len(self.labels)} examples; give another value"
            )
        for source in config.merge or ():
            name, run = self.context.entry.name, self.run
            inside = members_folder(source, name, run.model.model, run.training.seed)
            source = inside if inside.is_dir() else source
            log.info("%s: %d members added", source, files.merge(source))
        if config.merge is not None:
            if len(missing := files.missing(last)):
                raise FileError(f"{files.folder}: has no member {spans(missing)}; train these, or merge more folders")
            return last
        wanted = np.arange(first, last + 1)
        left = np.intersect1d(wanted, files.missing(last))
        log.info(
            "%d members, %d already trained; %s, on %d of %d examples each; cost %.4g epoch-equivalents; with "
            "%d members, the standard error of memorization is at most about %.3f",
            len(wanted),
            len(wanted) - len(left),
            f"{min(self.together, max(len(left), 1))} side by side" if self.together > 1 else "one after another",
            size,
            len(self.labels),
            len(left) * self.cost,
            last,
            largest_error(last, config.share),
        )
        return train_members(files, self.fit, self.masks, config, together=self.together)

    def fit(self, numbers: Sequence[int], included: np.ndarray) -> Members:
        """Train members and measure them.

        Args:
            numbers: Their numbers.
            included: The examples of each, bool ``(m, n)``.

        Returns:
            The measured members.

        Raises:
            TrainingError: A loss is not finite.
        """
        if self.together == 1:
            parts = [self._fit_one(number, mask) for number, mask in zip(numbers, included, strict=True)]
            return sum(parts[1:], parts[0])
        from src.training.ensemble import Ensemble, stack_batches

        settings = self.run.training
        models = [self._model(member_seed(settings.seed, number)) for number in numbers]
        ensemble = Ensemble(
            models[0],
            len(models),
            l2=settings.weight_decay,
            optimizer=settings.optimizer,
            momentum=settings.momentum,
            initial=[model.state_dict() for model in models],
        )
        batches = [self._batches(number, mask) for number, mask in zip(numbers, included, strict=True)]
        steps = max(len(each) for each in batches)
        for epoch in range(1, settings.epochs + 1):
            own = [each.epoch(epoch) for each in batches]
            schedule = (settings.lr_sched, epoch, settings.epochs, settings.learning_rate, settings.lr_min)
            for step in range(steps):
                learning_rate = rate(*schedule, (step + 0.5) / steps)  # the rate halfway through the step
                images, labels, weights, active = stack_batches([next(each, None) for each in own])
                ensemble.step(images, labels, weights, learning_rate, active)
        if not bool((finite := ensemble.finite()).all()):
            raise TrainingError(
                f"member {numbers[int((~finite).nonzero()[0])]}: its weights are not finite; try a lower learning "
                f"rate (it is {settings.learning_rate:g})"
            )
        return self._measure(numbers, included, ensemble.logits)

    def _model(self, seed: int) -> nn.Module:
        """A model with its initial weights, on the device."""
        entry, model = self.context.entry, self.run.model
        built = build_model(
            model.model, entry.num_classes, entry.channels, entry.image_size, seed, model.pretrained, model.init
        ).to(self.context.device, self.context.precision.dtype)
        return built.to(memory_format=torch.channels_last) if model_entry(model.model).channels_last else built

    def _batches(self, number: int, mask: np.ndarray) -> Batches:
        """The training batches of a member."""
        context, run = self.context, self.run
        augmentation = context.entry.training_augmentation(
            run.data_augmentation,
            alternate_flips=run.alternate_flips,
            cutout_holes=run.cutout_holes,
            cutout_length=run.cutout_length,
        )
        return context.batches(
            context.train.subset(torch.from_numpy(np.flatnonzero(mask))),
            run.batch_size,
            channels_last=model_entry(run.model.model).channels_last,
            order="shuffled",
            augmentation=augmentation,
            seed=member_seed(run.training.seed, number),
        )

    def _fit_one(self, number: int, mask: np.ndarray) -> Members:
        """Train and measure one member with the training loop."""
        settings = replace(self.run.training, seed=member_seed(self.run.training.seed, number))
        model = self._model(settings.seed)
        # the loop evaluates the test set after every epoch; one example is enough, since nothing reads the result
        tested = self.context.batches(self.context.test.subset(torch.zeros(1, dtype=torch.int64)), 1)
        trainer = training.Trainer(model, self._batches(number, mask), tested, settings)
        for epoch in range(1, settings.epochs + 1):
            trainer.train_epoch(epoch)
        return self._measure([number], mask[None], partial(_logits, model.eval(), settings.precision))

    def _measure(
        self,
        numbers: Sequence[int],
        included: np.ndarray,
        predict: Callable[[Tensor], Tensor],
        normalization: Normalization | None = None,
    ) -> Members:
        """Measure trained members on the training and test set.

        Args:
            numbers: Their numbers.
            included: The examples that each was trained on, bool ``(m, n)``.
            predict: Maps images ``(b, c, h, w)`` to logits ``(m, b, C)`` in evaluation mode.
            normalization: The normalization of the images; None for that of the context.
        """
        context = self.context
        outside = torch.from_numpy(~included).to(context.device)
        rows: dict[str, list[Tensor]] = {"correct": [], "probability": [], "test_correct": [], "test_margin": []}
        left_out: list[Tensor] = []

        def predictions(images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
            size, last = max(self.run.batch_size, _EVALUATED), model_entry(self.run.model.model).channels_last
            for batch in context.batches(images, size, normalization=normalization, channels_last=last):
                with torch.inference_mode():
                    log_p = predict(batch.images).log_softmax(-1)  # (m, b, C)
                if not bool(log_p.isfinite().all()):
                    raise TrainingError(
                        f"member {spans(np.asarray(numbers))}: predictions are not finite; try a lower learning rate "
                        f"(it is {self.run.training.learning_rate:g})"
                    )
                yield log_p, batch.labels.expand(len(log_p), -1)[..., None]

        start = 0
        for log_p, labels in predictions(context.train):
            stop = start + labels.shape[1]
            rows["correct"].append(log_p.argmax(-1) == labels[..., 0])
            rows["probability"].append(log_p.gather(-1, labels)[..., 0].exp().half())
            if self.config.out_of_sample:
                units = (log_p.exp() * UNIT).round().to(torch.int32)
                left_out.append((units * outside[:, start:stop, None]).sum(0))
            start = stop
        for log_p, labels in predictions(context.test):
            rows["test_correct"].append(log_p.argmax(-1) == labels[..., 0])
            margin = log_p.gather(-1, labels)[..., 0] - log_p.scatter(-1, labels, -math.inf).logsumexp(-1)
            rows["test_margin"].append(margin.clamp(-_LARGEST, _LARGEST).half())
        joined = {name: torch.cat(parts, dim=1).cpu().numpy() for name, parts in rows.items()}
        sums = torch.cat(left_out).cpu().numpy().astype(np.uint32) if left_out else None
        return Members(np.asarray(numbers), included, **joined, left_out=sums)

    # -------------------------------------------------------------------------------------------------- results

    def split_members(self, seed: int) -> tuple[Members, dict[str, Any], float | None]:
        """Measure the ten models that ``train_split.py`` trained with a seed.

        Returns:
            The models as members 1 to 10, the training settings that they share, and the cost of training and
            measuring them, in epoch-equivalents; None if a checkpoint does not record it.

        Raises:
            FileError: A checkpoint is missing, or from another run or other data, or its settings differ.
        """
        context, run, name = self.context, self.run, self.context.entry.name
        settings, model, parts, files, costs = run.training, run.model.model, [], [], []
        indices = context.train.indices.cpu().numpy()
        for split in _SPLITS:
            flags = {"model": model, "optimizer": settings.optimizer, "lr_sched": settings.lr_sched}
            (path,) = context.find_checkpoints(
                self.folders.models_folder,
                split_experiment(model, name, settings.optimizer, settings.lr_sched, split),
                seed,
                [settings.epochs],
                "train_split.py",
                **flags,
                samis_validation_split_index=split,
            ).values()
            held_out = validation_indices(
                self.folders.splits, name, seed, split, context.labels, context.entry.num_classes
            )
            network, state = context.load_model(
                path, **flags, seed=seed, epoch=settings.epochs, validation_split=split, held_out=label_hash(held_out)
            )
            if state["settings"].get("subset") != context.data_settings["subset"]:
                raise FileError(
                    f"{path}: was trained on a different subset of {name}; give the same --subset and --exclude"
                )
            files.append((path, state["settings"]))
            costs.append(state.get("cost"))
            predict = partial(_logits, network.eval(), settings.precision)
            included = ~np.isin(indices, held_out)[None]
            parts.append(self._measure([split], included, predict, state["normalisation"]))
        free = training.free_epochs(settings.lr_sched)
        remedy = "train all splits with the same settings"
        check_consistent(files, (*_OF_A_SPLIT, *free), what="was trained differently from", remedy=remedy)
        shared = training.training_facts(files[0][1])
        shared = {name: value for name, value in shared.items() if name not in _OF_A_SPLIT}
        cost = None if None in costs else sum(costs) + len(costs) * self._cost_of_measuring
        return sum(parts[1:], parts[0]), shared, cost

    def check_targets(self, settings: dict[str, Any], sources: dict[str, Any]) -> None:
        """Refuse to replace scores with different settings, or from more members, unless overwriting is allowed.

        Args:
            settings: See ``Results``.
            sources: See ``Results``.

        Raises:
            FileError: Such scores exist.
        """
        for score in MEMBER_SCORES:
            path = score.path(self.folders.metrics_folder, self.context.entry.name)
            record = {"mode": score.name, "settings": settings, **sources}
            there = read_record(path).get("members") if path.exists() and not self.run.overwrite else None
            members = record.pop("members", None)
            if None not in (members, there) and there > members:
                found = f"was estimated from {there} members"
                raise FileError(f"{path}: {found}; give --members {there} or more, or --overwrite")
            check_score_target(path, record, overwrite=self.run.overwrite, only=record)

    def results(self, last: int) -> Results:
        """Estimate memorization from members 1 to ``last``, or from the models of all ten splits.

        Raises:
            FileError: Members or models are missing, or differ in settings.
        """
        config, total = self.config, len(self.labels)
        if config.from_splits is None:
            return Results.of(
                self.files.blocks(last),
                total,
                config.unit,
                cost=last * self.cost,
                settings=self.settings,
                sources={"members": last},
            )
        parts, shared, costs = [], [], []
        for seed in tqdm(config.from_splits, unit="seed", disable=None):
            members, settings, seed_cost = self.split_members(seed)
            parts.append(members)
            shared.append((f"seed {seed}", settings))
            costs.append(seed_cost)
        check_consistent(shared)
        return Results.of(
            parts,
            total,
            len(_SPLITS),
            cost=None if None in costs else sum(costs),
            settings={
                **self.context.data_settings,
                "protocol": "splits",
                "epochs": self.run.training.epochs,
                **shared[0][1],
            },
            sources={"seeds": list(config.from_splits)},
        )

    def write(self, results: Results) -> list[Path]:
        """Write the estimates, the out-of-sample probabilities, and the two scores.

        Returns:
            The paths of the scores and of the other files.

        Raises:
            FileError: There are scores with different settings, which may not be replaced.
            MeasurementError: Some examples are in all members, or in none. Everything but the scores is written.
        """
        self.check_targets(results.settings, results.sources)
        context, folder, name = self.context, self.folders.metrics_folder, self.context.entry.name
        total, indices = len(context.labels), context.train.indices.cpu().numpy()

        def spread(values: np.ndarray) -> np.ndarray:
            """Arrange values of the selected examples by original index; NaN or 0 elsewhere."""
            full = np.full((total, *values.shape[1:]), np.nan if values.dtype.kind == "f" else 0, values.dtype)
            full[indices] = values
            return full

        about = {"label_hash": context.label_hash, "settings": json.dumps(results.settings, sort_keys=True)}
        estimates = {"mem": results.correct, "mem_prob": results.probability}
        scores = {mode: found.value for mode, found in estimates.items()} | {"out_prob": -results.probability.outside}
        arrays = {"members_in": spread(results.counts[1]), "members_out": spread(results.counts[0])}
        for mode, found in estimates.items():
            arrays |= {mode: spread(found.value), f"{mode}_error": spread(found.error)}
            arrays |= {f"{mode}_in": spread(found.inside), f"{mode}_out": spread(found.outside)}
        written = [write_npz(memorization_path(folder, f"estimates_{name}.npz"), **arrays, **about)]
        if self.config.out_of_sample and results.left_out is not None:
            path = memorization_path(folder, f"out_of_sample_{name}.npz")
            probabilities = spread(results.left_out)
            written.append(write_npz(path, probabilities=probabilities, labels=context.labels, **about))
        elif self.config.out_of_sample:
            log.warning(
                "out-of-sample probabilities are not written: some members were trained with --no-out_of_sample, or "
                "share a file with members after the last one requested"
            )
        lacking = np.count_nonzero((results.counts == 0).any(axis=0))
        if lacking:
            needed = max(members_needed(len(indices), self.config.share), self.config.members[1] + 1)
            raise MeasurementError(
                f"{lacking} of {len(indices)} examples were trained on by all members or by none, so they have no "
                f"estimate; train about {needed} members (--members {needed}), or use --complementary; "
                f"estimates of the others are in {written[0]}"
            )
        settings, written_scores = self.run.training, []
        for score in MEMBER_SCORES:
            path = score.path(folder, name)
            record = {
                "dataset": name,
                "model": self.run.model.model,
                "mode": score.name,
                **results.sources,
                "epoch": settings.epochs,
                "label_hash": context.label_hash,
                "data_hash": context.full_train.digest,
                "settings": results.settings,
                "orientation": "high is atypical",
                "negated": score.negated,
                "scaling": "none",
                **({} if results.cost is None else {"cost": round(results.cost, 3)}),
            }
            if score.name in estimates and (error := estimates[score.name].median_error) is not None:
                record["median_standard_error"] = error
            values = spread(scores[score.name])
            written_scores += [
                write_scores(path, values, record)[0],
                write_score_table(path, values, context.full_train.examples),
            ]
        return written_scores + written

    def write_influence(self, last: int) -> Path:
        """Write the influence of every training example on the correctness of every test example.

        ``influence_{dataset}.npy`` is float16 ``(t, n)``, NaN for training examples that are in all members or in
        none. With a subset, the columns are its examples in ascending order. It is computed and written in blocks of
        test examples. ``np.load(path, mmap_mode="r")`` reads a part.

        Args:
            last: The last member.
        """
        masks, tested = [], []
        for part in self.files.blocks(last):
            masks.append(part.included)
            tested.append(part.test_correct)
        included, correct = np.concatenate(masks).astype(np.float32), np.concatenate(tested).astype(np.float32)
        inside = included.sum(0)  # (n,)
        count, shape = len(included), (correct.shape[1], included.shape[1])
        rows = max(1, _INFLUENCES // shape[1])

        def write(file: BinaryIO) -> None:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in tqdm(range(0, shape[0], rows), desc="influence", unit="block", disable=None):
                part = correct[:, start : start + rows]
                both = part.T @ included  # (rows, n): how often correct with the example
                with np.errstate(invalid="ignore", divide="ignore"):
                    found = both / inside - (part.sum(0)[:, None] - both) / (count - inside)
                file.write(found.astype("<f2").tobytes())

        path = memorization_path(self.folders.metrics_folder, f"influence_{self.context.entry.name}.npy")
        return write_with(path, write, interruptible=True)


def _logits(model: nn.Module, precision: str, images: Tensor) -> Tensor:
    """Logits ``(1, b, C)`` of a single model."""
    return training.logits_of(model, images, precision)[None]
