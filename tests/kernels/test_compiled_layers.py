"""Layers of the detector under torch.compile, as one graph each: the operator breaks none of them."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dino_scale.model.decoder import DecoderLayer
from dino_scale.model.dino import build_model
from dino_scale.model.encoder import EncoderLayer
from tests.support.tiny_detector import CLASSES, generator, images, targets, tiny


def layer_and_arguments(kind: type[nn.Module]) -> tuple[nn.Module, tuple[Any, ...]]:
    """The first layer of this kind, and what a training step gives it."""
    torch.manual_seed(0)
    model = build_model(tiny(attention="auto"), CLASSES).train()
    layer = next(module for module in model.modules() if isinstance(module, kind))
    seen: list[tuple[Any, ...]] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model(*images(2), targets(3, 5), generator())
    handle.remove()
    return layer, tuple(value.detach() if isinstance(value, Tensor) else value for value in seen[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_layer_compiles_as_one_graph(kind: type[nn.Module]) -> None:
    layer, arguments = layer_and_arguments(kind)

    def gradients(run: Any) -> list[Tensor]:
        output = run(*arguments)
        return [output.detach(), *torch.autograd.grad(output.sin().sum(), list(layer.parameters()))]

    torch._dynamo.reset()
    expected, actual = gradients(layer), gradients(torch.compile(layer, fullgraph=True))
    for computed, eager in zip(actual, expected, strict=True):
        assert torch.allclose(computed, eager, rtol=1e-3, atol=1e-4)
