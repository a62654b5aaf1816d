"""Feature maps from any timm model; the only module that imports timm.

Swin follows the official detector where timm differs: any input size, maps padded before the cyclic shift, and a
normalisation of its own on every output.
"""

from __future__ import annotations

import difflib
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_scale.config.schema import BackboneConfig
from dino_scale.errors import ConfigError
from dino_scale.model.backbone_weights import load_backbone_weights, name_in_timm
from dino_scale.model.norms import FrozenBatchNorm, group_norm
from dino_scale.torchvision_compat import ensure_importable

ensure_importable()
import timm  # noqa: E402
from timm.layers import BatchNormAct2d  # noqa: E402
from timm.models._features import FeatureListNet  # noqa: E402
from timm.models._manipulate import group_with_matcher  # noqa: E402
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse  # noqa: E402

_SWIN = "swin_"
_UNNORMALISED = (_SWIN, "convnext")  # families whose stages end in a bare residual sum
_FIRST_STRIDE = 4  # features of a smaller stride belong to the stem


class Backbone(nn.Module):
    """timm features at `config.outputs`. `channels` are their widths.

    pretrained: whether to load the weights that the configuration names.
    """

    def __init__(self, config: BackboneConfig, pretrained: bool) -> None:
        super().__init__()
        self.config = config
        self.body = _create(config)
        if pretrained and config.weights:
            load_backbone_weights(self.body, Path(config.weights), config.name)
        self.channels: list[int] = list(self.body.feature_info.channels())
        self.channels_last = self.body.output_fmt == "NHWC"
        self.multiple = 4 if config.name.startswith(_SWIN) else 1
        normed = config.name.startswith(_UNNORMALISED)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if normed else nn.Identity() for width in self.channels)
        _replace_batch_norm(self.body, config)
        _freeze_stages(self.body, config)
        if config.name.startswith(_SWIN):
            _pad_before_shift(self.body)
        if config.checkpoint_activations:
            _checkpoint_activations(self.body)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W). Returns (B, channels[i], h, w) maps, finest first."""
        height, width = images.shape[-2:]
        images = functional.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        return [self._normed(one, norm) for one, norm in zip(self.body(images), self.norms, strict=True)]

    def depths(self) -> dict[str, int]:
        """How many blocks (timm's own grouping) lie between each parameter and the backbone's end; 0: in the last.

        Names as in `named_parameters()`. The norms of the outputs, which timm does not have, are at 0.
        """
        matcher = _group_matcher(self.config)
        names = {name_in_timm(name): name for name, _ in self.body.named_parameters()}
        order = group_with_matcher(((name, name) for name in names), matcher, reverse=True)
        last = max(order.values())
        depths = {f"body.{names[name]}": last - place for name, place in order.items()}
        return {name: depths.get(name, 0) for name, _ in self.named_parameters()}

    def _normed(self, feature: Tensor, norm: nn.Module) -> Tensor:
        if isinstance(norm, nn.Identity):
            return feature.permute(0, 3, 1, 2) if self.channels_last else feature
        last = feature if self.channels_last else feature.permute(0, 2, 3, 1)
        return norm(last).permute(0, 3, 1, 2)


def _create(config: BackboneConfig) -> Any:
    """The timm feature network, randomly initialised."""
    architecture = config.name.split(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(near)}" if near else "see timm.list_models()"
        raise ConfigError(f"model.backbone.name is '{config.name}': expected a timm architecture; {hint}")
    arguments: dict[str, Any] = dict(config.arguments)
    if config.drop_path > 0:
        arguments["drop_path_rate"] = config.drop_path
    if architecture.startswith(_SWIN):
        # Windows keep their size and shift on maps of any size.
        arguments = {"strict_img_size": False, "always_partition": True, "drop_path_rate": 0.0, **arguments}
    try:
        body = timm.create_model(
            config.name, pretrained=False, features_only=True, out_indices=config.outputs, **arguments
        )
    except (TypeError, RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise ConfigError(
            f"model.backbone '{config.name}' cannot be built with outputs {config.outputs} and arguments "
            f"{config.arguments}: {error}; expected features and arguments that timm offers for it"
        ) from error
    if not isinstance(body, FeatureListNet):
        raise ConfigError(
            f"model.backbone.name is '{config.name}': expected a hierarchical network whose stages are timm features "
            "(ResNet, Swin, ConvNeXt, ...)"
        )
    return body


def _group_matcher(config: BackboneConfig) -> Any:
    """timm's rule for which parameters make a block; only the whole network has it, not the feature network."""
    with torch.device("meta"):
        whole = timm.create_model(config.name, pretrained=False, **config.arguments)
    if not hasattr(whole, "group_matcher"):
        raise ConfigError(
            f"optimizer.backbone_layer_decay: timm has no group_matcher for {config.name}; expected 1.0 with it"
        )
    return whole.group_matcher(coarse=False)


def _replace_batch_norm(body: nn.Module, config: BackboneConfig) -> None:
    """Batch normalisation as configured; where it would learn its statistics from batches, a refusal."""
    for name, module in list(body.named_modules()):
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if config.norm == "native":
            raise ConfigError(
                f"model.backbone.norm is 'native' but {config.name} has batch normalisation ({name}), whose running "
                "statistics depend on the number of workers: set it to 'frozen_batch' or 'group'"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(parent), leaf, _substitute(module, config.norm))


def _substitute(norm: Any, kind: str) -> nn.Module:
    """Frozen or group normalisation in the place of a batch normalisation, with what timm fused into it."""
    replacement: nn.Module
    if kind == "frozen_batch":
        replacement = FrozenBatchNorm(norm.num_features, norm.eps)
        replacement.load_state_dict({name: value for name, value in norm.state_dict().items() if "tracked" not in name})
    else:
        replacement = group_norm(norm.num_features)
        replacement.load_state_dict({"weight": norm.weight.detach(), "bias": norm.bias.detach()})
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(replacement, norm.drop, norm.act)
    return replacement


def _freeze_stages(body: Any, config: BackboneConfig) -> None:
    """Stem and the first stages stop training. Stage k is the k-th timm feature with a stride of at least 4."""
    if config.frozen_stages == 0:
        return
    stages = [info["module"] for info in body.feature_info.info if info["reduction"] >= _FIRST_STRIDE]
    if config.frozen_stages > len(stages):
        raise ConfigError(
            f"model.backbone.frozen_stages is {config.frozen_stages}: expected at most {len(stages)}, the stages of "
            f"{config.name}"
        )
    last = stages[config.frozen_stages - 1].replace(".", "_")
    for name, module in body.items():
        module.requires_grad_(False)
        if name in (last, stages[config.frozen_stages - 1]):
            return


def _checkpoint_activations(body: Any) -> None:
    """Recomputation block by block where timm's stages offer it, stage by stage elsewhere."""
    stages = [module for module in body.modules() if module is not body and hasattr(module, "grad_checkpointing")]
    for stage in stages:
        stage.grad_checkpointing = True
    if not stages:
        body.set_grad_checkpointing(True)


def _pad_before_shift(body: nn.Module) -> None:
    """Every Swin block attends as in the official detector."""
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module._attn = types.MethodType(_window_attention, module)


def _window_attention(block: Any, x: Tensor) -> Tensor:
    """Attention in (shifted) windows of maps (B, H, W, C) of any size.

    timm shifts and then pads; the official detector pads right and below first, which is the same only where H and W
    are multiples of the window.
    """
    _, height, width, _ = x.shape
    window, shift = block.window_size, block.shift_size
    x = functional.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    shifted = any(shift)
    mask = block.get_attn_mask(x) if shifted else None
    if shifted:
        x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
    windows = window_partition(x, window).flatten(1, 2)
    windows = block.attn(windows, mask=mask).unflatten(1, window)
    x = window_reverse(windows, window, x.shape[1], x.shape[2])
    if shifted:
        x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
    return x[:, :height, :width].contiguous()
