"""What the words for precision mean for computing; how parameters are kept is a matter of training/zero.py."""

from __future__ import annotations

import torch

BF16_PARAMETERS = "bf16_parameters"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context for a forward pass: "fp32" as it is, "bf16" and "bf16_parameters" under bfloat16 autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")
