"""Make ``import torchvision`` work beside a CPU-only torch.

torchvision's published wheel carries operators compiled for CUDA. Beside a CPU build of torch they do not load,
and the import fails with ``operator torchvision::nms does not exist``. This project uses none of those operators,
so declaring the two missing schemas is enough. A normal installation never enters the ``except`` branch.

Modules take torchvision from here (``from src._torchvision import torchvision``), as importing it takes seconds.
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
    # The library object must stay alive, or its definitions are withdrawn.
    SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in ("nms", "qnms"):
        SCHEMAS.define(f"{_schema}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
