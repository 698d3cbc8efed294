"""Makes and stores a selection from its settings, and trains on it."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts.io import file_digest, read_npz, write_npz
from src.artifacts.paths import LOCK_NAME, Folders, coreset_experiment, selection_path
from src.artifacts.store import acting_settings, check_same_data, checked_array, load_result, parse_settings
from src.context import RunContext, TrainingRun
from src.coresets.config import PretrainConfig, SelectionConfig
from src.coresets.infobatch import InfoBatchPlan
from src.coresets.inputs import (
    GREEDY_LIMIT,
    CandidateGroup,
    Selection,
    SelectionInputs,
    greedy_gains,
    make_groups,
)
from src.coresets.pretraining import PretrainedModel, settings_hash
from src.errors import ArgumentError, FileError
from src.metrics import SCORES, Proxy
from src.metrics.dynamics import WINDOW, Windows, training_accuracy
from src.metrics.proxy import score_folders
from src.metrics.score import warn_if_not_learned
from src.training import RunConfig, RunFiles

log = logging.getLogger(__name__)

_LARGEST = 1e30  # maximum weight; training computes in float32
_SHARED = (
    "dataset",
    "labels",
    "images",
    "decoding",
    "subset",
    "test_fraction",
    "test_seed",
    "seed",
)  # already in the run's own settings


def read_selection(path: Path, context: RunContext) -> tuple[Selection, dict[str, Any], float]:
    """Read a selection file: ``indices``, and if present ``weights`` and metadata.

    Returns:
        The selection as positions among the training examples in use, its settings (empty if unknown), and the
        selection time in seconds (NaN if unknown).

    Raises:
        FileError: The file is missing or damaged, or does not match the data.
    """
    arrays, full = read_npz(path), context.full_train
    stored = {name: str(arrays[name]) for name in ("label_hash", "data_hash") if name in arrays}
    check_same_data(
        path, stored, "create it with this run's --dataset", label_hash=context.label_hash, data_hash=full.digest
    )
    remedy = "create it with select_coreset.py (convert a mask with numpy's flatnonzero)"
    indices = checked_array(path, arrays, "indices", kinds="iu", remedy=remedy)
    if indices.min() < 0 or indices.max() >= full.total:
        raise FileError(f"{path}: an index is not from 0 to {full.total - 1}; create the file again")
    if len(np.unique(indices)) < len(indices):
        raise FileError(f"{path}: has duplicate indices; list each index once")
    arrays = {"weights": np.ones(len(indices)), "seconds": np.array(np.nan), **arrays}
    weights = checked_array(path, arrays, "weights", kinds="fiu", length=len(indices))
    if (weights < 0).any() or not 0 < weights.max() <= _LARGEST:
        raise FileError(
            f"{path}: weights must be from 0 to {_LARGEST:g} with at least one above 0; create the file again"
        )
    seconds = checked_array(path, arrays, "seconds", ndim=0, kinds="fiu", finite=False)
    order, names = np.argsort(indices), context.train.indices.cpu().numpy()
    outside = indices[order][~np.isin(indices[order], names)]
    if len(outside):
        raise FileError(
            f"{path}: has example {outside[0]}, which --subset or --exclude leaves out; give the flags of the file"
        )
    positions = np.searchsorted(names, indices[order]).astype(np.int64)
    settings = parse_settings(path, arrays["settings"]) if "settings" in arrays else {}
    return Selection(positions, weights[order].astype(np.float64)), settings, float(seconds)


@dataclass
class CoresetRun:
    """One selection, newly made or read from a file, and the training of a new model on it.

    Attributes:
        context: Device, data and processes.
        config: The method and the amount to keep, or the selection file.
        pretrain: Pre-training settings.
        run: The downstream run; a selection depends on its model, seed, precision and augmentation.
        folders: Output folders.
        out: Where to store the selection, if not in the run's folder.
    """

    context: RunContext
    config: SelectionConfig
    pretrain: PretrainConfig
    run: RunConfig
    folders: Folders
    out: Path | None = None

    @cached_property
    def experiment(self) -> str:
        """The run's experiment name in paths."""
        config, name, share = self.config, self.config.coreset_func, self.config.share
        if config.selection is not None:
            name = f"selection_{file_digest(config.selection)[:8]}"
            share = len(read_selection(config.selection, self.context)[0].indices)
        return coreset_experiment(name, config.coreset_mode, share, self.run.model.model, self.context.entry.name)

    @cached_property
    def path(self) -> Path:
        """Path of the selection file."""
        if self.config.selection is not None:
            return self.config.selection
        return self.out or selection_path(self.folders.models_folder, self.experiment, self.run.training.seed)

    @cached_property
    def models(self) -> list[PretrainedModel]:
        """The pre-trained models that the method needs, not yet trained."""
        needs = self.config.method.needs
        count = self.pretrain.coreset_networks if needs.ensemble else int(needs.pretraining)
        return [PretrainedModel(self.context, self.pretrain, self.run, self.folders, n) for n in range(count)]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the selection."""
        config = self.config
        if config.selection is not None:
            return {"selection_file": file_digest(config.selection)}
        data = self.context.data_settings
        per_class = config.shots is not None or config.shots_up_to is not None
        facts: dict[str, Any] = {
            "coreset_func": config.coreset_func,
            "coreset_fraction": None if per_class else config.coreset_fraction,
            "shots": config.shots,
            "shots_up_to": config.shots_up_to,
            "per_class": config.per_class,
            "seed": self.run.training.seed,
            **{name: data[name] for name in data if name not in ("image_size", "channels")},
            **asdict(config.options),
        }
        if "selection_subsample" in facts:  # store what "auto" resolves to
            facts["selection_subsample"] = config.options.epsilon(self.groups()) or "exact"
        if config.method.needs.stored:
            facts["scores"] = file_digest(self._proxy.path)
        if self.models:
            facts["pretraining"] = self.models[0].key
            facts["coreset_networks"] = len(self.models)
        return acting_settings(facts)

    def check(self) -> None:
        """Check for errors that would stop the run later, before computing anything.

        Raises:
            ArgumentError: The fraction does not fit the data, or pre-training is too short for the method.
            FileError: The stored score or the selection file is missing or does not match the data.
        """
        config = self.config
        if config.selection is not None:
            read_selection(config.selection, self.context)
            return
        self.groups()
        needs, epochs = config.method.needs, self.pretrain.coreset_pretrain_epochs
        if needs.stored:
            self._stored_scores()
        if needs.embeddings:
            self.models[0].check_model(config.coreset_func, full_gradient=self._gradient == "full")
        fewest = SCORES[needs.reduced].fewest_epochs if needs.reduced else 1
        if epochs < fewest:
            raise ArgumentError(
                "coreset_pretrain_epochs",
                f"{epochs}: too few for {config.coreset_func}, which compares epochs; use at least {fewest}",
            )
        if config.coreset_mode == "few_shot" and "coreset_mode" not in config.method.option_names:
            log.warning(
                "--coreset_mode few_shot: has no effect on %s, which follows its paper",
                config.coreset_func,
            )
        if self.dynamic and not config.per_class:
            log.warning("--per_class: has no effect on %s, which compares all examples together", config.coreset_func)

    def groups(self) -> list[CandidateGroup]:
        """The groups of candidates and their budgets."""
        config, train = self.config, self.context.train
        return make_groups(
            train.labels.cpu().numpy(),
            self.context.entry.num_classes,
            fraction=config.coreset_fraction,
            shots=config.shots,
            shots_up_to=config.shots_up_to,
            per_class=config.per_class,
            class_names=train.class_names,
        )

    def stored(self, *, overwrite: bool = False) -> tuple[Selection, float] | None:
        """Return the stored selection and its time in seconds, if it has the same settings; None if there is none.

        Args:
            overwrite: Whether to treat a file with different settings, or a damaged one, as missing.

        Raises:
            FileError: The file has different settings or is damaged.
        """
        wanted = dict(self.settings)

        def read(path: Path) -> tuple[tuple[Selection, float], dict[str, Any]]:
            selection, settings, seconds = read_selection(path, self.context)
            if self.models and (pretraining := self.models[0].settings_of(str(settings.get("pretraining")))):
                # compare settings instead of hashes, so that the message names what differs
                settings["pretraining"], wanted["pretraining"] = pretraining, self.models[0].settings
            return (selection, seconds), settings

        return load_result(self.path, wanted, read, overwrite=overwrite)

    def select(self) -> tuple[Selection, float]:
        """Return the selection: the given file, a stored one with the same settings, or a new one, which is stored.

        All processes of the group must call it.

        Returns:
            The selection as positions among the training examples in use, and the selection time in seconds.
        """
        self.check()
        config, group = self.config, self.context.group
        if config.selection is not None:
            return read_selection(config.selection, self.context)[0], float("nan")
        found = self.stored(overwrite=self.run.overwrite)
        group.wait()
        if found is not None:
            log.info("selection: loaded from %s", self.path)
            return found
        for model in self.models:
            model.train()
        if group.is_main_process:
            if (epsilon := self.settings.get("selection_subsample", "exact")) != "exact":
                log.info(
                    "selection: subsampling with epsilon %g (examples times picks: %.2g; auto is exact up to %.0e)",
                    epsilon,
                    greedy_gains(self.groups()),
                    GREEDY_LIMIT,
                )
            started = time.perf_counter()
            selection = config.method.select(self._inputs(), self.groups(), config.options)
            seconds = time.perf_counter() - started
            self.path.with_suffix(".csv").unlink(missing_ok=True)  # select_coreset.py's table of the old selection
            write_npz(
                self.path,
                indices=self.context.train.indices.cpu().numpy()[selection.indices],
                weights=selection.weights,
                label_hash=self.context.label_hash,
                data_hash=self.context.full_train.digest or "",
                total=self.context.full_train.total,
                settings=json.dumps(self.settings, sort_keys=True),
                seconds=seconds,
            )
            log.info(
                "selection: kept %d of %d examples with %s in %.2f s",
                len(selection.indices),
                len(self.context.train),
                config.coreset_func,
                seconds,
            )
        group.wait()
        return self.stored()

    def _inputs(self) -> SelectionInputs:
        """Collect the inputs that the method needs."""
        context, config, needs = self.context, self.config, self.config.method.needs
        scores, dynamics, layers = None, {}, []
        if needs.stored:
            scores = self._stored_scores()
        if needs.reduced or needs.dynamics:
            dynamics = self.models[0].dynamics()
        if needs.reduced:
            windows = Windows(getattr(config.options, "score_window", WINDOW))
            score = SCORES[needs.reduced]
            scores = score.from_dynamics(dynamics, windows)
            if "correct" not in needs.dynamics:  # forget reads it, because it keeps never-learned examples first
                warn_if_not_learned([score], training_accuracy(dynamics["correct"]), "pre-training")
        if needs.logits or needs.embeddings:
            full = self._gradient == "full"
            layers = [
                model.last_layer(embeddings=needs.embeddings and not full, gradient_norms=full)
                for model in self.models
            ]
        return SelectionInputs(
            labels=context.train.labels.cpu().numpy(),
            num_classes=context.entry.num_classes,
            seed=self.run.training.seed,
            scores=scores,
            dynamics={name: dynamics[name] for name in needs.dynamics},
            layers=layers,
            names=context.train.indices.cpu().numpy(),
        )

    @property
    def _gradient(self) -> str:
        """For GraNd: the gradient of which parameters, ``"last"`` layer or ``"full"``."""
        return getattr(self.config.options, "grand_gradient", "last")

    @cached_property
    def _proxy(self) -> Proxy:
        """The stored score for exactly this data set."""
        name, full = self.config.method.needs.stored, self.context.full_train
        return Proxy(
            name,
            self.context.entry.name,
            normalize=False,
            folder=score_folders(self.config.scores_folder, name, self.folders.metrics_folder),
            n=full.total,
            label_hash=self.context.label_hash,
            data_hash=full.digest,
        )

    def _stored_scores(self) -> np.ndarray:
        """The stored scores of the training examples in use."""
        proxy = self._proxy
        scores = proxy.scores[self.context.train.indices.cpu().numpy()]
        if np.isnan(scores).any():
            raise FileError(
                f"{proxy.path}: has scores for {len(proxy.indices)} of {len(proxy)} examples, which do not cover all "
                "candidates; score all examples, or give the --subset and --exclude they were made with"
            )
        return scores

    # --------------------------------------------------------------------------------------------------- training

    @property
    def dynamic(self) -> bool:
        """Whether training selects again in each epoch."""
        return self.config.selection is None and self.config.method.dynamic

    @property
    def files(self) -> RunFiles:
        """The run's files."""
        return self._training().files

    @property
    def lock(self) -> Path:
        """Path of the run's lock file."""
        return self.files.checkpoints / LOCK_NAME

    def check_stored(self) -> None:
        """Refuse, before any training, to replace a run or a selection with different settings.

        Raises:
            FileError: Such a run or selection exists; the message names the settings that differ.
        """
        if not self.dynamic:
            self.stored()
        run = self._training()
        if results := run.files.read_results():
            load_result(
                run.files.results,
                run.settings,
                lambda path: (results, results["settings"]),
                ignore=("examples", "selection"),
            )

    def train(self) -> list[dict[str, Any]]:
        """Select, then train on the selection; return the history, one record per epoch."""
        if self.dynamic:
            self.check()
            plan = InfoBatchPlan(
                self.context.train.indices,
                prune_ratio=self._prune_ratio,
                epochs=self.run.training.epochs,
                seed=self.run.training.seed,
                delta=self.config.options.infobatch_delta,
                device=self.context.device,
            )
            return self._training().fit(plan=plan)
        selection, _ = self.select()
        weights = torch.from_numpy(selection.weights) if selection.weighted else None
        return self._training(selection).fit(weights=weights)

    def is_done(self) -> bool:
        """Whether the run has finished with exactly these settings and the resulting selection."""
        if self.dynamic:
            return self._training().is_done()
        try:
            found = self.stored()
        except FileError:  # train() reports the error
            return False
        return found is not None and self._training(found[0]).is_done()

    def selection_seconds(self) -> float:
        """The time in seconds of the stored selection; NaN if there is none."""
        found = None if self.dynamic else self.stored()
        return float("nan") if found is None else found[1]

    def _training(self, selection: Selection | None = None) -> TrainingRun:
        """The training run on a selection; without one, with the settings that are known before selecting."""
        train = self.context.train
        if self.dynamic:
            more = {
                "selection": self.config.coreset_func,
                "prune_ratio": self._prune_ratio,
                "infobatch_delta": self.config.options.infobatch_delta,
            }
        else:
            more = {f"selection_{name}": value for name, value in self.settings.items() if name not in _SHARED}
        if selection is not None:
            train = train.subset(torch.from_numpy(selection.indices))
            values = {"indices": selection.indices.tolist(), "weights": selection.weights.tolist()}
            more["selection"] = settings_hash(values)
        return TrainingRun(self.context, self.run, self.folders, self.experiment, train, more)

    @property
    def _prune_ratio(self) -> float:
        return float(np.round(1.0 - self.config.coreset_fraction, 12))
