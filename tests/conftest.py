"""Shared fixtures. The torchvision shim must run before anything imports torchvision."""

import os
import signal
import sys
from pathlib import Path

# Tests run beside each other: one thread each, also in the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background ignores Ctrl-C, and would have the scripts under test ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import src._torchvision  # noqa: E402, F401
