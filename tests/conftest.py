"""Shared fixtures. The torchvision shim must run before anything imports torchvision."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import src  # noqa: E402, F401
