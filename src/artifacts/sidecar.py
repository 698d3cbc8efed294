"""Every result carries its settings; results of other settings are not overwritten by accident."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.errors import FileError


def parse_settings(path: str | Path, text: Any) -> dict[str, Any]:
    """The settings that a result carries as json text.

    Raises:
        FileError: The text is no json object; ``path`` is named.
    """
    try:
        settings = json.loads(str(text))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise FileError(f"{path}: is damaged, its settings cannot be read; make it anew")
    return settings


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Iterable[str] = ()) -> list[str]:
    """Name the settings that differ, as ``name (stored value there, wanted value here)``.

    Values are compared as json, so a tuple equals the list that it is read back as. A setting that only one side
    has counts as a difference.
    """
    skip = set(ignore)
    lines = []
    for name in sorted((set(stored) | set(wanted)) - skip):
        there, here = stored.get(name), wanted.get(name)
        if json.dumps(there, sort_keys=True, default=str) != json.dumps(here, sort_keys=True, default=str):
            lines.append(f"{name} ({there} there, {here} here)")
    return lines


def refuse_other_settings(
    path: str | Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], ignore: Iterable[str] = ()
) -> None:
    """Stop if ``path`` holds results of other settings.

    Raises:
        FileError: The settings differ; the message names them.
    """
    found = differences(stored, wanted, ignore)
    if found:
        raise FileError(
            f"{path}: holds results of other settings: {', '.join(found)}; "
            "give --overwrite to replace them, or choose other folders"
        )
