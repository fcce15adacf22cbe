"""Makes timm importable next to a CPU build of torch."""

from importlib import import_module

import torch

try:
    import_module("torchvision")  # timm imports it
except RuntimeError:
    # The wheels of torchvision are built for CUDA. Next to a CPU build of torch their operators do not load, and the import
    # fails because it looks up the names of two of them. No model of the zoo calls any.
    LIBRARY = torch.library.Library("torchvision", "DEF")  # kept, since the names live as long as this object
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor boxes) -> Tensor")
    import_module("torchvision")
