"""SAMIS: which training examples does a network memorise?"""

from src import _torchvision  # noqa: F401  (must run before anything imports torchvision)
