"""A trained detector from its weights file, ready to look at pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dino_scale.checkpoint.weights import Weights, load_weights
from dino_scale.config.decode import decode_text
from dino_scale.config.schema import EvaluationConfig
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


@dataclass(frozen=True)
class _Settings:
    """What `--set` of evaluate and predict can name: evaluation.KEY."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def evaluation_settings(weights: Weights, overrides: Sequence[str]) -> EvaluationConfig:
    """How pictures are shown to the detector: as the weights file says, each evaluation.KEY=VALUE applied in order.

    ConfigError names every override that cannot be used.
    """
    preparation = weights.preparation
    stored = {name: getattr(preparation, name) for name in ("short_side", "max_size", "detections")}
    return decode_text(json.dumps({"evaluation": stored}), _Settings, "weights", overrides).evaluation


def _first_problem(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return lines[1] if len(lines) > 1 else lines[0]
