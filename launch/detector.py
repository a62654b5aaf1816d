"""A trained detector from its weights file, ready to look at pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dino_scale.checkpoint.weights import Weights, load_weights
from dino_scale.errors import DataError
from dino_scale.model.dino import Dino, build_model


@dataclass(frozen=True)
class Detector:
    """model: on the GPU if there is one, in evaluation mode. weights: the file it came from."""

    model: Dino
    weights: Weights


def open_detector(path: Path) -> Detector:
    """UserError or DataError where the file is missing, altered, or does not hold all the weights of its model."""
    weights = load_weights(path)
    model = build_model(weights.model, len(weights.categories), pretrained=False)
    try:
        model.load_state_dict(weights.state)
    except RuntimeError as error:
        raise DataError(f"{path}: its tensors do not fit its model configuration ({_first_problem(error)})") from None
    return Detector(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), weights)


def _first_problem(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]
