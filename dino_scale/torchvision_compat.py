"""Makes `import torchvision` work beside a torch without its compiled operators.

A CUDA build of torchvision cannot load its operators next to a CPU build of torch, and then its import fails because
it describes operators that were never declared. timm needs torchvision's Python code only; declaring the two
operators is enough. Where torchvision imports by itself, nothing is declared.
"""

from __future__ import annotations

import functools
import importlib

import torch

_OPERATORS = ("nms", "qnms")


@functools.cache
def ensure_importable() -> torch.library.Library | None:
    """Imports torchvision, declaring its operators first where that is what it lacks.

    Returns the library that holds the declarations (the cache keeps it, and with it them, alive) or None where none
    were needed. The operators stay without an implementation: calling one raises.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library
