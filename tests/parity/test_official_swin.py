"""The official Swin, written down a second time in plain tensor operations, against ours with converted weights.

The reference below follows the published description of the official backbone: maps are padded right and below to
whole windows inside every block, after the block's first norm; every second block shifts by half a window and hides
pairs of different origin behind -100; four neighbours are merged in the order (even, even), (odd, even), (even, odd),
(odd, odd) of (row, column); outputs are taken before a stage is halved, each through a norm of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dino_scale.checkpoint.official_convert import from_official, position_index, to_official
from dino_scale.checkpoint.official_model import infer_model
from dino_scale.model.dino import Dino, build_model
from tests.support import fill
from tests.support.official import filled, recorded_shapes, small_r50_shapes

OUTPUT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Swin:
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    outputs: tuple[int, ...]

    def shapes(self) -> dict[str, list[int]]:
        """Official names, without the prefix "backbone.0."."""
        shapes = norm_shapes("patch_embed.norm", self.width)
        shapes |= linear_shapes("patch_embed.proj", self.width, [3, 4, 4])
        for stage, depth in enumerate(self.depths):
            width = self.width * 2**stage
            for block in range(depth):
                shapes |= self._block_shapes(f"layers.{stage}.blocks.{block}", width, self.heads[stage])
            if stage + 1 < len(self.depths):
                shapes |= {f"layers.{stage}.downsample.reduction.weight": [2 * width, 4 * width]}
                shapes |= norm_shapes(f"layers.{stage}.downsample.norm", 4 * width)
        for stage in self.outputs:
            shapes |= norm_shapes(f"norm{stage}", self.width * 2**stage)
        return shapes

    def _block_shapes(self, name: str, width: int, heads: int) -> dict[str, list[int]]:
        shapes = norm_shapes(f"{name}.norm1", width) | norm_shapes(f"{name}.norm2", width)
        shapes |= linear_shapes(f"{name}.attn.qkv", 3 * width, [width])
        shapes |= linear_shapes(f"{name}.attn.proj", width, [width])
        shapes |= linear_shapes(f"{name}.mlp.fc1", 4 * width, [width])
        shapes |= linear_shapes(f"{name}.mlp.fc2", width, [4 * width])
        shapes |= {f"{name}.attn.relative_position_bias_table": [(2 * self.window - 1) ** 2, heads]}
        return shapes | {f"{name}.attn.relative_position_index": [self.window**2, self.window**2]}


def norm_shapes(name: str, width: int) -> dict[str, list[int]]:
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def linear_shapes(name: str, out: int, rest: list[int]) -> dict[str, list[int]]:
    return {f"{name}.weight": [out, *rest], f"{name}.bias": [out]}


@dataclass(frozen=True)
class OfficialSwin:
    """state: official names without the prefix "backbone.0."."""

    state: dict[str, Tensor]
    swin: Swin

    def __call__(self, images: Tensor) -> list[Tensor]:
        images = padded(images.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2)
        x = functional.conv2d(images, self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"], 4)
        x = self.norm("patch_embed.norm", x.permute(0, 2, 3, 1))
        outputs = []
        for stage, depth in enumerate(self.swin.depths):
            for block in range(depth):
                shift = self.swin.window // 2 if block % 2 else 0
                x = self.block(f"layers.{stage}.blocks.{block}", x, self.swin.heads[stage], shift)
            if stage in self.swin.outputs:
                outputs.append(self.norm(f"norm{stage}", x).permute(0, 3, 1, 2))
            if stage + 1 < len(self.swin.depths):
                x = self.merge(f"layers.{stage}.downsample", x)
        return outputs

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def merge(self, name: str, x: Tensor) -> Tensor:
        x = padded(x, 2)
        parts = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.norm(f"{name}.norm", torch.cat(parts, -1)) @ self.state[f"{name}.reduction.weight"].T

    def block(self, name: str, x: Tensor, heads: int, shift: int) -> Tensor:
        height, width = x.shape[1:3]
        inside = padded(self.norm(f"{name}.norm1", x), self.swin.window)
        origin = origins(inside.shape[1], inside.shape[2], self.swin.window, shift)
        inside = torch.roll(inside, (-shift, -shift), (1, 2))
        attended = torch.zeros_like(inside)
        side = self.swin.window
        for top in range(0, inside.shape[1], side):
            for left in range(0, inside.shape[2], side):
                part = (slice(None), slice(top, top + side), slice(left, left + side))
                tokens = inside[part].flatten(1, 2)
                seen = self.attend(f"{name}.attn", tokens, origin[part[1:]].flatten(), heads)
                attended[part] = seen.unflatten(1, (side, side))
        x = x + torch.roll(attended, (shift, shift), (1, 2))[:, :height, :width]
        hidden = functional.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.linear(f"{name}.mlp.fc2", hidden)

    def attend(self, name: str, tokens: Tensor, origin: Tensor, heads: int) -> Tensor:
        """Tokens (B, N, C) of one window among themselves."""
        size = tokens.shape[2] // heads
        query, key, value = self.linear(f"{name}.qkv", tokens).unflatten(2, (3, heads, size)).permute(2, 0, 3, 1, 4)
        index = self.state[f"{name}.relative_position_index"]
        bias = self.state[f"{name}.relative_position_bias_table"][index].permute(2, 0, 1)
        hidden = -100.0 * (origin[:, None] != origin[None]).float()
        scores = (query * size**-0.5) @ key.transpose(-1, -2) + bias + hidden
        return self.linear(f"{name}.proj", (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def padded(x: Tensor, multiple: int) -> Tensor:
    """(B, H, W, C) with zeros on the right and below."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % multiple, 0, -x.shape[1] % multiple))


def origins(height: int, width: int, window: int, shift: int) -> Tensor:
    """A number for each place of a shifted map; neighbours there with different numbers were none before the shift."""

    def strips(size: int) -> Tensor:
        place = torch.arange(size)
        return (place >= size - window).long() + (place >= size - shift).long() if shift else place * 0

    return 3 * strips(height)[:, None] + strips(width)[None]


def official_state(swin: Swin) -> dict[str, Tensor]:
    """A whole detector on this backbone, in official naming."""
    shapes = {name: shape for name, shape in small_r50_shapes().items() if not name.startswith("backbone.")}
    widths = [swin.width * 2**stage for stage in swin.outputs]
    for level, width in enumerate([*widths, widths[-1]]):
        shapes[f"input_proj.{level}.0.weight"] = [256, width, *shapes[f"input_proj.{level}.0.weight"][2:]]
    state = filled(shapes)
    for name, shape in swin.shapes().items():
        values = fill.values(f"backbone.0.{name}", shape)
        state[f"backbone.0.{name}"] = position_index(swin.window) if values is None else torch.from_numpy(values)
    return state


def converted_detector(state: dict[str, Tensor]) -> Dino:
    found = infer_model(state, {})
    model = build_model(found.config, found.classes)
    model.load_state_dict(from_official(state, found).state)
    return model.eval()


def test_recorded_names_are_the_ones_used_here() -> None:
    recorded = {
        name.removeprefix("backbone.0."): shape
        for name, shape in recorded_shapes("swinL_4scale").items()
        if name.startswith("backbone.")
    }
    assert Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, (1, 2, 3)).shapes() == recorded


@pytest.mark.parametrize(
    ("window", "size"),
    [(12, (64, 96)), (12, (109, 75)), (12, (201, 50)), (7, (57, 86)), (4, (33, 61)), (12, (5, 3))],
)
def test_converted_weights_give_the_official_outputs(window: int, size: tuple[int, int]) -> None:
    swin = Swin(16, (2, 2, 3, 2), (1, 2, 4, 4), window, outputs=(1, 2, 3))
    state = official_state(swin)
    backbone = {name.removeprefix("backbone.0."): value for name, value in state.items() if "backbone." in name}
    images = torch.from_numpy(fill.image("swin", *size))[None].repeat(2, 1, 1, 1)
    images[1] = images[1].flip(-1)
    with torch.no_grad():
        ours = converted_detector(state).backbone(images)
        official = OfficialSwin(backbone, swin)(images)
    assert len(ours) == len(official) == 3
    for one, other in zip(ours, official, strict=True):
        assert float(other.std()) > 0.5
        torch.testing.assert_close(one, other, rtol=0, atol=OUTPUT_TOLERANCE)


def test_every_backbone_tensor_matters() -> None:
    """Outputs as far apart as these cannot hide a tensor in the wrong place."""
    swin = Swin(16, (2, 2, 2, 2), (1, 2, 4, 4), 4, outputs=(1, 2, 3))
    state = official_state(swin)
    images = torch.from_numpy(fill.image("swin", 61, 45))[None]
    model = converted_detector(state)
    with torch.no_grad():
        before = model.backbone(images)
        for name, tensor in model.backbone.state_dict().items():
            kept = tensor.clone()
            tensor.copy_(tensor.flip(0) if tensor.shape[0] > 1 else tensor + 1)
            after = model.backbone(images)
            tensor.copy_(kept)
            assert max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)) > 1e-2, name


def test_first_stage_output_and_the_way_back() -> None:
    swin = Swin(16, (2, 1, 2), (2, 2, 4), 6, outputs=(0, 1, 2))
    state = official_state(swin)
    found = infer_model(state, {})
    assert found.config.backbone.outputs == (0, 1, 2)
    back = to_official(from_official(state, found).state, found.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
