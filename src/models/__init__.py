"""Models: one builder, one interface (``features``, ``head``, ``forward``), and one registry."""

from src.lazy import lazy_names
from src.models.registry import (
    MODELS,
    ModelConfig,
    ModelEntry,
    build_model,
    model_entry,
    model_flag,
    model_name,
    model_option,
    report_model_error,
    require_weights,
)

__getattr__ = lazy_names(__name__, base=["FeatureReader", "Network"])

__all__ = [
    "MODELS",
    "FeatureReader",
    "ModelConfig",
    "ModelEntry",
    "Network",
    "build_model",
    "model_entry",
    "model_flag",
    "model_name",
    "model_option",
    "report_model_error",
    "require_weights",
]
