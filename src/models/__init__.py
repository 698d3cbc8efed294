"""Models: one builder, one interface (``features``, ``head``, ``forward``), and one registry."""

from src.lazy import lazy_names
from src.models.registry import MODELS, ModelConfig, ModelEntry, build_model, require_weights

__getattr__ = lazy_names(__name__, base=["Network"])

__all__ = ["MODELS", "ModelConfig", "ModelEntry", "Network", "build_model", "require_weights"]
