"""Data sets: registry, loading, subsets, splits, and augmented batches."""

from src.datasets.registry import (
    DATASETS,
    Augmentation,
    DataConfig,
    DatasetEntry,
    Normalization,
    dataset_flag,
    dataset_name,
    flips_images,
    load_dataset,
    lookup,
)
from src.datasets.splits import make_splits, parse_subset, training_indices, validation_indices
from src.lazy import lazy_names

__getattr__ = lazy_names(__name__, batches=["Batch", "Batches", "ImageSet", "empty_images"])

__all__ = [
    "DATASETS",
    "Augmentation",
    "Batch",
    "Batches",
    "DataConfig",
    "DatasetEntry",
    "ImageSet",
    "Normalization",
    "dataset_flag",
    "dataset_name",
    "empty_images",
    "flips_images",
    "load_dataset",
    "lookup",
    "make_splits",
    "parse_subset",
    "training_indices",
    "validation_indices",
]
