"""Multi-scale deformable attention on the raw outputs of the offset and weight projections."""

from kernels.deform_attn.op import deform_attn

__all__ = ["deform_attn"]
