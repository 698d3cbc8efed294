"""Networks: one builder, one contract (``features``, ``head``, ``forward``), one registry.

Each family's file registers its models when it is imported, so importing this package fills ``MODELS``.
"""

# The order here is the order in which names are listed to users: the papers' large networks first.
# isort: off
from src.models import resnet, wideresnet, inception, vgg, mobilenet, vit  # noqa: F401
from src.models import lenet, perceptron, small_inception, cnn_deepobs, resnet_frn  # noqa: F401

# isort: on
from src.models.network import Network
from src.models.registry import MODELS, ModelEntry, build_model, model_names

__all__ = ["MODELS", "ModelEntry", "Network", "build_model", "model_names"]
