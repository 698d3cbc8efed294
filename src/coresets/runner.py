"""From flags to a selection: what a method needs is found, made or refused; the choice is stored."""

import contextlib
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.artifacts.io import file_digest, label_hash, read_npz, write_npz
from src.artifacts.paths import claim_path, coreset_experiment, selection_path
from src.artifacts.store import (
    acting_settings,
    check_same_data,
    check_settings_match,
    checked_array,
    load_result,
    parse_settings,
)
from src.coresets import CandidateGroup, Method, Selection, SelectionInputs, find_method, make_groups
from src.coresets.infobatch import InfoBatchPlan
from src.coresets.pretraining import PretrainedNetwork, settings_hash, train_networks
from src.errors import FileError, FlagError
from src.metrics import Proxy
from src.metrics import dynamics as reductions
from src.metrics.proxy import score_folders
from src.session import Session
from src.training import image_facts

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


def forgetting(run: Arrays) -> np.ndarray:
    """Forgetting events, with infinity for examples that were never right (Toneva et al. 2019, section 2)."""
    events = reductions.forgetting_events(run["correct"])
    learned = (run["correct"] == 1).any(axis=0)
    return np.where(np.isnan(events) | learned, events, np.inf)


# What entries of the registry call reduced scores; each is HIGH for the examples that are kept first
REDUCTIONS: dict[str, Callable[[Arrays, Any], np.ndarray]] = {
    "forgetting": lambda run, options: forgetting(run),
    "csl": lambda run, options: reductions.csl(run["loss"]),
    "aum": lambda run, options: -reductions.aum(run["margin"]),
    "dual": lambda run, options: reductions.dual(run["probability"], options.score_window),
    "tdds": lambda run, options: reductions.tdds(run["divergence"], options.score_window),
}


@dataclass(frozen=True)
class SelectionJob:
    """One selection to be made: a method and how much it keeps.

    Attributes:
        session: Data, flags and processes.
        method: The method.
        out: Where the selection is stored, where that is not the folder of the run on it.
    """

    session: Session
    method: Method
    out: Path | None = None

    @classmethod
    def of(cls, session: Session, out: Path | None = None) -> "SelectionJob":
        """The selection that the flags ask for."""
        return cls(session, find_method(session.args.coreset_func), out)

    @property
    def options(self) -> Any:
        """The options of the method, from the flags."""
        args = vars(self.session.args)
        return self.method.options(**{name: args[name] for name in self.method.option_names})

    @property
    def networks(self) -> int:
        """How many pre-trained networks are needed."""
        needs = self.method.needs
        return 0 if not needs.pretraining else self.session.args.coreset_networks if needs.ensemble else 1

    @property
    def experiment(self) -> str:
        """The name of the run on the selection."""
        args = self.session.args
        share = args.coreset_fraction
        if args.shots is not None:
            share = f"shots_{args.shots}"
        elif args.shots_up_to is not None:
            share = f"shots_up_to_{args.shots_up_to}"
        return coreset_experiment(args.coreset_func, args.coreset_mode, share, args.model, self.session.entry.name)

    @property
    def path(self) -> Path:
        """Where the selection is stored."""
        args = self.session.args
        return self.out or selection_path(args.models_folder, self.experiment, args.seed)

    def settings(self) -> dict[str, Any]:
        """Everything that determines the selection."""
        session, args, method = self.session, self.session.args, self.method
        facts: dict[str, Any] = {
            "coreset_func": method.name,
            "coreset_fraction": args.coreset_fraction if args.shots is None and args.shots_up_to is None else None,
            "shots": args.shots,
            "shots_up_to": args.shots_up_to,
            "per_class": args.per_class,
            "seed": args.seed,
            "dataset": session.entry.name,
            "labels": label_hash(session.whole_train.labels.cpu().numpy()),
            **image_facts(session.whole_train),
            "subset": None if args.subset is None else label_hash(session.train.indices.cpu().numpy()),
            **dataclasses.asdict(self.options),
        }
        if method.needs.stored:
            facts["scores"] = file_digest(self._proxy.path)
        if method.needs.pretraining:
            facts["pretraining"] = PretrainedNetwork(session).key
            facts["coreset_networks"] = self.networks
        return acting_settings(facts)

    def check(self) -> None:
        """Find, before anything is computed, what would stop the selection later.

        Raises:
            FlagError: The share does not fit the data, or pre-training is too short for the method.
            FileError: The stored score is missing, or not of this data set.
        """
        self.groups()
        needs, args = self.method.needs, self.session.args
        if needs.stored:
            self._stored_scores()
        if needs.reduced:
            epochs, fewest = args.coreset_pretrain_epochs, fewest_epochs(needs.reduced, self.options)
            if epochs < fewest:
                raise FlagError(
                    f"--coreset_pretrain_epochs {epochs}: too few for {self.method.name}, "
                    f"which compares epochs; give at least {fewest}"
                )
        if args.coreset_mode == "few_shot" and "coreset_mode" not in self.method.option_names:
            log.warning(
                "--coreset_mode few_shot: changes nothing for %s, which keeps what its paper keeps", self.method.name
            )

    def material(self, networks: list[PretrainedNetwork]) -> SelectionInputs:
        """What the method reads."""
        session, needs, options = self.session, self.method.needs, self.options
        scores, dynamics, layers = None, {}, []
        if needs.stored:
            scores = self._stored_scores()
        if needs.reduced or needs.dynamics:
            dynamics = networks[0].dynamics()
        if needs.reduced:
            scores = REDUCTIONS[needs.reduced](dynamics, options)
        if needs.logits or needs.embeddings:
            full = getattr(options, "grand_gradient", "last") == "full"
            layers = [
                network.last_layer(embeddings=needs.embeddings and not full, gradient_norms=full)
                for network in networks
            ]
        return SelectionInputs(
            labels=self._labels(),
            num_classes=session.entry.num_classes,
            seed=session.args.seed,
            scores=scores,
            dynamics=dynamics if needs.dynamics else {},
            networks=layers,
            names=session.train.indices.cpu().numpy(),
        )

    def _labels(self) -> np.ndarray:
        return self.session.train.labels.cpu().numpy()

    def stored(self, *, overwrite: bool = False) -> tuple[Selection, float] | None:
        """The selection on disk and its seconds, if it was made with the same settings; None if there is none.

        Args:
            overwrite: Whether a file of different settings, or a damaged one, counts as none.

        Raises:
            FileError: The file is damaged, or was made with different settings.
        """
        wanted = self.settings()

        def read(path: Path) -> tuple[tuple[Selection, float], dict[str, Any]]:
            selection, seconds, stored = read_selection(path, self.session)
            there, here = stored.get("pretraining"), wanted.get("pretraining")
            if there and here and there != here:  # hashes: compare what they stand for, where that is on disk
                network = PretrainedNetwork(self.session)
                if facts := network.settings_of(str(there)):
                    for settings, more in ((stored, facts), (wanted, network.settings)):
                        del settings["pretraining"]
                        settings.update({f"pretraining {name}": value for name, value in more.items()})
            return (selection, seconds), stored

        return load_result(self.path, wanted, read, overwrite=overwrite)

    def groups(self) -> list[CandidateGroup]:
        """Among which examples is chosen, and how many."""
        args = self.session.args
        return make_groups(
            self._labels(),
            self.session.entry.num_classes,
            fraction=args.coreset_fraction,
            shots=args.shots,
            shots_up_to=args.shots_up_to,
            per_class=args.per_class,
            class_names=self.session.train.class_names,
        )

    @cached_property
    def _proxy(self) -> Proxy:
        """The stored score, of this very data set."""
        args, name, whole = self.session.args, self.method.needs.stored, self.session.whole_train
        return Proxy(
            name,
            self.session.entry.name,
            normalize=False,
            folder=score_folders(args.scores_folder, name, args.metrics_folder),
            n=whole.total,
            label_hash=label_hash(whole.labels.cpu().numpy()),
            data_hash=whole.digest,
        )

    def _stored_scores(self) -> np.ndarray:
        """The stored score of each training example."""
        proxy = self._proxy
        scores = proxy.scores[self.session.train.indices.cpu().numpy()]
        if np.isnan(scores).any():
            raise FileError(
                f"{proxy.path}: scores {len(proxy.indices)} of {len(proxy)} examples, not all to choose from; "
                "make scores of all, or give the same --subset as they were made with"
            )
        return scores


def fewest_epochs(reduced: str, options: Any) -> int:
    """The shortest pre-training that a reduced score can be computed from, found by trying."""
    for epochs in itertools.count(1):
        nothing = dict.fromkeys(("correct", "loss", "margin", "probability", "divergence"), np.zeros((epochs, 1)))
        with contextlib.suppress(FlagError):
            REDUCTIONS[reduced](nothing, options)
            return epochs
    raise AssertionError


def select(choice: SelectionJob, *, overwrite: bool = False) -> tuple[Selection, float]:
    """The selection of a choice: the stored one of the same settings, or a new one, which is stored.

    Returns:
        The selection in positions among the session's training examples, and the seconds that it took.
    """
    choice.check()
    group = choice.session.group
    found = choice.stored(overwrite=overwrite)
    group.wait()
    if found is not None:
        log.info("selection: read from %s", choice.path)
        return found
    networks = train_networks(choice.session, choice.networks)
    if group.is_main_process:
        started = time.perf_counter()
        selection = choice.method.select(choice.material(networks), choice.groups(), choice.options)
        seconds = time.perf_counter() - started
        write_selection(choice.path, selection, choice.session, choice.settings(), seconds)
        log.info("selection: %d of %d examples by %s in %.2f s", len(selection.indices), len(choice.session.train),
                 choice.method.name, seconds)  # fmt: skip
    group.wait()
    return choice.stored()


class CoresetRun:
    """A fresh network's training on chosen examples.

    Args:
        session: The session, of ``epochs = coreset_epochs``.
        choice: The selection to make.
        file: A selection's file in place of a choice.
    """

    def __init__(self, session: Session, choice: SelectionJob | None = None, file: Path | None = None) -> None:
        if (choice is None) == (file is None):
            raise ValueError("a run needs a choice, or a selection's file")
        self.session, self.choice, self.file = session, choice, file
        if choice is not None:
            self.experiment = choice.experiment
        else:
            args = session.args
            name = f"selection_{file_digest(file)[:8]}"
            share = len(read_selection(file, session)[0].indices)
            self.experiment = coreset_experiment(name, args.coreset_mode, share, args.model, session.entry.name)

    @property
    def lock(self) -> Path:
        """The lock file of whoever trains this run."""
        return claim_path(self.session.args.models_folder, self.experiment, self.session.args.seed)

    @property
    def dynamic(self) -> bool:
        """Whether training chooses anew in each epoch."""
        return self.choice is not None and self.choice.method.dynamic

    def check(self) -> None:
        """Find before anything is trained what would stop the run later.

        Raises:
            FlagError: The share does not fit the data or the method, or pre-training is too short.
            FileError: The stored score, or the selection's file, is missing or does not fit the data.
        """
        if self.choice is not None:
            self.choice.check()
        if self.dynamic:
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        args, name = self.session.args, self.choice.method.name
        if not args.per_class:
            log.warning("--per_class: changes nothing for %s, which looks at all examples at once", name)

    def check_stored(self) -> None:
        """Find, before anything is trained, a run or a selection on disk that has different settings.

        Raises:
            FileError: There is one; the message names the settings that differ.
        """
        if self.choice is None:
            return
        if not self.dynamic:
            self.choice.stored()
        files = self.session.files(self.experiment)
        stored = files.read_results().get("settings", {})
        if stored:
            more = self._dynamic_settings() if self.dynamic else self._selection_settings()
            wanted = self.session.settings(self.session.train, more)
            check_settings_match(files.checkpoints, stored, wanted, ignore=("examples", "selection"))

    def selection_seconds(self) -> float:
        """The seconds that the stored selection took; NaN where there is none."""
        found = None if self.choice is None or self.dynamic else self.choice.stored()
        return float("nan") if found is None else found[1]

    def selection(self, *, overwrite: bool = False) -> tuple[Selection, float]:
        """The chosen examples, and the seconds that choosing took (NaN where unknown)."""
        if self.file is not None:
            return read_selection(self.file, self.session)[0], float("nan")
        return select(self.choice, overwrite=overwrite)

    def train(self) -> list[dict[str, Any]]:
        """Select, and train on the selection; returns the history, one record per epoch."""
        session = self.session
        self.check()
        if self.dynamic:
            return session.run(
                self.experiment, session.train, plan=self._plan(), more_settings=self._dynamic_settings()
            )
        selection, _ = self.selection(overwrite=session.args.overwrite)
        train = session.train.subset(torch.from_numpy(selection.indices))
        return session.run(
            self.experiment, train, weights=weights_tensor(selection), more_settings=self._settings(selection)
        )

    def is_done(self) -> bool:
        """Whether the run has finished, with these very settings and the selection that they give."""
        session = self.session
        if self.dynamic:
            return session.is_done(self.experiment, session.train, self._dynamic_settings())
        if self.choice is None or not self.choice.path.exists():
            return False
        try:
            selection = self.choice.stored()
        except FileError:  # making it says so
            return False
        if selection is None:
            return False
        train = session.train.subset(torch.from_numpy(selection[0].indices))
        return session.is_done(self.experiment, train, self._settings(selection[0]))

    def _settings(self, selection: Selection) -> dict[str, Any]:
        """The run's settings beside those of the flags."""
        return {**self._selection_settings(), "selection": selection_digest(selection)}

    def _selection_settings(self) -> dict[str, Any]:
        """Those of them that are known before the selection is made."""
        chosen = {"selection_file": file_digest(self.file)} if self.file is not None else self.choice.settings()
        return {f"selection_{key}": value for key, value in chosen.items() if key not in _SHARED}

    def _dynamic_settings(self) -> dict[str, Any]:
        options = self.choice.options
        return {"selection": self.choice.method.name, "prune_ratio": self._prune_ratio,
                "infobatch_delta": options.infobatch_delta}  # fmt: skip

    @property
    def _prune_ratio(self) -> float:
        return float(np.round(1.0 - self.session.args.coreset_fraction, 12))

    def _plan(self) -> InfoBatchPlan:
        session, args = self.session, self.session.args
        return InfoBatchPlan(
            session.train.indices,
            prune_ratio=self._prune_ratio,
            epochs=args.epochs,
            seed=args.seed,
            delta=args.infobatch_delta,
            device=session.device,
        )


_SHARED = ("dataset", "labels", "images", "decoding", "subset", "seed")  # the session's settings have them


_MAKE = "make it with select_coreset.py (of a mask, take numpy's flatnonzero)"
_LARGEST = 1e30  # of a weight: training computes in float32


def write_selection(
    path: Path, selection: Selection, session: Session, settings: Mapping[str, Any], seconds: float
) -> Path:
    """Write ``selection.npz``: original indices, weights, hashes of labels and images, settings (json), seconds.

    Args:
        path: The file.
        selection: In positions among the session's training examples.
        session: The session.
        settings: What determined it.
        seconds: What it took, pre-training aside.
    """
    names = session.train.indices.cpu().numpy()
    return write_npz(
        path,
        indices=names[selection.indices],
        weights=selection.weights,
        label_hash=label_hash(session.whole_train.labels.cpu().numpy()),
        data_hash=session.whole_train.digest or "",
        total=session.whole_train.total,
        settings=json.dumps(dict(settings), sort_keys=True),
        seconds=seconds,
    )


def read_selection(path: str | Path, session: Session) -> tuple[Selection, float, dict[str, Any]]:
    """Read a selection of anyone's making: ``indices``, and ``weights`` and more where the file has them.

    Returns:
        The selection in positions among the session's training examples, the seconds it took (NaN if unknown), and
        its settings (empty if unknown).

    Raises:
        FileError: The file is missing or damaged, or does not fit the data.
    """
    arrays, whole = read_npz(path), session.whole_train
    stored = {name: str(arrays[name]) for name in ("label_hash", "data_hash") if name in arrays}
    labels = label_hash(whole.labels.cpu().numpy())
    check_same_data(path, stored, "make it with --dataset of this run", label_hash=labels, data_hash=whole.digest)
    indices = checked_array(path, arrays, "indices", kinds="iu", remedy=_MAKE)
    if indices.min() < 0 or indices.max() >= whole.total:
        raise FileError(f"{path}: has indices outside 0 to {whole.total - 1}, the training set's; make it again")
    if len(np.unique(indices)) < len(indices):
        raise FileError(f"{path}: has an index twice; give each once")
    arrays = {"weights": np.ones(len(indices)), "seconds": np.array(np.nan), **arrays}
    weights = checked_array(path, arrays, "weights", kinds="fiu", length=len(indices))
    if (weights < 0).any() or not (weights > 0).any() or weights.max() > _LARGEST:
        raise FileError(
            f"{path}: array 'weights' is not of numbers from 0 to {_LARGEST:g}, some above 0; make it again"
        )
    seconds = checked_array(path, arrays, "seconds", ndim=0, kinds="fiu", finite=False)
    names = session.train.indices.cpu().numpy()
    order = np.argsort(indices)
    outside = indices[order][~np.isin(indices[order], names)]
    if len(outside):
        raise FileError(
            f"{path}: has example {outside[0]}, which --subset leaves out; give the subset it was made with"
        )
    settings = parse_settings(path, arrays["settings"]) if "settings" in arrays else {}
    positions = np.searchsorted(names, indices[order]).astype(np.int64)
    return Selection(positions, weights[order].astype(np.float64)), float(seconds), settings


def selection_digest(selection: Selection) -> str:
    """16 hex digits that stand for indices and weights."""
    return settings_hash({"indices": selection.indices.tolist(), "weights": selection.weights.tolist()})


def weights_tensor(selection: Selection) -> torch.Tensor | None:
    """The sample weights of training; None where all are 1."""
    return torch.from_numpy(selection.weights) if selection.weighted else None
