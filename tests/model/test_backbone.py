"""Backbones: what is frozen, what is refused, weights from files, and Swin as the official detector runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dino_scale.config.schema import BackboneConfig
from dino_scale.errors import ConfigError, DataError
from dino_scale.model.backbone import Backbone
from dino_scale.model.norms import FrozenBatchNorm, group_norm
from dino_scale.torchvision_compat import ensure_importable
from tests.support.tiny_detector import TINY_BACKBONE

ensure_importable()
import timm  # noqa: E402
from timm.models.swin_transformer import SwinTransformerBlock  # noqa: E402

SWIN = BackboneConfig(
    name="swin_tiny_patch4_window7_224",
    arguments={"embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]},
    outputs=(1, 2, 3),
    norm="native",
    frozen_stages=0,
)
CONVNEXT = BackboneConfig(
    name="convnext_atto",
    arguments={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    outputs=(1, 2, 3),
    norm="native",
    frozen_stages=0,
)
RESNET = replace(TINY_BACKBONE, norm="frozen_batch")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(config: BackboneConfig) -> Backbone:
    torch.manual_seed(0)
    return Backbone(config, pretrained=True)


@pytest.mark.parametrize("config", [RESNET, TINY_BACKBONE, SWIN, CONVNEXT], ids=["frozen", "group", "swin", "convnext"])
@pytest.mark.parametrize("size", [(64, 96), (57, 43)])
def test_maps_have_the_stated_widths_and_strides(config: BackboneConfig, size: tuple[int, int]) -> None:
    backbone = built(config)
    maps = backbone(torch.randn(2, 3, *size))
    assert [one.shape[1] for one in maps] == backbone.channels
    if size == (64, 96):
        assert [tuple(one.shape[-2:]) for one in maps] == [(8, 12), (4, 6), (2, 3)]
    sum(one.square().sum() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters() if parameter.requires_grad)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'resnet5O': expected a timm architecture; nearest: .*resnet50"):
        built(BackboneConfig(name="resnet5O"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(TINY_BACKBONE, norm="native"), "set it to 'frozen_batch' or 'group'"),
        (replace(TINY_BACKBONE, outputs=(2, 9)), "cannot be built"),
        (replace(TINY_BACKBONE, arguments={"width": 3}), "cannot be built"),
        (replace(TINY_BACKBONE, frozen_stages=5), "expected at most 4"),
        (BackboneConfig(name="vit_tiny_patch16_224", outputs=(2, 5, 8)), "expected a hierarchical network"),
    ],
)
def test_backbones_that_cannot_serve_are_refused(config: BackboneConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        built(config)


@pytest.mark.parametrize(
    ("stages", "first_training"),
    [(0, "conv1.0.weight"), (1, "layer2.0.conv1.weight"), (2, "layer3.0.conv1.weight"), (4, None)],
)
def test_frozen_stages(stages: int, first_training: str | None) -> None:
    body = built(replace(RESNET, frozen_stages=stages)).body
    training = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    assert (training[0] if training else None) == first_training
    assert all(not isinstance(module, nn.BatchNorm2d) for module in body.modules())


def test_frozen_stages_of_swin_include_the_stem() -> None:
    body = built(replace(SWIN, frozen_stages=1)).body
    frozen = {name.split(".")[0] for name, parameter in body.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed", "layers_0"}


def test_frozen_norm_is_batch_norm_in_evaluation() -> None:
    batch = nn.BatchNorm2d(6).eval()
    for tensor in (batch.weight, batch.bias, batch.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(batch.running_var, 0.5, 2)
    frozen = FrozenBatchNorm(6)
    frozen.load_state_dict({name: value for name, value in batch.state_dict().items() if "tracked" not in name})
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(frozen.train()(x), batch(x), rtol=1e-5, atol=1e-6)
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert list(frozen.parameters()) == []


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 24, 32, 48, 64, 256])
def test_group_norm_divides_any_width(channels: int) -> None:
    norm = group_norm(channels)
    assert norm.num_groups == 32 or channels < 64 or channels % 64
    assert torch.isfinite(norm(torch.randn(1, channels, 2, 1))).all()


def test_fused_batch_norm_keeps_its_activation() -> None:
    config = BackboneConfig(name="regnetx_002", outputs=(2, 3, 4))
    reference = timm.create_model("regnetx_002", features_only=True, out_indices=(2, 3, 4)).eval()
    torch.manual_seed(1)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    backbone = built(config)
    frozen = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm)]
    norms = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(frozen) == len(norms)
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (backbone, reference)]
    for own, other in zip(*convolutions, strict=True):
        own.load_state_dict(other.state_dict())
    for own, other in zip(frozen, norms, strict=True):
        own.load_state_dict({key: other.state_dict()[key] for key in own.state_dict()})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for own, other in zip(backbone(x), reference(x), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(14, 21), (10, 17), (3, 7), (1, 1)])
@pytest.mark.parametrize("shifted", [0, 1])
def test_swin_pads_before_it_shifts(size: tuple[int, int], shifted: int) -> None:
    """On a map padded to whole windows beforehand, timm's own attention does what the official one does on any map."""
    block = built(SWIN).body["layers_1"].blocks[shifted]
    assert block.shift_size == ((3, 3) if shifted else (0, 0))
    x = torch.randn(2, *size, 24)
    height, width = size
    whole = nn.functional.pad(x, (0, 0, 0, -width % 7, 0, -height % 7))
    with torch.no_grad():
        torch.testing.assert_close(block._attn(x), SwinTransformerBlock._attn(block, whole)[:, :height, :width])


def test_swin_outputs_are_normalised() -> None:
    maps = built(SWIN)(torch.randn(1, 3, 64, 64))
    for one in maps:
        torch.testing.assert_close(one.mean(1), torch.zeros_like(one.mean(1)), rtol=0, atol=1e-5)
        torch.testing.assert_close(one.var(1, unbiased=False), torch.ones_like(one.mean(1)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("config", [SWIN, RESNET, CONVNEXT], ids=["swin", "resnet", "convnext"])
def test_recomputed_activations_give_the_same_gradients(config: BackboneConfig) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = built(replace(config, drop_path=0.3, checkpoint_activations=recompute)).train()
        torch.manual_seed(5)
        sum(one.sum() for one in backbone(torch.randn(2, 3, 64, 64))).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


def test_drop_path_follows_the_global_generator() -> None:
    backbone = built(replace(SWIN, drop_path=0.5)).train()
    x = torch.randn(2, 3, 64, 64)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return backbone(x)[-1]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("config", [RESNET, TINY_BACKBONE, SWIN], ids=["frozen", "group", "swin"])
def test_weights_come_from_a_file_of_the_whole_network(config: BackboneConfig, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    arguments = {**config.arguments, **({"strict_img_size": False} if config is SWIN else {})}
    source = timm.create_model(config.name, **arguments)
    for tensor in (*source.parameters(), *source.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    file = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), file) if suffix == ".safetensors" else torch.save(source.state_dict(), file)
    backbone = built(replace(config, weights=str(file)))
    taken = {name.replace("layers_", "layers."): tensor for name, tensor in backbone.body.state_dict().items()}
    for name, tensor in source.state_dict().items():
        if name in taken:
            assert torch.equal(taken.pop(name), tensor), name
    assert taken == {}


def test_weights_come_from_a_training_script_and_from_a_feature_network(tmp_path: Path) -> None:
    """ConvNeXt has the most names that timm's feature networks spell differently (stem_0, stages_1)."""
    config = BackboneConfig(
        name="convnext_atto",
        arguments={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
        outputs=(1, 2, 3),
        norm="native",
        frozen_stages=0,
    )
    source = timm.create_model(config.name, **config.arguments).state_dict()
    assert any(name.startswith("head.fc") for name in source), "no classifier that must be dropped"
    torch.save({"state_dict": source, "epoch": 3, "metric": 0.5}, tmp_path / "script.pth")
    backbone = built(replace(config, weights=str(tmp_path / "script.pth")))
    for name, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, source[re.sub(r"^(stem|stages)_", r"\1.", name)]), name
    save_file(backbone.body.state_dict(), tmp_path / "features.safetensors")
    again = built(replace(config, weights=str(tmp_path / "features.safetensors")))
    for name, tensor in again.body.state_dict().items():
        assert torch.equal(tensor, backbone.body.state_dict()[name]), name


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t", channels=(8, 16, 24, 40), stem_width=8).state_dict()
    file = tmp_path / "other.safetensors"
    save_file(source, file)
    with pytest.raises(DataError, match=r"'layer4.*expected shape"):
        built(replace(RESNET, weights=str(file)))
    save_file({"conv1.0.weight": source["conv1.0.weight"]}, file)
    with pytest.raises(
        DataError, match=r"'conv1\.1\.weight' is missing.*; \d+ more tensors do not fit; give timm"
    ) as caught:
        built(replace(RESNET, weights=str(file)))
    assert str(caught.value).count("is missing") == 5
    torch.save([source["conv1.0.weight"]], file.with_suffix(".pth"))
    with pytest.raises(DataError, match="holds a list, expected a dictionary of tensors"):
        built(replace(RESNET, weights=str(file.with_suffix(".pth"))))
    file.write_bytes(b"not tensors")
    with pytest.raises(DataError, match="cannot be read"):
        built(replace(RESNET, weights=str(file)))
    with pytest.raises(DataError, match="expected a file"):
        built(replace(RESNET, weights=str(tmp_path / "absent.pth")))


def test_weights_files_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (marker,)

    file = tmp_path / "hostile.pth"
    torch.save({"conv1.0.weight": Hostile()}, file)
    with pytest.raises(DataError, match="cannot be read") as caught:
        built(replace(RESNET, weights=str(file)))
    assert len(str(caught.value).splitlines()) == 1
    assert not marker.exists()


def test_weights_are_not_read_where_all_are_loaded_afterwards() -> None:
    Backbone(replace(RESNET, weights="absent.pth"), pretrained=False)
