"""The golden cases: recordings of the official implementation, and our model with the weights they were made with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_scale.checkpoint.official import official_names
from dino_scale.config.schema import BackboneConfig, ModelConfig
from dino_scale.model.denoising import Draws
from dino_scale.model.dino import Dino, build_model
from dino_scale.structures import Targets
from tests.support import fill

FOLDER = Path(__file__).parents[1] / "data" / "goldens"
CLASSES = 91  # the official models count raw COCO ids
CASES = {"small": (2, 3, 4), "small5": (1, 2, 3, 4), "full": (2, 3, 4)}  # name -> timm outputs of the backbone


@dataclass(frozen=True)
class Case:
    """arrays: the recorded tensors. facts: losses, norms, settings. images, padding: the input. targets: its boxes."""

    name: str
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]
    config: ModelConfig
    images: Tensor
    padding: Tensor
    targets: Targets

    def draws(self) -> Draws:
        return read_draws(self.arrays, "cdn.draw.")

    def model(self) -> Dino:
        """Our model with the recorded weights, in evaluation mode."""
        model = build_model(self.config, CLASSES)
        fill_model(model, self.config.decoder_layers)
        if self.facts["forced_topk"]:  # scores of neighbours differ by less than the noise of a sum
            chosen = torch.from_numpy(self.arrays["topk_indices"])
            model.queries.choose = lambda logits: chosen
        return model.eval()


def read_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def read_case(name: str) -> Case:
    facts = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    layers = facts["overrides"]
    config = ModelConfig(
        backbone=BackboneConfig(outputs=CASES[name]),
        levels=len(CASES[name]) + 1,
        encoder_layers=layers.get("enc_layers", 6),
        decoder_layers=layers.get("dec_layers", 6),
        queries=layers.get("num_queries", 900),
    )
    images, padding = _input(facts["input_tag"], facts["sizes"])
    return Case(name, read_arrays(name), facts, config, images, padding, _targets(facts["input_tag"], facts["nobj"]))


def read_draws(arrays: dict[str, np.ndarray], prefix: str) -> Draws:
    label_p, new_label, sign, part = (
        torch.from_numpy(arrays[prefix + name]) for name in ("label_p", "new_label", "sign01", "part")
    )
    return Draws(label_p, new_label, sign, part)


@torch.no_grad()
def fill_model(model: Dino, decoder_layers: int) -> None:
    for name, tensor in model.state_dict().items():
        values = fill.values(official_names(name, decoder_layers)[0], tensor.shape)
        assert values is not None, name
        tensor.copy_(torch.from_numpy(values))


def official_gradients(model: Dino) -> dict[str, Tensor]:
    """A copy of each parameter's gradient under its official name."""
    return {
        official_names(name, model.config.decoder_layers)[0]: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Asserts equal shapes and a largest absolute deviation of at most `tolerance`."""
    assert tuple(actual.shape) == expected.shape
    torch.testing.assert_close(
        actual.detach().double(), torch.from_numpy(expected).double(), rtol=0, atol=tolerance, equal_nan=True
    )


def _input(tag: str, sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    images = torch.zeros(len(sizes), 3, height, width)
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for index, (h, w) in enumerate(sizes):
        images[index, :, :h, :w] = torch.from_numpy(fill.image(f"{tag}.{index}", h, w))
        padding[index, :h, :w] = False
    return images, padding


def _targets(tag: str, counts: list[int]) -> Targets:
    pairs = [fill.targets(f"{tag}.{index}", count) for index, count in enumerate(counts)]
    labels = np.concatenate([labels for labels, _ in pairs])
    boxes = np.concatenate([boxes for _, boxes in pairs])
    return Targets(torch.from_numpy(labels), torch.from_numpy(boxes), tuple(counts))
