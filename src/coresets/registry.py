"""The selection methods by name, each with what it needs, its paper and its cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from src.coresets.material import CandidateGroup, Options, Selection, SelectionInputs
from src.errors import ArgumentError
from src.lazy import later

Select = Callable[[SelectionInputs, Sequence[CandidateGroup], Options], Selection]


@dataclass(frozen=True)
class Needs:
    """What a method must be given beside the labels.

    Attributes:
        stored: Name of a stored score (a mode of ``Proxy``); None if it reads none.
        reduced: Name of a score that is reduced from the dynamics of pre-training.
        dynamics: Whether it reads the recorded arrays themselves.
        logits: Whether it reads the pre-trained network's logits.
        embeddings: Whether it reads its embeddings too.
        ensemble: Whether it reads several independently initialised networks in place of one.
    """

    stored: str | None = None
    reduced: str | None = None
    dynamics: bool = False
    logits: bool = False
    embeddings: bool = False
    ensemble: bool = False

    @property
    def pretraining(self) -> bool:
        """Whether a network must be pre-trained."""
        return bool(self.reduced or self.dynamics or self.logits or self.embeddings)

    def __str__(self) -> str:
        parts = []
        if self.stored:
            parts.append(f"stored score `{self.stored}`")
        if self.reduced or self.dynamics:
            parts.append("dynamics of pre-training")
        if self.logits or self.embeddings:
            what = "embeddings and logits" if self.embeddings else "logits"
            parts.append(f"{what} of {'R pre-trained networks' if self.ensemble else 'a pre-trained network'}")
        return ", ".join(parts) or "labels"


@dataclass(frozen=True)
class Method:
    """A way to choose examples.

    Attributes:
        name: The value of ``--coreset_func``.
        select: The choice; None for a method that chooses anew in each epoch of training.
        needs: What it must be given.
        paper: Who proposed it.
        equation: What the code implements, in a line.
        cost: Its cost for n candidates of a group, k picks, C classes, embeddings of size d, after its needs.
        options: The fields of ``Options`` that it reads.
        weighted: Whether its weights may differ from 1.
    """

    name: str
    select: Select | None
    needs: Needs
    paper: str
    equation: str
    cost: str
    options: tuple[str, ...] = ()
    weighted: bool = False

    @property
    def dynamic(self) -> bool:
        """Whether it chooses anew in each epoch of training."""
        return self.select is None

    @property
    def has_modes(self) -> bool:
        """Whether ``--coreset_mode`` changes what it keeps."""
        return "coreset_mode" in self.options


# stored score -> the value of --coreset_func; those of the SAMIS paper's README first
STORED = {
    "mem": "min_mem",
    "forg": "min_forg",
    "etl": "min_etl",
    "eps": "min_eps",
    "flat": "min_flat",
    "samis_loss": "min_sam-sgd-loss",
    "samis_prob": "min_sam-sgd-prob",
    **{name: f"min_{name}" for name in ("mean_loss", "csl", "aum", "dual", "dyn_unc", "el2n", "tdds", "mpe")},
}


def _of(file: str, name: str = "", *first: str) -> Select:
    """The function ``name`` of a file of this package, by default the file's own name; torch is imported with it."""
    return later(f"src.coresets.{file}", name or file, *first)


def _stored(mode: str, name: str) -> Method:
    paper = "Agiollo et al. 2024" if mode != "mem" else "Feldman and Zhang 2020"
    equation = "large keeps the highest scores, few_shot the lowest"
    return Method(
        name, _of("ranked", "stored", mode), Needs(stored=mode), paper, equation, "n log n", ("coreset_mode",)
    )


def _reduced(name: str, score: str, paper: str, equation: str, options: tuple[str, ...] = ()) -> Method:
    return Method(name, _of("ranked", "reduced", name), Needs(reduced=score), paper, equation, "n log n", options)


# The order is that of lists and tables.
_ALL = (
    Method(
        "random",
        _of("ranked", "random_choice"),
        Needs(),
        paper="baseline",
        equation="uniform, without replacement",
        cost="n",
    ),
    *(_stored(mode, name) for mode, name in STORED.items()),
    _reduced(
        "forget",
        "forgetting",
        "Toneva et al. 2019",
        "most changes from right to wrong between visits (section 2); never learned on top",
    ),
    _reduced("csl", "csl", "Ravikumar et al. 2025", "highest sum over epochs of the loss"),
    _reduced("aum", "aum", "Pleiss et al. 2020", "lowest mean over epochs of z_y - max_{c != y} z_c (eq. 1)"),
    _reduced(
        "tdds",
        "tdds",
        "Zhang et al. 2024",
        "highest variation of KL(p_t || p_{t-1}) over windows, late windows weighing most",
        ("score_window",),
    ),
    Method(
        "el2n",
        _of("ranked", "el2n"),
        Needs(logits=True, ensemble=True),
        paper="Paul et al. 2021",
        equation="highest mean over R networks of ||softmax(z) - onehot(y)|| (definition 2.4)",
        cost="n C R",
    ),
    Method(
        "grand",
        _of("ranked", "grand"),
        Needs(embeddings=True, ensemble=True),
        paper="Paul et al. 2021",
        equation="highest mean over R networks of ||e|| sqrt(1 + ||h||^2) (definition 2.1; full: of all parameters)",
        cost="n (C + d) R; full: R backward passes",
        options=("grand_gradient",),
    ),
    Method(
        "craig",
        _of("craig"),
        Needs(embeddings=True),
        paper="Mirzasoleiman et al. 2020",
        equation="greedy for sum_i max_{j in S} (max d - d_ij), d between last-layer gradients; weight = how "
        "many are nearest to j (algorithm 1)",
        cost="n^2 (C + d)",
        options=("selection_memory",),
        weighted=True,
    ),
    Method(
        "gradmatch",
        _of("gradmatch"),
        Needs(embeddings=True),
        paper="Killamsetty et al. 2021 (GradMatch)",
        equation="orthogonal matching pursuit: min ||sum_S w_i g_i - sum_j g_j||^2 + lambda ||w||^2, w >= 0 (alg. 2)",
        cost="n k (C + d) + n k^2",
        options=("gradmatch_lambda", "selection_memory"),
        weighted=True,
    ),
    Method(
        "glister",
        _of("glister"),
        Needs(embeddings=True),
        paper="Killamsetty et al. 2021 (GLISTER)",
        equation="greedy in <g_x, v>, v the mean gradient of 10 % held out, after a step eta along the picks "
        "(alg. 2)",
        cost="k/r n C min(d, |V|), r picks between two refreshes",
        options=("glister_eta", "glister_refresh", "selection_memory"),
    ),
    Method(
        "graph_cut",
        _of("graph_cut"),
        Needs(embeddings=True),
        paper="Iyer et al. 2021",
        equation="greedy for sum_{i in V, j in S} s_ij - sum_{i,j in S} s_ij, s = (1 + cos of last-layer "
        "gradients) / 2",
        cost="n^2 (C + d) + n k; beyond selection_memory: n k (C + d)",
        options=("selection_memory",),
    ),
    Method(
        "infobatch",
        _of("infobatch"),
        Needs(logits=True),
        paper="Qin et al. 2024",
        equation="all of loss >= mean, and random ones of the m below it, of weight m / kept; once, before training",
        cost="n",
        weighted=True,
    ),
    Method(
        "infobatch_dynamic",
        None,
        Needs(),
        "Qin et al. 2024",
        "r = 1 - coreset_fraction; each epoch visits all of loss >= mean, and floor((1 - r) m) random ones of the "
        "m below it, of weight m / kept; after delta * epochs all",
        "n per epoch",
        options=("infobatch_delta",),
        weighted=True,
    ),
    Method(
        "ccs",
        _of("ccs"),
        Needs(reduced="aum"),
        paper="Zheng et al. 2023",
        equation="hardest beta n left out, then equal random shares of strata of equal width in AUM (algorithm 1)",
        cost="n log n",
        options=("ccs_cutoff", "ccs_bins"),
    ),
    Method(
        "moderate",
        _of("moderate"),
        Needs(embeddings=True),
        paper="Xia et al. 2023",
        equation="smallest |d_i - median d| with d_i = ||h_i - mean of h over the class of i||",
        cost="n d + n log n",
    ),
    Method(
        "d2",
        _of("d2"),
        Needs(reduced="aum", embeddings=True),
        paper="Maharana et al. 2024",
        equation="highest x_u + sum_v exp(-d_uv^2) x_v; each pick u takes exp(-gamma d_uv^2) x_u from its "
        "neighbours v",
        cost="n^2 d + k n log n",
        options=("d2_neighbors", "d2_gamma", "selection_memory"),
    ),
    Method(
        "dual",
        _of("dual"),
        Needs(reduced="dual", dynamics=True),
        paper="Cho et al. 2025",
        equation="drawn by (1 - mean p) std p over windows, times a Beta density of mean p that turns to easy "
        "examples",
        cost="n T + n log n for T epochs",
        options=("dual_beta", "dual_c", "score_window"),
    ),
    Method(
        "k_center",
        _of("k_center"),
        Needs(embeddings=True),
        paper="Sener and Savarese 2018",
        equation="greedy for min_S max_i min_{j in S} ||h_i - h_j|| (algorithm 1), from the example nearest "
        "to the mean",
        cost="n k d",
    ),
    Method(
        "herding",
        _of("herding"),
        Needs(embeddings=True),
        paper="Welling 2009; Rebuffi et al. 2017",
        equation="greedy argmin_i ||mu - (sum_{j in S} h_j + h_i) / (|S| + 1)||, without replacement",
        cost="n k d",
    ),
)
METHODS = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ArgumentError: There is none.
    """
    if name not in METHODS:
        raise ArgumentError("method", f"{name}: unknown; choose from {', '.join(METHODS)}", "--coreset_func")
    return METHODS[name]


def method_table() -> str:
    """The registry as a Markdown table; methods that differ only in the stored score share a row."""
    rows = ["| `--coreset_func` | paper | what it keeps | needs | cost | options |", "|---|---|---|---|---|---|"]
    stored = [m for m in METHODS.values() if m.needs.stored]
    for entry in METHODS.values():
        names, needs, paper = f"`{entry.name}`", str(entry.needs), entry.paper
        if entry.needs.stored:
            if entry is not stored[0]:
                continue
            names, needs, paper = (
                ", ".join(f"`{m.name}`" for m in stored),
                "a stored score",
                "SAMIS, and each score's",
            )
        cells = (names, paper, entry.equation, needs, entry.cost, ", ".join(f"`--{name}`" for name in entry.options))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
