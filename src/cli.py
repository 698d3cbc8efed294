"""Command-line support for scripts: flags generated from dataclasses, logging, one-line errors, exit statuses.

Each setting is defined once, as a field of a dataclass that configures the library::

    @dataclass(frozen=True)
    class SamConfig:
        rho: float = option(0.05, "radius of SAM's perturbation", number(float, 0, open_low=True))

    parser.add(SamConfig, "training")
    sam = build(SamConfig, parser.parse_args())
"""

import argparse
import difflib
import io
import itertools
import logging
import math
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

from tqdm import tqdm

from src.errors import ArgumentError, FileError, FlagError, UserError

_ROOT = Path(__file__).resolve().parents[1]

Config = TypeVar("Config")
Rule = tuple[Callable[[Namespace], bool], str]


def option(
    default: Any,
    help: str | Callable[[Sequence[Any]], str],
    kind: Callable[[str], Any] | None = None,
    *,
    acts: Rule | Sequence[Rule] = (),
    negatable: bool = False,
    title: str | None = None,
    exclusive: str | None = None,
    **keywords: Any,
) -> Any:
    """Define a dataclass field that ``Parser.add`` turns into a flag with the field's name.

    Args:
        default: The default value. A bool makes a flag that takes no value.
        help: The help text, or a function that builds it from the choices.
        kind: Converts the text to a value, or raises ``argparse.ArgumentTypeError``.
        acts: When the flag has an effect: a predicate on all parsed values, and a phrase for when it is false, such
            as "without --resume". A flag that is given but has no effect is refused. May be a list of such rules.
        negatable: Whether a bool also has a ``--no-`` form.
        title: The help group, if it differs from that of the other fields.
        exclusive: Name of a mutually exclusive group; at most one of its flags may be given.
        keywords: More arguments of ``add_argument``, such as ``choices``, ``nargs`` and ``metavar``.
    """
    rules = [acts] if acts and callable(acts[0]) else list(acts)
    if kind is not None:
        keywords["type"] = kind
    if isinstance(default, bool) and not {"type", "nargs", "choices"} & keywords.keys():
        keywords["action"] = argparse.BooleanOptionalAction if negatable else "store_true"
    flag = {"help": help, "rules": rules, "title": title, "exclusive": exclusive, "keywords": keywords}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"flag": flag})
    return field(default=default, metadata={"flag": flag})


def build(config: type[Config], args: Namespace, **values: Any) -> Config:
    """Build a dataclass instance from the parsed flags.

    Args:
        config: The dataclass.
        args: The parsed flags. Fields without a flag keep their defaults.
        values: Values of other fields; these override flags.
    """
    given = {item.name: getattr(args, item.name) for item in fields(config) if hasattr(args, item.name)}
    return config(**{**given, **values})


def check_options(config: Any) -> None:
    """Check that the flag of each dataclass field accepts its value, or each element if the value is a list.

    None is always accepted. If the flag's value is optional, so are its default and its ``const``.

    Raises:
        ArgumentError: A value is not accepted.
    """
    for item in fields(config):
        value, keywords = getattr(config, item.name), item.metadata.get("flag", {}).get("keywords", {})
        for part in value if isinstance(value, list | tuple) else [value]:
            if part is None or ("const" in keywords and part in (item.default, keywords["const"])):
                continue
            if part not in keywords.get("choices", (part,)):
                raise ArgumentError(item.name, f"{part}: choose from {', '.join(map(str, keywords['choices']))}")
            try:
                keywords.get("type", str)(str(part))
            except argparse.ArgumentTypeError as error:
                raise ArgumentError(item.name, str(error)) from error


def number(
    kind: type,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> Callable:
    """Return an argparse type for finite numbers within bounds. An open bound excludes the bound itself."""

    def parse(text: str) -> Any:
        bounds = "an integer" if kind is int else "a finite number"
        if low is not None:
            bounds += f" {'above' if open_low else 'of at least'} {low}"
        if high is not None:
            bounds += f"{' and' if low is not None else ''} {'below' if open_high else 'at most'} {high}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}") from None
        too_low = low is not None and (value <= low if open_low else value < low)
        too_high = high is not None and (value >= high if open_high else value > high)
        if not math.isfinite(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse


def whole_number(low: int) -> Callable:
    """Return an argparse type for counts, which the paper's commands may write as 100 or 100.0."""
    parse_any = number(float, low)

    def parse(text: str) -> int:
        value = parse_any(text)
        if value != int(value):
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
        return int(value)

    return parse


SEED = number(int, 0, 2**32 - 1)  # the range that np.random.seed accepts


fraction = number(float, 0, 1, open_low=True)


def yes_or_no(text: str) -> bool:
    """Argparse type for flags that take 1 or 0, or a word such as yes or no."""
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no; give 1 or 0")
    return words[text.lower()]


def file_name(text: str) -> str:
    """Argparse type for a file name without a folder."""
    if not text or text.startswith(".") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name; give one without folders")
    return text


class Parser(argparse.ArgumentParser):
    """Argument parser that reports a bad flag in one line and does not accept abbreviated flags.

    Attributes:
        checks: Functions called with all values after parsing, before torch is imported. Each raises ``FlagError``
            if flags contradict each other.
    """

    def __init__(self, description: str | None) -> None:
        self.checks: list[Callable[[argparse.Namespace], None]] = []
        self._recipes: Mapping[str, Mapping[str, Any]] = {}
        super().__init__(
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            epilog="Default folders are in the repository root; other paths are relative to the current folder.",
        )
        help = "print details, such as the loss of each epoch, that otherwise go only to the log file"
        self.add_argument("--verbose", action="store_true", help=help)

    def add(
        self,
        config: type,
        title: str,
        *,
        only: Collection[str] | None = None,
        skip: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
        choices: Mapping[str, Collection[Any]] | None = None,
        required: Collection[str] = (),
    ) -> None:
        """Add the flags of a dataclass.

        Args:
            config: A dataclass with fields made by ``option``; other fields get no flag.
            title: The help group.
            only: The fields to add; None for all.
            skip: Fields to leave out.
            defaults: Defaults for this script that differ from the dataclass's.
            choices: Choices for this script that differ from the dataclass's.
            required: Fields, or names of exclusive groups, that must be given.
        """
        holders: dict[str, Any] = {}
        for item in fields(config):
            flag = item.metadata.get("flag")
            if flag is None or item.name in skip or (only is not None and item.name not in only):
                continue
            default = item.default if item.default is not MISSING else item.default_factory()
            default = (defaults or {}).get(item.name, default)
            keywords, exclusive = dict(flag["keywords"]), flag["exclusive"]
            if choices and item.name in choices:
                keywords["choices"] = tuple(choices[item.name])
            help = flag["help"](keywords["choices"]) if callable(flag["help"]) else flag["help"]
            holder = self._group(flag["title"] or title)
            if exclusive is not None:
                if exclusive not in holders:
                    holders[exclusive] = holder.add_mutually_exclusive_group(required=exclusive in required)
                holder = holders[exclusive]
            if item.name in required:
                keywords["required"] = True
            action = holder.add_argument(f"--{item.name}", default=default, help=help, **keywords)
            action.rules = flag["rules"]

    def add_recipes(self, recipes: Mapping[str, Mapping[str, Any]], title: str, help: str) -> None:
        """Add ``--recipe NAME``, which replaces the defaults of other flags.

        Args:
            recipes: By name, the defaults by flag (without dashes). A function is called for its default.
            title: The group of the flag.
            help: The help text.
        """
        self._recipes = recipes
        self._group(title).add_argument("--recipe", choices=tuple(recipes), help=help)

    def _group(self, title: str) -> Any:
        """Return the group with a title, creating it if needed."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def accept_paper_flags(self, func: str | None = None) -> None:
        """Accept flags that the SAMIS paper's scripts parse but never read; those scripts share one parser.

        They are hidden from ``--help``, and giving one logs a warning. Flags that the script already defines are
        unaffected.

        Args:
            func: The only value of ``--coreset_func`` that this script accepts; None if the script defines the flag.
        """
        for name, valued in PAPER_FLAGS.items():
            if f"--{name}" not in self._option_string_actions:
                keywords: dict[str, Any] = {} if valued else {"action": "store_true"}
                action = self.add_argument(f"--{name}", help=argparse.SUPPRESS, default=argparse.SUPPRESS, **keywords)
                action.ignored = True
        if func is not None:
            self.add_argument("--coreset_func", type=_only(func), help=argparse.SUPPRESS, default=argparse.SUPPRESS)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Namespace | None = None) -> Namespace:
        """Parse the flags, refuse flags that have no effect or contradict each other, and warn about ignored flags.

        Raises:
            FlagError: A flag has no effect in this combination, whatever its value, or flags contradict each other.
        """
        words = sys.argv[1:] if args is None else list(args)
        for name, recipe in self._recipes.items():
            if f"--recipe={name}" in words or ("--recipe", name) in itertools.pairwise(words):
                self.set_defaults(**{flag: value() if callable(value) else value for flag, value in recipe.items()})
        found = super().parse_args(words, namespace)
        if found.verbose and _speaks():
            for handler in logging.getLogger().handlers:
                if isinstance(handler, _BarHandler):
                    handler.setLevel(logging.DEBUG)
        del found.verbose  # no setting of the work
        known = self._option_string_actions
        given = {flag: known[flag] for flag in (word.split("=")[0] for word in words) if flag in known}
        for flag, action in given.items():
            for acts, where in getattr(action, "rules", ()):
                if not acts(found):
                    raise FlagError(f"{flag}: has no effect {where}; leave it out")
        for check in self.checks:
            check(found)
        ignored = {flag: action.dest for flag, action in given.items() if getattr(action, "ignored", False)}
        for name in set(ignored.values()):
            delattr(found, name)
        if ignored and _speaks():
            logging.getLogger(__name__).warning("%s: accepted for compatibility but ignored", " ".join(ignored))
        return found

    def error(self, message: str) -> NoReturn:
        """Print a one-line error and exit with status 2."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            given, known = unknown.split("=")[0].split()[0], self._option_string_actions
            flags = [flag for flag, action in known.items() if action.help != argparse.SUPPRESS]
            close = [flag for flag in flags if flag.startswith(given)]
            close = close or [flag for flag in flags if flag.endswith(f"_{given.lstrip('-')}")]
            close = close or difflib.get_close_matches(given, flags, 1, 0.75)
            message = f"{unknown}: unknown" + (f"; did you mean {' or '.join(close)}?" if close else "")
        message = message.replace("ignored explicit argument", "takes no value, but was given")
        if not _speaks():
            sys.exit(2)
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}; see --help\n")


def restrict(group: Any, table: Mapping[tuple[str, ...], tuple[Callable[[Namespace], bool], str]]) -> None:
    """Declare when flags have an effect. ``Parser`` refuses a flag that is given but has none.

    Args:
        group: The parser, or one of its groups, that has the flags.
        table: Maps flags to a predicate on all parsed values, and a phrase for when it is false, such as
            "without --resume".
    """
    for flags, rule in table.items():
        for flag in flags:
            action = group._option_string_actions[flag]
            action.rules = [*getattr(action, "rules", ()), rule]


SUBSET_FLAGS = ("subset", "exclude")
"""Flags that select training examples."""

FULL_DATA_FLAGS = ("dataset", "image_size", "channels", "decode", "test_fraction", "test_seed", "datasets_folder",
                   "cache_folder")  # fmt: skip
"""Flags that select the full data; passed on to the next script."""

DATA_FLAGS = (*FULL_DATA_FLAGS, *SUBSET_FLAGS)
"""Flags that select the data; passed on to the next script."""


def print_next(
    script: str,
    keep: Collection[str] | None = None,
    *,
    drop: Collection[str] = (),
    positional: Collection[str | Path] = (),
    **flags: Any,
) -> None:
    """Print the command to run next, built from this command's flags except ``--overwrite``.

    Args:
        script: A script in the same folder as this one.
        keep: Flags, without dashes, to pass on if they were given; None for all.
        drop: Flags that are not passed on.
        positional: Values that this command was given without a flag; they are not passed on.
        flags: Flags to set: True makes a flag without a value, a list gives several values, None omits the flag.
    """
    given: dict[str, list[str]] = {}
    name, without_flag = "", {Path(value) for value in positional}
    for word in sys.argv[1:]:
        if word.startswith("--"):
            name = word.split("=")[0].removeprefix("--").removeprefix("no-")
        elif Path(word) in without_flag:
            continue
        given.setdefault(name, []).append(word)
    words = [
        word
        for name, those in given.items()
        if (keep is None or name in keep) and name not in (*drop, "overwrite") and name not in flags
        for word in those
    ]
    for name, value in flags.items():
        if isinstance(value, list | tuple):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    together = "--distributed_training" in words
    program = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"] if together else ["python"]
    print("next:", shlex.join([*program, str(Path(sys.argv[0]).parent / script), *words]))  # noqa: T201


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help formatter that keeps the description's layout and shows defaults; folders are relative to the root."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or action.required or "(default: " in (action.help or ""):
            return action.help
        if isinstance(action.default, bool):
            return f"{action.help} (default: {'on' if action.default else 'off'})"
        if isinstance(action.default, Path):
            return f"{action.help} (default: {action.default.relative_to(_ROOT)})"
        return super()._get_help_string(action)


_LOG_LINE = logging.Formatter("%(asctime)s | %(levelname)-9s | %(message)s", "%Y-%m-%d %H:%M:%S")


class _BarHandler(logging.Handler):
    """Writes log lines above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LosableFile(io.FileIO):
    """Console or log that silently drops output it cannot write, e.g. to a closed pipe or a full disk."""

    def write(self, data: Any) -> int | None:
        """Write the data. On an error, drop it and report success."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _losable_text(file: int | str, mode: str, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    """Return a text stream that never raises on a failed write or on characters its encoding lacks."""
    raw = io.BufferedWriter(_LosableFile(file, mode, closefd=not isinstance(file, int)))
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=line_buffering)


def _keep_console() -> None:
    """Keep working if the console is lost, so that the exit status still reports whether the work was completed.

    Standard descriptors that the shell closed are redirected to the null device. Otherwise the next file opened would
    get such a descriptor, and the output of libraries would end up in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # open returns the lowest free number: this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # the descriptor was closed
            setattr(sys, name, _losable_text(number, "w", "utf-8", line_buffering=True))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            at_once = stream.line_buffering or stream.write_through  # write_through: PYTHONUNBUFFERED
            setattr(sys, name, _losable_text(number, "w", stream.encoding, line_buffering=at_once))


class _LogFile(logging.FileHandler):
    """Log file that silently drops lines if the disk is full. Writing results to that disk reports the error."""

    def _open(self) -> io.TextIOWrapper:
        return _losable_text(self.baseFilename, self.mode, "utf-8", line_buffering=True)


def start_logging() -> None:
    """Log to the console only. Under torchrun, all processes but the first log only warnings.

    DEBUG lines of this project and warnings of libraries are details. They go to the log file of ``log_to``, and to
    the console with ``--verbose``.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for package in ("src", "mpe"):
        logging.getLogger(package).setLevel(logging.DEBUG)
    warnings.showwarning = _log_warning
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    console = _BarHandler(logging.INFO if _speaks() else logging.WARNING)
    console.setFormatter(_LOG_LINE)
    root.addHandler(console)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Take the place of ``warnings.showwarning``, which prints."""
    logging.getLogger(__name__).debug("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


def log_to(file: Path) -> None:
    """Also log to this file, which replaces the file of the previous call.

    Other handlers and the log level do not change, so a notebook keeps its own.

    Raises:
        FileError: The file cannot be written.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LogFile)]:
        root.removeHandler(handler)
        handler.close()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(file)
    except OSError as error:
        raise FileError(f"{file}: cannot write the log ({error.strerror}); choose another --log_folder") from error
    handler.setFormatter(_LOG_LINE)
    root.addHandler(handler)


def run_script(main: Callable[[], None], flags: Mapping[str, str] | None = None) -> NoReturn:
    """Run a script's ``main`` with logging, then exit.

    The exit status is 0 on success, the error's status after a user error (printed in one line), 130 after Ctrl-C.

    Args:
        main: The script's main function.
        flags: Maps library arguments to flags, for flags whose name differs from the argument's.
    """
    name = Path(sys.argv[0]).name
    _keep_console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start_logging()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if not _speaks() and not isinstance(error, FileError):
            sys.exit(error.status)
        line = str(error)
        if isinstance(error, ArgumentError):
            line = f"--{(flags or {}).get(error.name, error.name)}{error.text}"
        _end(f"{name}: {line}", error.status)
    except KeyboardInterrupt:
        _end(
            f"{name}: interrupted; completed results are saved; run the same command again to continue "
            "(with --resume if the script has that flag)",
            130,
        )
    except (MemoryError, RuntimeError) as error:
        if "RANK" in os.environ and re.search("(closed|reset) by peer|Broken pipe", str(error)):
            _end(f"{name}: another training process exited; see its error message", 1)
        # torch's CPU allocator raises a plain RuntimeError
        gpu = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in str(error)
        if not (isinstance(error, MemoryError) or gpu or "can't allocate memory" in str(error)):
            raise
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        _end(f"{name}: not enough memory ({reason}); try smaller batches", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{name}: {where}{error.strerror or error}", 1)
    sys.exit(0)


def _speaks() -> bool:
    """Whether this process prints messages. Under torchrun, only the first does, since all have the same flags."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def _end(line: str, status: int) -> NoReturn:
    print(line.replace("\n", " "), file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(status)


# Flags that the paper's code parses but never reads (wait_start sleeps before the work). True: takes a value.
PAPER_FLAGS = {
    "coreset_epochs": True,
    "coreset_epoch_selection": True,
    "coreset_warmup_ratio": True,
    "lower_index": True,
    "m_samples": True,
    "ntk_velocity_epoch": True,
    "ntk_chosen_metric": True,
    "out_folder": True,
    "plots_folder": True,
    "cumulative": True,
    "weight_func": True,
    "mode": True,
    "pivots": True,
    "mid_point": True,
    "pivot_sample": True,
    "pretrain_epoch": True,
    "late_epoch": True,
    "pretrain_splits": True,
    "coeff_reg": True,
    "mem_scale_coeff": True,
    "coreset_splits": True,
    "alpha": True,
    "proxy": True,
    "starting_index": True,
    "deactivate_bn": False,
    "wait_start": False,
}


def _only(name: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text != name:
            raise argparse.ArgumentTypeError(f"{text!r}: this script accepts only {name}; use train_prune.py")
        return text

    return parse
