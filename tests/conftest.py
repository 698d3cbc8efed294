"""Shared fixtures. The torchvision shim must run before anything imports torchvision."""

import os
import signal
import sys
from pathlib import Path

# Tests run in parallel, so each uses one thread, as do the processes that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the tests in the background ignores SIGINT, and the scripts under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import src._torchvision  # noqa: E402, F401
