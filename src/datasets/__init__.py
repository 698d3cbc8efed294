"""Data sets: the catalogue, loading, subsets, splits, and augmented batches."""

from src.datasets.catalogue import (
    CATALOGUE,
    Augmentation,
    DatasetEntry,
    Normalisation,
    dataset_flag,
    dataset_names,
    lookup,
)
from src.datasets.config import DataConfig
from src.datasets.loading import dataset_name, load_dataset
from src.datasets.splits import make_splits, parse_subset, partition, split_path, validation_indices
from src.lazy import lazy_names

__getattr__ = lazy_names(__name__, batches=["Batch", "Batches"], images=["ImageSet"])

__all__ = [
    "CATALOGUE",
    "Augmentation",
    "Batch",
    "Batches",
    "DataConfig",
    "DatasetEntry",
    "ImageSet",
    "Normalisation",
    "dataset_flag",
    "dataset_name",
    "dataset_names",
    "load_dataset",
    "lookup",
    "make_splits",
    "parse_subset",
    "partition",
    "split_path",
    "validation_indices",
]
