"""All that is wrong with the files of a data set, reported at once rather than one restart each."""

from pathlib import Path

from src.errors import FileError

MOST_LISTED = 20


class Faults:
    """Collects unusable files; ``refuse`` reports them in one line.

    Args:
        root: The folder or archive that the files belong to; long lists name it once.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        """Note what is wrong with a file, named relative to the root, and what to do, such as "give image_size"."""
        self._found.append((name, reason))

    def refuse(self) -> None:
        """Stop if anything was found.

        Raises:
            FileError: Lists up to ``MOST_LISTED`` files.
        """
        if not self._found:
            return
        if len(self._found) == 1:
            name, reason = self._found[0]
            raise FileError(f"{self.root / name}: {reason}", f"{self.root / name}: {_with_flags(reason)}")
        listed = list(enumerate(self._found[:MOST_LISTED], 1))
        texts = [f"({k}) {name}: {reason}" for k, (name, reason) in listed]
        lines = [f"({k}) {name}: {_with_flags(reason)}" for k, (name, reason) in listed]
        rest = len(self._found) - len(listed)
        more = f"; and {rest} more" if rest else ""
        start = f"{self.root}: these files or folders cannot be used: "
        raise FileError(f"{start}{'; '.join(texts)}{more}", f"{start}{'; '.join(lines)}{more}")


def _with_flags(reason: str) -> str:
    """A reason in terms of flags, for users of the scripts."""
    return reason.replace("give image_size", "give --image_size")
