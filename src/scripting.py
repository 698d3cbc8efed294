"""How a script starts and ends: log lines, one line for what the user can mend, exit statuses."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from src.errors import FlagError, UserError


class _BarHandler(logging.Handler):
    """Writes log lines above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging(file: Path | None = None, quiet: bool = False) -> None:
    """Send log lines to the console and, if given, to a file; ``quiet`` keeps the console to warnings."""
    form = logging.Formatter("%(asctime)s | %(levelname)-9s | %(message)s", "%Y-%m-%d %H:%M:%S")
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    handlers: list[logging.Handler] = [_BarHandler()]
    handlers[0].setLevel(logging.WARNING if quiet else logging.INFO)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(file))
        except OSError as error:
            raise FlagError(f"--log_folder {file.parent}: cannot be written ({error.strerror})") from error
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main`` and exit: 0, the status of a user error (one line), or 130 after Ctrl-C."""
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _end(f"{name}: {error}", error.status)
    except KeyboardInterrupt:
        _end(f"{name}: interrupted; what was finished is on disk, and --resume continues where it applies", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{name}: {where}{error.strerror or error}", 1)
    sys.exit(0)


def _end(line: str, status: int) -> NoReturn:
    print(line.replace("\n", " "), file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(status)
