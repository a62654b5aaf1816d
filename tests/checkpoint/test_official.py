"""Official checkpoints: every entry has its place, comes back bit for bit, and nothing in a file is run."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dino_scale.checkpoint.official_convert import (
    Converted,
    from_official,
    official_settings,
    position_index,
    to_official,
)
from dino_scale.checkpoint.official_file import read_official
from dino_scale.checkpoint.official_model import OfficialModel, infer_model
from dino_scale.config.schema import BackboneConfig, DenoisingConfig, ModelConfig
from dino_scale.errors import DataError, UserError
from tests.support.official import checkpoint, filled, recorded_shapes, small_r50_shapes

SWIN_L = "swin_large_patch4_window12_384"
SWIN = {"norm": "native", "frozen_stages": 0}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return filled(small_r50_shapes())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def hollow(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory, and the true position indices."""
    return {
        name: position_index(12) if name.endswith("relative_position_index") else torch.zeros(1).expand(shape)
        for name, shape in shapes.items()
    }


def swin_l_5scale_shapes() -> dict[str, list[int]]:
    """Not recorded: the recorded 5-scale transformer on the recorded Swin, with a norm on its first stage too."""
    five, swin = recorded_shapes("r50_5scale"), recorded_shapes("swinL_4scale")
    shapes = {name: shape for name, shape in five.items() if not name.startswith("backbone.")}
    shapes |= {name: shape for name, shape in swin.items() if name.startswith("backbone.")}
    shapes |= {"backbone.0.norm0.weight": [192], "backbone.0.norm0.bias": [192]}
    widths = {0: 192, 1: 384, 2: 768, 3: 1536, 4: 1536}
    return shapes | {
        f"input_proj.{level}.0.weight": [256, width, *shapes[f"input_proj.{level}.0.weight"][2:]]
        for level, width in widths.items()
    }


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (recorded_shapes("r50_4scale"), ModelConfig()),
        (recorded_shapes("r50_5scale"), ModelConfig(levels=5, backbone=BackboneConfig(outputs=(1, 2, 3, 4)))),
        (recorded_shapes("swinL_4scale"), ModelConfig(backbone=BackboneConfig(SWIN_L, outputs=(1, 2, 3), **SWIN))),
        (swin_l_5scale_shapes(), ModelConfig(levels=5, backbone=BackboneConfig(SWIN_L, outputs=(0, 1, 2, 3), **SWIN))),
    ],
    ids=["r50_4scale", "r50_5scale", "swinL_4scale", "swinL_5scale"],
)
def test_released_models_are_recognised_and_covered(shapes: dict[str, list[int]], config: ModelConfig) -> None:
    given = hollow(shapes)
    found = infer_model(given, {})
    assert found == OfficialModel(config, classes=91)
    converted = from_official(given, found)
    assert converted.sources.keys() == given.keys()
    assert {own for own in converted.sources.values() if own} == converted.state.keys()
    back = to_official(converted.state, config)
    assert {name: list(value.shape) for name, value in back.items()} == shapes


def test_recorded_sizes() -> None:
    """538 and 604 distinct tensors behind 626 and 716 entries (24 position indices among the latter)."""
    for name, entries, tensors in (("r50_4scale", 626, 538), ("swinL_4scale", 716, 604)):
        given = hollow(recorded_shapes(name))
        converted = from_official(given, infer_model(given, {}))
        assert (len(converted.sources), len(converted.state)) == (entries, tensors)


def test_round_trip_is_bit_equal(state: dict[str, Tensor]) -> None:
    state = {name: value.clone() for name, value in state.items()}
    state["transformer.level_embed"][0, :2] = torch.tensor([float("nan"), -0.0])  # equal in bits, not by ==
    found = infer_model(state, {})
    back = to_official(from_official(state, found).state, found.config)
    assert back.keys() == state.keys()
    assert [name for name in state if not same_bits(back[name], state[name])] == []


def test_settings_come_back(state: dict[str, Tensor]) -> None:
    config = ModelConfig(
        backbone=BackboneConfig(arguments={"layers": [1, 1, 1, 1]}),
        encoder_layers=1,
        decoder_layers=2,
        queries=30,
        heads=4,
        points=8,
        dropout=0.1,
        position_temperature=10000.0,
        look_forward="once",
        denoising=DenoisingConfig(queries=50, box_noise=0.4, label_noise=0.25),
    )
    assert infer_model(state, official_settings(config, 91)) == OfficialModel(config, 91)


def test_position_index_is_the_published_one() -> None:
    """As written in the Swin paper's code: shifted differences of the coordinates, row major."""
    side = 4
    index = position_index(side)
    for a in range(side * side):
        for b in range(side * side):
            down, right = a // side - b // side, a % side - b % side
            assert int(index[a, b]) == (down + side - 1) * (2 * side - 1) + right + side - 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_embed.1.bias": torch.zeros(91)}, r"'class_embed\.1\.bias' differs from .*decoder layers do not share"),
        ({"transformer.extra.weight": torch.zeros(1)}, r"1 left over \(transformer\.extra\.weight\)"),
        ({"label_enc.weight": None}, r"1 missing \(label_enc\.weight\)"),
        ({"backbone.0.body.fc.bias": torch.zeros(1), "input_proj.0.1.bias": None}, "1 left over .* and 1 missing"),
        ({"transformer.level_embed": None}, r"'transformer\.level_embed' is missing"),
        ({"transformer.level_embed": torch.zeros(3)}, r"has shape \(3,\): expected 2 dimensions"),
        ({"label_enc.weight": torch.zeros(92, 8)}, r"'label_enc\.weight' is .* shape \(92, 8\): expected"),
        ({"label_enc.weight": torch.zeros(92, 256).half()}, r"'label_enc\.weight' is torch\.float16"),
        ({"input_proj.0.0.weight": torch.zeros(256, 7, 1, 1)}, r"input_proj\.0 expects 7 channels"),
        ({"backbone.0.body.conv1.weight": None}, "neither a ResNet nor a Swin"),
        ({"backbone.0.body.layer1.0.conv3.weight": None}, r"'backbone.*conv3\.weight' is missing"),
    ],
)
def test_what_does_not_fit_is_named(state: dict[str, Tensor], change: dict[str, Tensor | None], words: str) -> None:
    altered = {name: value for name, value in (state | change).items() if value is not None}
    with pytest.raises(DataError, match=words):
        from_official(altered, infer_model(altered, {}))


def test_wrong_position_index_is_refused() -> None:
    given = hollow(recorded_shapes("swinL_4scale"))
    name = "backbone.0.layers.0.blocks.0.attn.relative_position_index"
    given[name] = given[name].flip(0)
    with pytest.raises(DataError, match=rf"'{re.escape(name)}' differs from the one of its window size"):
        from_official(given, infer_model(given, {}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pre_norm": True}, "pre_norm=True: expected False"),
        ({"embed_init_tgt": False}, "embed_init_tgt=False"),
        ({"pe_temperatureH": 20, "pe_temperatureW": 30}, "expected the same for both"),
        ({"nheads": 7}, "nheads is 7"),
        ({"nheads": None}, "nheads=None: expected a number"),
        ({"dilation": True}, "dilation=True"),
    ],
)
def test_options_without_a_counterpart_are_refused(state: dict[str, Tensor], options: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        infer_model(state, options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_selection": "none"}, r"model\.query_selection of these weights is 'none'"),
        ({"backbone": BackboneConfig(norm="group")}, r"model\.backbone\.norm .* expected 'frozen_batch'"),
        ({"backbone": BackboneConfig(name="convnext_tiny", norm="native")}, "expected a ResNet or a Swin"),
        ({"denoising": DenoisingConfig(kind="plain")}, r"model\.denoising\.kind .* expected 'contrastive'"),
    ],
)
def test_models_the_official_code_lacks_are_not_exported(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        to_official({}, replace(ModelConfig(), **change))


# Files.


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_parts_prefix_and_options_are_read(tmp_path: Path) -> None:
    content = checkpoint({"a.weight": torch.ones(2)}, dn_number=300)
    content["ema_model"] = OrderedDict({"module.a.weight": torch.zeros(2)})
    path = saved(tmp_path / "x.pth", content)
    file = read_official(path, "model")
    assert (list(file.state), file.settings["dn_number"]) == (["a.weight"], 300)
    assert torch.equal(read_official(path, "ema_model").state["a.weight"], torch.zeros(2))


def test_absent_parts_and_files_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"model": {}, "epoch": 1})
    with pytest.raises(UserError, match=r"no part 'ema_model': expected one of its parts, which are epoch, model"):
        read_official(path, "ema_model")
    with pytest.raises(UserError, match="no such file"):
        read_official(tmp_path / "y.pth", "model")
    with pytest.raises(DataError, match="is no tensor"):
        read_official(saved(tmp_path / "z.pth", {"model": {"a": 3}}), "model")
    with pytest.raises(DataError, match="holds a Tensor"):
        read_official(saved(tmp_path / "t.pth", torch.ones(1)), "model")
    with pytest.raises(DataError, match="'args' is a list"):
        read_official(saved(tmp_path / "a.pth", {"model": {}, "args": []}), "model")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn", b"\x80\x04."])
def test_torn_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_official(path, "model")


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("place", ["model", "args", "namespace", "epoch"])
def test_hostile_files_do_not_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not open the door either
    marker = tmp_path / "ran"
    content = checkpoint({"a": torch.ones(1)})
    hostile = Hostile(marker)
    content |= {"args": Namespace(x=hostile)} if place == "namespace" else {place: hostile}
    with pytest.raises(DataError, match=r"refused, it would call \w+\.mkdir"):
        read_official(saved(tmp_path / "x.pth", content), "model")
    assert not marker.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert marker.exists(), "the same file does run where it is trusted"


def test_only_a_namespace_is_let_through(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", checkpoint({"a": torch.ones(1)}, share=Fraction(1, 3)))
    with pytest.raises(DataError, match=r"refused, it would call fractions\.Fraction: expected"):
        read_official(path, "model")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("neck.convs.0.conv.weight", "is a detrex checkpoint .*temperature 10000"),
        ("transformer.encoder.layers.0.attentions.0.value_proj.weight", "is a detrex checkpoint"),
        ("bbox_head.cls_branches.0.weight", "is an mmdetection checkpoint"),
    ],
)
def test_checkpoints_of_other_projects_are_refused_with_the_reason(name: str, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", {"model": {"label_enc.weight": torch.ones(80, 2), name: torch.ones(1)}})
    with pytest.raises(DataError, match=words) as caught:
        read_official(path, "model")
    assert "\n" not in str(caught.value)


def test_converted_tells_constants_apart() -> None:
    given = hollow(recorded_shapes("swinL_4scale"))
    converted: Converted = from_official(given, infer_model(given, {}))
    constants = [official for official, own in converted.sources.items() if own is None]
    assert len(constants) == 24
    assert all(name.endswith("relative_position_index") for name in constants)
