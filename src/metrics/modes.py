"""The kinds of per-example scores: what each is called, how it is drawn, and which command makes it."""

from dataclasses import dataclass

from src.artifacts import SCORE_FOLDERS
from src.datasets import dataset_flag
from src.errors import ArgumentError
from src.metrics.published import published_datasets


@dataclass(frozen=True)
class ScoreMode:
    """One kind of score. Every stored score is oriented so that HIGH means atypical.

    Attributes:
        name: What flags and file names call it.
        symbol: What figures call it (matplotlib's math text).
        title: Its name in words.
        source: Where its per-seed values come from: ``"pair"`` (an SGD and a SAM model), ``"dynamics"``
            (recorded during training), ``"end"`` (the trained model), ``"mpe"`` or ``"download"``.
        paper: Who proposed it.
        negated: Whether the stored score is minus the published quantity, to turn HIGH into atypical.
    """

    name: str
    symbol: str
    title: str
    source: str
    paper: str
    negated: bool = False

    @property
    def folder(self) -> str:
        """The sub-folder of a metrics folder in which the mode's averaged files stand."""
        return SCORE_FOLDERS[self.name]

    def recipe(self, dataset: str) -> str:
        """The command (or place) that a score file of this mode comes from, for this data set."""
        recipe = _RECIPES[self.source].format(mode=self.name, dataset=dataset_flag(dataset))
        if dataset not in published_datasets(self.name):
            return recipe
        return f"get the published ones with fetch_scores.py --dataset {dataset} --modes {self.name}, or {recipe}"


_RECIPES = {
    "pair": (
        "make it with compute_sam_sgd.py and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "dynamics": (
        "make it with train_full.py --measure_proxies and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "end": (
        "make it with train_full.py --measure_proxies and average_scores.py "
        "--dataset {dataset} --model MODEL --seeds SEEDS --modes {mode}"
    ),
    "mpe": "make it with the scripts in examples/",
    "download": (
        "store estimates of your own there (an npz file with an array tr_mem); Feldman and Zhang's, of cifar100 and "
        "imagenet, are at https://pluskid.github.io/influence-memorization/"
    ),
}

_SAMIS, _FZ = "SAMIS", "Feldman and Zhang 2020"

MODES: dict[str, ScoreMode] = {
    mode.name: mode
    for mode in (
        ScoreMode("mem", r"$m(x_i)$", "memorization", "download", _FZ),
        ScoreMode("forg", r"$F(x_i)$", "forgetting events", "dynamics", "Toneva et al. 2019"),
        ScoreMode("etl", r"$E2L(x_i)$", "epochs to learn", "dynamics", _SAMIS),
        ScoreMode("eps", r"$\epsilon(x_i)$", "epsilon-flatness", "end", _SAMIS),
        ScoreMode("flat", r"$\gamma(x_i)$", "input curvature", "end", "Garg and Roy 2023"),
        ScoreMode("samis_loss", r"$S_L(x_i)$", "SAMIS-L", "pair", _SAMIS),
        ScoreMode("samis_prob", r"$S_P(x_i)$", "SAMIS-P", "pair", _SAMIS),
        ScoreMode("mean_loss", r"$\bar{\ell}(x_i)$", "mean loss of both models", "pair", "baseline"),
        ScoreMode("csl", r"$\mathrm{CSL}(x_i)$", "cumulative sample loss", "dynamics", "Ravikumar et al. 2025"),
        ScoreMode("aum", r"$-\mathrm{AUM}(x_i)$", "area under the margin", "dynamics", "Pleiss et al. 2020", True),
        ScoreMode("dual", r"$\mathrm{DUAL}(x_i)$", "DUAL", "dynamics", "Cho et al. 2025"),
        ScoreMode("dyn_unc", r"$U(x_i)$", "dynamic uncertainty", "dynamics", "He et al. 2024"),
        ScoreMode("el2n", r"$\mathrm{EL2N}(x_i)$", "error norm, early epochs", "dynamics", "Paul et al. 2021"),
        ScoreMode("tdds", r"$\mathrm{TDDS}(x_i)$", "temporal dual-depth", "dynamics", "Zhang et al. 2024"),
        ScoreMode("mpe", r"$\mathrm{MPE}(x_i)$", "memory-perturbation sensitivity", "mpe", "Nickl et al. 2023"),
    )
}


def score_mode(name: str) -> ScoreMode:
    """The mode of a name.

    Raises:
        ArgumentError: There is no such mode.
    """
    if name not in MODES:
        raise ArgumentError("mode", f"{name!r}: there is no such score; choose from {', '.join(MODES)}", "--modes")
    return MODES[name]


def modes_from(*sources: str) -> tuple[str, ...]:
    """The names of the modes whose per-seed values come from ``sources``, in the registry's order."""
    return tuple(mode.name for mode in MODES.values() if mode.source in sources)
