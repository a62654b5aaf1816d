"""The weights file: everything needed to use it travels in it, and anything else is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dino_scale.checkpoint.weights import Preparation, Weights, load_weights, save_weights
from dino_scale.config.schema import BackboneConfig, ModelConfig
from dino_scale.errors import DataError, UserError
from dino_scale.structures import Category

WEIGHTS = Weights(
    state={"a": torch.randn(3, 2), "b": torch.arange(4)},
    model=ModelConfig(hidden=64, backbone=BackboneConfig(name="resnet18", arguments={"channels": [8, 16], "x": 1e-5})),
    categories=(Category(3, 'quoted "name"'), Category(11, "Monitor/TV")),
    preparation=Preparation((0.1, 0.2, 0.3), (1.0, 0.5, 0.25), 112, 160),
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    save_weights(path, WEIGHTS)
    loaded = load_weights(path)
    assert replace(loaded, state={}) == replace(WEIGHTS, state={})
    assert all(torch.equal(loaded.state[name], value) for name, value in WEIGHTS.state.items())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing else is left behind"


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such weights file"):
        load_weights(tmp_path / "missing.safetensors")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_weights(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(DataError, match="without dino-scale's header"):
        load_weights(path)
    save_file({"a": torch.ones(1)}, path, metadata={"dino_scale": '{"version": 1, "model": "hiden: 3"}'})
    with pytest.raises(DataError, match="wrong form"):
        load_weights(path)
