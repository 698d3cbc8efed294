"""Result files of the experiments: written as an experiment runs, and read with checks for the figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpe.config import CLASS_COVARIANCES
from src.artifacts import PICKLES, differences, pickle_path, read_pickle, refuse_other_settings, write_pickle
from src.errors import FileError, FlagError


class Result:
    """One result file, written as results come.

    Args:
        path: The pickle.
        args: The flags, for its key ``args``.
        settings: Everything that determines the result, for its key ``settings``.
        resume: Whether to go on from what stands there.
        overwrite: Whether a result of other settings may be replaced.

    Attributes:
        stored: What stood there and may be gone on from; empty for a start from nothing.

    Raises:
        FileError: The file holds a result of other settings, or is damaged.
    """

    def __init__(
        self, path: Path, args: Mapping[str, Any], settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.path, self.args, self.settings = path, dict(args), dict(settings)
        self.stored: dict[str, Any] = {}
        if not path.exists():
            return
        stored = self._read(overwrite)
        if stored is None or (overwrite and differences(stored["settings"], settings)):
            return
        refuse_other_settings(path, stored["settings"], settings)
        if resume:
            self.stored = stored

    def _read(self, overwrite: bool) -> dict[str, Any] | None:
        try:
            stored = read_pickle(self.path)
        except FileError:
            if overwrite:
                return None
            raise
        if isinstance(stored, dict) and isinstance(stored.get("settings"), dict):
            return stored
        if overwrite:
            return None
        raise FileError(
            f"{self.path}: does not say which settings it was made with; give --overwrite to replace it, or another "
            "--name_exp"
        )

    def remove_other(self) -> None:
        """Remove a result of other settings that is to be replaced."""
        if not self.stored and self.path.exists():
            stored = self._read(overwrite=True)
            if stored is None or differences(stored["settings"], self.settings):
                self.path.unlink()

    def write(self, **content: Any) -> Path:
        """Write the result: plain values and numpy arrays by name, with ``args`` and ``settings``."""
        return write_pickle(self.path, {**content, "args": self.args, "settings": self.settings})


# which script writes {experiment}_{kind}.pkl
SCRIPTS = {
    "iter": "1_loo_iterations.py",
    "cv": "2_loo_l2reg.py",
    "scores": "3_validation_sensitivities.py",
    "retrain": "3_validation_sensitivities.py",
    "evolving": "4_evolving_sensitivities.py",
    "leaveclassout": "5_loco.py",
}


class StoredResult:
    """One result file of an experiment, checked value by value as it is read.

    Args:
        folder: Folder of the results.
        name: The experiment's name.
        kind: One of ``SCRIPTS``.

    Raises:
        FileError: The file is missing, damaged, or no dictionary.
    """

    def __init__(self, folder: str | Path, name: str, kind: str) -> None:
        self.name = name
        self.path = pickle_path(folder, name, kind)
        self.script = SCRIPTS[kind]
        self.command = f"python examples/{self.script} --name_exp {name}"
        if Path(folder).resolve() != PICKLES:
            self.command += f" --pickles_folder {folder}"
        if not self.path.exists():
            raise FileError(f"{self.path}: there is no such file; {self.command} makes it{_others(self.path, kind)}")
        values = read_pickle(self.path)
        if not isinstance(values, dict):
            raise FileError(f"{self.path}: holds no dictionary of results; {self.command} makes it anew")
        self.values: dict[str, Any] = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, what: str) -> FileError:
        """The error that says what is wrong with this file."""
        return FileError(f"{self.path}: {what}; {self.command} makes it anew")

    def array(
        self, key: str, ndim: int = 1, *, low: float | None = None, high: float | None = None, gaps: bool = False
    ) -> np.ndarray:
        """Finite numbers, at least one.

        Args:
            key: Their name; lists of numbers count as arrays.
            ndim: How many axes they must have.
            low: Least value, if bounded.
            high: Greatest value, if bounded.
            gaps: Whether some may be NaN.

        Returns:
            float64 array with ``ndim`` axes.

        Raises:
            FileError: There are none, or others.
        """
        if key not in self.values:
            raise self.error(f"lacks {key}")
        try:
            values = np.asarray(self.values[key], dtype=np.float64)
        except (TypeError, ValueError):
            raise self.error(f"{key} is not an array of numbers") from None
        if values.ndim != ndim or values.size == 0:
            raise self.error(f"{key} has shape {values.shape}; {ndim} axes with values were expected")
        known = values[~np.isnan(values)] if gaps else values
        if not np.isfinite(known).all():
            raise self.error(f"{key} holds {np.count_nonzero(~np.isfinite(known))} values that are not finite")
        if known.size == 0:
            raise self.error(f"{key} holds no results yet")
        if (low is not None and known.min() < low) or (high is not None and known.max() > high):
            bounds = [
                f"{name} {bound:g}" for name, bound in (("at least", low), ("at most", high)) if bound is not None
            ]
            found = f"{known.min():g} to {known.max():g}"
            raise self.error(f"{key} goes from {found}; {' and '.join(bounds)} was expected")
        return values

    def integers(self, key: str, low: int, high: int | None = None) -> np.ndarray:
        """Whole numbers within bounds, int64 ``(n,)``.

        Raises:
            FileError: There are none, or others.
        """
        values = self.array(key, low=low, high=high)
        if (values != np.round(values)).any():
            raise self.error(f"{key} holds numbers that are not whole")
        return values.astype(np.int64)

    def number(self, key: str, *, low: float | None = None, high: float | None = None) -> float:
        """One finite number.

        Raises:
            FileError: There is none, or another.
        """
        return float(self.array(key, 0, low=low, high=high))

    def same_length(self, **arrays: np.ndarray) -> None:
        """Check that arrays have one length.

        Raises:
            FileError: They differ.
        """
        if len({len(values) for values in arrays.values()}) > 1:
            raise self.error("lengths differ: " + ", ".join(f"{len(values)} {key}" for key, values in arrays.items()))

    def same_run(self, other: "StoredResult") -> None:
        """Check that another file of this experiment was made with the same settings, where both say theirs.

        Raises:
            FileError: They differ: a run that was to replace an older one stopped before it had written both.
        """
        settings = [result.values.get("settings") for result in (other, self)]
        if not all(isinstance(each, dict) for each in settings):
            return
        found = differences(*settings)
        if found:
            raise FileError(
                f"{self.path} is of another run than {other.path}: {', '.join(found)}; repeat {self.script} with the "
                "settings that you want, --resume and --overwrite, and let it end"
            )

    def is_empty(self, key: str) -> bool:
        """Whether an array is there, but holds nothing yet."""
        values = self.values.get(key)
        return isinstance(values, (list, np.ndarray)) and np.asarray(values, dtype=object).size == 0

    def of(self, key: str, class_cov: str | None) -> str:
        """The key of the estimates ``key`` with a covariance between classes.

        ``key`` itself holds those that the run was made with, ``diag`` where the file does not say;
        ``{key}_{class_cov}`` others.

        Args:
            key: For example ``estimated_nll``.
            class_cov: A name of ``CLASS_COVARIANCES``; None for those of the run.

        Raises:
            FlagError: The file has none.
        """
        own = self.setting("class_cov") or "diag"
        if class_cov in (None, own):
            return key
        if f"{key}_{class_cov}" not in self.values:
            others = [cov for cov in CLASS_COVARIANCES if cov != own and f"{key}_{cov}" in self.values]
            found = " and ".join([own, *others])
            raise FlagError(
                f"--class_cov {class_cov}: {self.path} has no {key}_{class_cov}, only {found}; {self.command} "
                f"--class_cov {class_cov} makes it"
            )
        return f"{key}_{class_cov}"

    def setting(self, flag: str) -> Any:
        """A flag of the run that made the file; None where it is not stored."""
        args = self.values.get("args")
        return args.get(flag) if isinstance(args, dict) else None


def _others(path: Path, kind: str) -> str:
    """Which experiments there are instead."""
    names = sorted(other.name.removesuffix(f"_{kind}.pkl") for other in path.parent.glob(f"*_{kind}.pkl"))
    return f" (there: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
