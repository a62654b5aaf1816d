"""Our parameters and the official ones: the same set, the same shapes, the same number that trains."""

from __future__ import annotations

import json

import pytest

from dino_scale.checkpoint.official import official_names
from dino_scale.config.schema import ModelConfig
from dino_scale.model.dino import Dino, build_model
from tests.support.goldens import CLASSES, FOLDER


@pytest.fixture(scope="module")
def full_model() -> Dino:
    return build_model(ModelConfig(), CLASSES)


def test_names_and_shapes_cover_the_official_state_dict(full_model: Dino) -> None:
    recorded = json.loads((FOLDER / "state_dict_r50_4scale.json").read_text(encoding="utf-8"))
    ours = {
        official: list(tensor.shape)
        for name, tensor in full_model.state_dict().items()
        for official in official_names(name, decoder_layers=6)
    }
    assert ours == recorded


def test_parameter_counts(full_model: Dino) -> None:
    """Published sizes; 46,670,782 also stands in public training logs of the official code."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in full_model.parameters()]
    assert sum(size for size, _ in sizes) == 46_893_182
    assert sum(size for size, trains in sizes if trains) == 46_670_782
    assert (len(sizes), sum(trains for _, trains in sizes)) == (326, 315)
