"""Names of the official repository for our parameters (DINO with a ResNet or Swin backbone)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_RENAMES = (
    (r"^backbone\.body\.layers_(\d+)\.blocks\.", r"backbone.0.layers.\1.blocks."),  # Swin
    (r"^backbone\.body\.patch_embed\.", "backbone.0.patch_embed."),  # Swin
    (r"^backbone\.body\.", "backbone.0.body."),  # ResNet: timm's names are torchvision's
    (r"^neck\.projections\.(\d+)\.", r"input_proj.\1.0."),
    (r"^neck\.norms\.(\d+)\.", r"input_proj.\1.1."),
    (r"^level_embedding\.weight$", "transformer.level_embed"),
    (r"^queries\.content\.", "transformer.tgt_embed."),
    (r"^queries\.transform\.", "transformer.enc_output."),
    (r"^queries\.norm\.", "transformer.enc_output_norm."),
    (r"^queries\.class_head\.", "transformer.enc_out_class_embed."),
    (r"^queries\.box_head\.", "transformer.enc_out_bbox_embed."),
    (r"^denoiser\.label_embedding\.", "label_enc."),
    (r"^decoder\.position_head\.", "transformer.decoder.ref_point_head."),
    (r"^decoder\.norm\.", "transformer.decoder.norm."),
    (r"^(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
)
_RENAMES_IN_ENCODER_LAYER = (
    ("attention_norm.", "norm1."),
    ("feedforward_norm.", "norm2."),
    ("attention.", "self_attn."),
)
_RENAMES_IN_DECODER_LAYER = (
    ("self_attention_norm.", "norm2."),
    ("cross_attention_norm.", "norm1."),
    ("feedforward_norm.", "norm3."),
    ("self_attention.projection_", "self_attn.in_proj_"),
    ("self_attention.output.", "self_attn.out_proj."),
    ("cross_attention.", "cross_attn."),
)
_RENAMES_IN_BLOCK = (
    (r"^feedforward\.expand\.", "linear1."),
    (r"^feedforward\.contract\.", "linear2."),
    (r"_attn\.offsets\.", "_attn.sampling_offsets."),
    (r"_attn\.weights\.", "_attn.attention_weights."),
    (r"_attn\.value\.", "_attn.value_proj."),
    (r"_attn\.output\.", "_attn.output_proj."),
)
_LAYER = re.compile(r"^(transformer\.(encoder|decoder)\.layers\.\d+\.)(.+)$")
_SHARED_HEAD = re.compile(r"^decoder\.(class|box)_head\.(.+)$")
_SWIN_DOWNSAMPLE = re.compile(r"^backbone\.body\.layers_(\d+)\.(downsample\..+)$")
_OUTPUT_NORM = re.compile(r"^backbone\.norms\.(\d+)\.(.+)$")


def official_names(name: str, decoder_layers: int, outputs: Sequence[int] = ()) -> tuple[str, ...]:
    """Every name under which the official state dict stores our parameter or buffer `name`.

    One, except for the heads that the decoder layers share: the official model registers them under two parents in
    each layer. The first name is the one its named_parameters() gives. outputs: stages that the backbone puts out,
    which number the output norms of a Swin.
    """
    shared = _SHARED_HEAD.match(name)
    downsample, norm = _SWIN_DOWNSAMPLE.match(name), _OUTPUT_NORM.match(name)
    if downsample:  # timm halves the map before a stage, the official Swin after the one before it
        return (f"backbone.0.layers.{int(downsample[1]) - 1}.{downsample[2]}",)
    if norm:
        return (f"backbone.0.norm{outputs[int(norm[1])]}.{norm[2]}",)
    if shared:
        head = {"class": "class_embed", "box": "bbox_embed"}[shared[1]]
        parents = ("transformer.decoder.", "")
        return tuple(f"{parent}{head}.{layer}.{shared[2]}" for parent in parents for layer in range(decoder_layers))
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    layer = _LAYER.match(name)
    if layer:
        renames = _RENAMES_IN_ENCODER_LAYER if layer[2] == "encoder" else _RENAMES_IN_DECODER_LAYER
        name = layer[1] + _in_block(_first_prefix(layer[3], renames))
    return (name,)


def _first_prefix(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for prefix, replacement in renames:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def _in_block(name: str) -> str:
    for pattern, replacement in _RENAMES_IN_BLOCK:
        name = re.sub(pattern, replacement, name)
    return name
