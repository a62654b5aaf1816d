"""Weights of a detector with other levels, queries or decoder layers: what is shared comes over, the rest is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_scale.checkpoint.reshape import level_names, reshape
from dino_scale.checkpoint.transfer import Transfer, carry_over
from dino_scale.config.schema import BackboneConfig, DenoisingConfig, ModelConfig
from dino_scale.errors import CheckpointError
from dino_scale.model.dino import Dino, build_model
from dino_scale.structures import Category
from tests.support.tiny_detector import TINY, TINY_BACKBONE, generator, images, targets, tiny

CATEGORIES = [Category(3, "person"), Category(7, "kite")]
SAME = [(0, 0), (1, 1)]
COMMON = [(0, 0), (1, 1), (2, 2), (3, 3)]  # (new level, old level)
FINER = [(1, 0), (2, 1), (3, 2), (4, 3)]
SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    arguments={"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
    outputs=(1, 2, 3),
    norm="native",
    frozen_stages=0,
)


def detector(config: ModelConfig, seed: int) -> Dino:
    torch.manual_seed(seed)
    model = build_model(config, len(CATEGORIES))
    for parameter in model.parameters():  # heads and offsets start at constants, which every model has
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def transfer(old: ModelConfig, new: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], Dino, Transfer]:
    """Weights before, initial weights, the model after the transfer (proved to run), and what was said."""
    source, model = detector(old, 1).state_dict(), detector(new, 2)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.state_dict()
    fitted = reshape(source, old, state, new)
    said = carry_over(fitted.state, state, model.class_tensors(), SAME, CATEGORIES, CATEGORIES, fitted.changes)
    pixels, padding = images(2)
    outputs = model.train()(pixels, padding, targets(1, 2, classes=2), generator())
    assert bool(outputs.boxes.isfinite().all())
    return source, initial, model, said


def assert_rest_is_carried(source: dict[str, Tensor], model: Dino, *changed: str) -> None:
    compared = 0
    for name, value in model.state_dict().items():
        if not any(part in name for part in changed):
            assert torch.equal(value, source[name]), name
            compared += 1
    assert compared > 40


@pytest.mark.parametrize(("queries", "end"), [(30, "start anew"), (12, "are left out")])
@pytest.mark.parametrize("selection", ["mixed", "none"])
def test_queries(queries: int, end: str, selection: str) -> None:
    config = tiny(query_selection=selection)
    source, initial, model, said = transfer(config, replace(config, queries=queries))
    state, kept = model.state_dict(), min(20, queries)
    tables = [name for name in state if name in ("queries.content.weight", "queries.anchors.weight")]
    assert len(tables) == (1 if selection == "mixed" else 2)
    for name in tables:
        assert torch.equal(state[name][:kept], source[name][:kept])
        assert torch.equal(state[name][kept:], initial[name][kept:])
    assert_rest_is_carried(source, model, *tables)
    assert said.table()[0] == f"queries 20 -> {queries}: the first {kept} are carried over, the others {end}"
    assert "queries 20 ->" in said.summary()


@pytest.mark.parametrize("layers", [1, 3])
def test_decoder_layers(layers: int) -> None:
    source, initial, model, said = transfer(TINY, tiny(decoder_layers=layers))
    for name, value in model.state_dict().items():
        assert torch.equal(value, initial[name] if name.startswith("decoder.layers.2.") else source[name]), name
    assert said.changes[0].startswith(f"decoder layers 2 -> {layers}: the first {min(layers, 2)} are carried over")


def by_level(state: dict[str, Tensor], config: ModelConfig, name: str) -> Tensor:
    """The rows of an attention's projection as (heads, levels, ...)."""
    return state[name].unflatten(0, (config.heads, config.levels, -1))


@pytest.mark.parametrize(
    ("old", "new", "pairs"),
    [
        (TINY, tiny(levels=5), COMMON),
        (tiny(levels=5), TINY, COMMON),
        (TINY, tiny(levels=5, backbone=replace(TINY_BACKBONE, outputs=(1, 2, 3, 4))), FINER),
        (tiny(backbone=SWIN), tiny(levels=5, backbone=replace(SWIN, outputs=(0, 1, 2, 3))), FINER),
    ],
    ids=["one more", "one less", "a finer one", "a finer one of Swin"],
)
def test_levels_are_matched_by_scale(old: ModelConfig, new: ModelConfig, pairs: list[tuple[int, int]]) -> None:
    source, initial, model, said = transfer(old, new)
    state = model.state_dict()
    for here, there in pairs:
        assert torch.equal(state["level_embedding.weight"][here], source["level_embedding.weight"][there])
        for part in ("projections", "norms"):
            assert torch.equal(state[f"neck.{part}.{here}.weight"], source[f"neck.{part}.{there}.weight"])
        for name in ("encoder.layers.0.attention.offsets.weight", "decoder.layers.1.cross_attention.weights.bias"):
            assert torch.equal(by_level(state, new, name)[:, here], by_level(source, old, name)[:, there])
    for level in set(range(new.levels)) - dict(pairs).keys():
        assert torch.equal(state["level_embedding.weight"][level], initial["level_embedding.weight"][level])
        assert torch.equal(state[f"neck.projections.{level}.weight"], initial[f"neck.projections.{level}.weight"])
    if new.backbone.name == SWIN.name:
        assert torch.equal(state["backbone.norms.1.weight"], source["backbone.norms.0.weight"])
    assert_rest_is_carried(
        source, model, "level_embedding", "neck.", "offsets.", "attention.weights.", "backbone.norms"
    )
    assert said.changes[0].startswith(f"levels {old.levels} -> {new.levels}: carried over output")


def test_levels_without_a_common_scale_start_anew() -> None:
    one = tiny(levels=1, backbone=replace(TINY_BACKBONE, outputs=(3,)))
    other = tiny(levels=1, backbone=replace(TINY_BACKBONE, outputs=(4,)))
    assert (level_names(one), level_names(other)) == (["output 3"], ["output 4"])
    assert level_names(TINY) == ["output 2", "output 3", "output 4", "output 4 + 1"]


def test_denoising_can_be_turned_off_but_not_on() -> None:
    off = tiny(denoising=DenoisingConfig(kind="none"))
    source, _, model, said = transfer(TINY, off)
    assert_rest_is_carried(source, model)
    assert said.changes == ("denoising: its label embedding is left out",)
    with pytest.raises(CheckpointError, match=r"denoiser\.label_embedding\.weight is not in the weights"):
        transfer(off, TINY)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"encoder_layers": 2}, r"encoder\.layers\.1\.\S+ is not in the weights"),
        ({"encoder_layers": 0}, r"encoder\.layers\.0\.\S+ is in the weights to start from but not in this model"),
        ({"hidden": 64}, r"\S+ has shape \(\S.*\) in the weights"),
        ({"points": 2, "levels": 5}, r"attention\.offsets\.weight has shape"),
        ({"hidden": 64, "queries": 30, "levels": 5}, r"\S+ has shape"),
        ({"query_selection": "pure"}, r"queries\.content\.weight is in the weights to start from but not in"),
        ({"backbone": replace(TINY_BACKBONE, norm="frozen_batch")}, r"backbone\.\S+ is not in the weights"),
    ],
)
def test_other_differences_are_refused_by_name_in_one_line(changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(CheckpointError, match=culprit) as caught:
        transfer(TINY, tiny(**changes))
    assert len(str(caught.value).splitlines()) == 1
    assert "levels, queries and decoder layers" in str(caught.value)


def test_swin_tables_of_other_windows_are_refused_by_name() -> None:
    wider = replace(SWIN, arguments={**SWIN.arguments, "window_size": 8})
    with pytest.raises(CheckpointError, match="relative_position_bias_table has shape"):
        transfer(tiny(backbone=SWIN), tiny(backbone=wider))


@pytest.mark.parametrize("backbone", [TINY_BACKBONE, SWIN], ids=["resnet", "swin"])
def test_no_tensor_depends_on_the_size_of_images(backbone: BackboneConfig) -> None:
    """Fine-tuning at another resolution carries every tensor over, whatever size timm was told."""
    config = tiny(backbone=backbone)
    sized = config
    if backbone is SWIN:
        sized = tiny(backbone=replace(SWIN, arguments={**SWIN.arguments, "img_size": 128}))
    source, _, model, said = transfer(config, sized)
    assert_rest_is_carried(source, model)
    assert said.changes == ()
    for height, width in ((64, 96), (160, 128), (90, 110)):
        with torch.no_grad():
            outputs = model.eval()(*images(2, height, width))
        assert bool(outputs.boxes.isfinite().all())
