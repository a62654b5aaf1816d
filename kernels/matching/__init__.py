"""Assignment of predictions to ground truth, all layers and images of a step at once."""

from kernels.matching.op import match

__all__ = ["match"]
