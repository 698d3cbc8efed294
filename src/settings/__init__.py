"""Flag groups that scripts compose: the one place in a package that knows argparse."""

from src.metrics.proxy import score_folders
from src.settings.common import (
    add_augmentation_flags,
    add_compute_flags,
    add_data_flags,
    add_folder_flags,
    add_model_choice,
    add_model_flags,
    add_overwrite_flag,
    add_run_flags,
    add_score_flags,
    add_seed_flag,
    add_training_flags,
    splits_folder,
)
from src.settings.values import SEED, file_name, fraction, number, whole_number

__all__ = [
    "SEED",
    "add_augmentation_flags",
    "add_compute_flags",
    "add_data_flags",
    "add_folder_flags",
    "add_model_choice",
    "add_model_flags",
    "add_overwrite_flag",
    "add_run_flags",
    "add_score_flags",
    "add_seed_flag",
    "add_training_flags",
    "file_name",
    "fraction",
    "number",
    "score_folders",
    "splits_folder",
    "whole_number",
]
