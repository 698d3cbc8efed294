"""What the pruning scripts share: pre-trained networks, selections and their files, and the runs on them."""

from src.pruning.choice import Choice, select
from src.pruning.files import read_selection
from src.pruning.pretraining import Busy
from src.pruning.run import PrunedRun

__all__ = ["Busy", "Choice", "PrunedRun", "read_selection", "select"]
