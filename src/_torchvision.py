"""Make ``import torchvision`` work with a CPU-only torch.

torchvision's published wheel contains operators compiled for CUDA. They do not load with a CPU build of torch, and
the import fails with ``operator torchvision::nms does not exist``. This project uses none of those operators, so
declaring the two missing schemas is enough. A normal installation never enters the ``except`` branch.

Import torchvision from this module (``from src._torchvision import torchvision``), and only when it is needed:
the import takes seconds.
"""

import sys

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    import torch

    for _name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[_name]
    # The library object must stay alive; its definitions are removed when it is garbage-collected.
    SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in ("nms", "qnms"):
        SCHEMAS.define(f"{_schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
