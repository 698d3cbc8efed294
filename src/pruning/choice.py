"""From flags to a selection: what a method needs is found, made or refused; the choice is stored."""

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from src.artifacts import (
    coreset_experiment,
    differences,
    file_digest,
    label_hash,
    read_npz,
    refuse_other_settings,
    selection_path,
    without_idle,
)
from src.coresets import CandidateGroup, Method, Options, Selection, SelectionInputs, find_method, make_groups
from src.errors import FileError, FlagError
from src.metrics import Proxy
from src.metrics import dynamics_scores as reductions
from src.pruning.files import read_selection, write_selection
from src.pruning.pretraining import PretrainedNetwork, train_networks
from src.session import Session
from src.settings import score_folders
from src.training import image_facts

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


def forgetting(run: Arrays) -> np.ndarray:
    """Forgetting events, with infinity for examples that were never right (Toneva et al. 2019, section 2)."""
    events = reductions.forgetting_events(run["correct"])
    learned = (run["correct"] == 1).any(axis=0)
    return np.where(np.isnan(events) | learned, events, np.inf)


# What entries of the registry call reduced scores; each is HIGH for the examples that are kept first
REDUCTIONS: dict[str, Callable[[Arrays, Options], np.ndarray]] = {
    "forgetting": lambda run, options: forgetting(run),
    "csl": lambda run, options: reductions.csl(run["loss"]),
    "aum": lambda run, options: -reductions.aum(run["margin"]),
    "dual": lambda run, options: reductions.dual(run["probability"], options.score_window),
    "tdds": lambda run, options: reductions.tdds(run["divergence"], options.score_window),
}


@dataclass(frozen=True)
class Choice:
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
    def of(cls, session: Session, out: Path | None = None) -> "Choice":
        """The selection that the flags ask for."""
        return cls(session, find_method(session.args.coreset_func), out)

    @property
    def options(self) -> Options:
        """The options of the methods, from the flags."""
        args = vars(self.session.args)
        return Options(**{f.name: args[f.name] for f in dataclasses.fields(Options)})

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
        options = dataclasses.asdict(self.options)
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
            **{name: options[name] for name in method.options},
        }
        if method.needs.stored:
            facts["scores"] = file_digest(self._proxy.path)
        if method.needs.pretraining:
            facts["pretraining"] = PretrainedNetwork(session).key
            facts["coreset_networks"] = self.networks
        return without_idle(facts)

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
        if args.coreset_mode == "few_shot" and not self.method.has_modes:
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
            full = "grand_gradient" in self.method.options and options.grand_gradient == "full"
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
            overwrite: Whether a file of other settings, or a damaged one, counts as none.

        Raises:
            FileError: One of other settings stands there, or a damaged one.
        """
        if not self.path.exists():
            return None
        try:
            selection, settings = read_selection(self.path, self.session)
            seconds = _seconds(self.path)
            if differences(settings, self.settings()):
                refuse_other_settings(self.path, *self._spelt_out(settings, self.settings()))
        except FileError:
            if overwrite:
                return None
            raise
        return selection, seconds

    def _spelt_out(self, stored: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both settings with those of the pre-training in place of its hash, where the other one's are on disk."""
        there, here = str(stored.get("pretraining")), wanted.get("pretraining")
        if here is None or there == here:
            return stored, wanted
        network = PretrainedNetwork(self.session)
        facts = network.settings_of(there)
        if not facts:
            return stored, wanted
        sides = ((stored, facts), (wanted, network.settings))
        return tuple(
            {**{key: value for key, value in side.items() if key != "pretraining"},
             **{f"pretraining {key}": value for key, value in more.items()}}
            for side, more in sides
        )  # fmt: skip

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


def _seconds(path: Path) -> float:
    """What a stored selection took; NaN where its file does not say.

    Raises:
        FileError: It says something else.
    """
    seconds = np.asarray(read_npz(path).get("seconds", np.nan))
    if seconds.shape or seconds.dtype.kind not in "fiu":
        raise FileError(f"{path}: 'seconds' is no number; make it anew with --overwrite")
    return float(seconds)


def fewest_epochs(reduced: str, options: Options) -> int:
    """The shortest pre-training that a reduced score can be computed from, found by trying."""
    for epochs in itertools.count(1):
        nothing = dict.fromkeys(("correct", "loss", "margin", "probability", "divergence"), np.zeros((epochs, 1)))
        with contextlib.suppress(FlagError):
            REDUCTIONS[reduced](nothing, options)
            return epochs
    raise AssertionError


def select(choice: Choice, *, overwrite: bool = False, wait: bool = True) -> tuple[Selection, float]:
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
    networks = train_networks(choice.session, choice.networks, wait=wait)
    if group.is_main_process:
        started = time.perf_counter()
        selection = choice.method.select(choice.material(networks), choice.groups(), choice.options)
        seconds = time.perf_counter() - started
        write_selection(choice.path, selection, choice.session, choice.settings(), seconds)
        log.info("selection: %d of %d examples by %s in %.2f s", len(selection.indices), len(choice.session.train),
                 choice.method.name, seconds)  # fmt: skip
    group.wait()
    return choice.stored()
