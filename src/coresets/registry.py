"""The selection methods by name, each with what it needs, its paper and its cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from src.coresets.material import Group, Material, Options, Selection
from src.errors import FlagError

Select = Callable[[Material, Sequence[Group], Options], Selection]


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


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to the registry."""
    if method.name in METHODS:
        raise ValueError(f"{method.name} is registered twice")
    METHODS[method.name] = method
    return method


def method(
    name: str,
    *,
    needs: Needs,
    paper: str,
    equation: str,
    cost: str,
    options: tuple[str, ...] = (),
    weighted: bool = False,
) -> Callable[[Select], Select]:
    """Register the decorated function as a method (the fields are those of :class:`Method`)."""

    def add(select: Select) -> Select:
        register(Method(name, select, needs, paper, equation, cost, options, weighted))
        return select

    return add


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        FlagError: There is none.
    """
    if name not in METHODS:
        raise FlagError(f"--coreset_func {name}: unknown; choose from {', '.join(METHODS)}")
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
