"""Every configuration that comes with the project: it decodes, `plan` takes it, and sizes are the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import LossConfig, ModelConfig, OptimizerConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.dino import build_model
from dino_scale.training.schedule import rate_factor, total_steps
from launch.cli import main
from launch.plan_memory import model_size
from tests.support.tiny_detector import CLASSES, generator, images, targets

CONFIGS = Path(__file__).parents[2] / "configs"
CHAINS = sorted((CONFIGS / "chain").rglob("*.yaml"))
MODELS = sorted((CONFIGS / "model").rglob("*.yaml"))
OFFICIAL_CLASSES = 91  # the official models count raw COCO ids 0 to 90
COCO_IMAGES = 118_287


def model_of(path: Path, folder: Path) -> ModelConfig:
    chain = folder / "chain.yaml"
    chain.write_text(f"model: {{extends: {path}}}\nstages: {{train: {{}}}}\n", encoding="utf-8")
    return load_chain(chain).model


@pytest.mark.parametrize("chain", CHAINS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_plan_of_every_chain(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(chain)]) == 0
    shown = capsys.readouterr()
    assert "parameters" in shown.out and shown.err == ""
    assert all(stage in shown.out for stage in load_chain(chain).stages)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_model_can_be_built(path: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build_model(model_of(path, tmp_path), 80, pretrained=False)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "frozen"),
    [
        # "46.9 M parameters"; 46,670,782 train, as public training logs of the official code say. The frozen part is
        # the stem and layer1; FrozenBatchNorm holds buffers, which neither count includes.
        ("dino_r50_4scale", 46_893_182, 222_400),
        # One more level: a projection of layer1 with its norm, a row of level embedding, and the sampling offsets and
        # weights of one level in 12 deformable attentions.
        ("dino_r50_5scale", 47_255_806, 222_400),
        # Swin-L trains whole; 195,200,820 of these are the backbone with the norms of its three outputs.
        ("dino_swin_l_4scale", 217_230_066, 0),
    ],
)
def test_published_sizes(name: str, total: int, frozen: int, tmp_path: Path) -> None:
    config = model_of(CONFIGS / "model" / f"{name}.yaml", tmp_path)
    size = model_size(config, OFFICIAL_CLASSES, OptimizerConfig())
    assert (size.parameters, sum(size.frozen)) == (total, frozen)


def test_a_class_costs_what_the_heads_and_the_label_embedding_cost(tmp_path: Path) -> None:
    """The published sizes are with 91 classes, ours come from the data: 80 for COCO, 365 for Objects365.

    A class is a row in two class heads (weight and bias) and one in the label embedding. The decoder layers share one
    head, so they add nothing (detrex and mmdet hold seven).
    """
    config = model_of(CONFIGS / "model" / "dino_swin_l_4scale.yaml", tmp_path)
    a_class = 2 * (256 + 1) + 256
    for classes in (80, 365):
        size = model_size(config, classes, OptimizerConfig())
        assert size.trained == 217_230_066 + (classes - OFFICIAL_CLASSES) * a_class


def test_a_fifth_level_costs_what_its_parts_cost(tmp_path: Path) -> None:
    """Swin-L 5-scale has no published count; the difference to 4-scale is explained part by part."""
    sizes = [
        model_size(
            model_of(CONFIGS / "model" / f"dino_swin_l_{scales}scale.yaml", tmp_path), 91, OptimizerConfig()
        ).trained
        for scales in (4, 5)
    ]
    projection = (192 * 256 + 256) + 2 * 256  # 1 x 1 convolution of the new finest map and its group norm
    attentions = 12 * (256 + 1) * 8 * 4 * 3  # per attention: 8 heads x 4 points x (x, y and a weight)
    assert sizes[1] - sizes[0] == projection + attentions + 256 + 2 * 192  # level embedding; norm of the Swin output


@pytest.mark.parametrize(("epochs", "drop"), [(12, 11), (24, 20), (36, 30)])
def test_schedules_drop_where_the_paper_drops(epochs: int, drop: int) -> None:
    schedule = load_chain(CONFIGS / "chain" / f"coco_r50_4scale_{epochs}_epochs.yaml").stages["train"].schedule
    total = total_steps(schedule, COCO_IMAGES, 16)
    place = round(drop * COCO_IMAGES / 16)
    assert rate_factor(schedule, place - 2, total) == 1.0
    assert rate_factor(schedule, place + 2, total) == pytest.approx(0.1)


def test_names_say_what_the_files_hold() -> None:
    for path in CHAINS:
        chain = load_chain(path)
        assert chain.name == path.stem
        if path.stem.endswith("_epochs"):
            epochs = int(path.stem.split("_")[-2])
            assert chain.stages["train"].schedule.epochs == epochs
            assert f"{chain.model.levels}scale" in path.stem


def test_paper_recipe() -> None:
    chain = load_chain(CONFIGS / "chain" / "objects365_coco_swin_l.yaml")
    objects365, coco = chain.stages.values()
    assert (objects365.schedule.epochs, objects365.batch.global_size) == (26, 64)
    assert (coco.schedule.epochs, coco.batch.global_size) == (18, 16)
    assert coco.augmentation.scales == tuple(int(scale * 1.5) for scale in objects365.augmentation.scales)
    assert coco.augmentation.max_size == int(objects365.augmentation.max_size * 1.5)
    assert chain.model.denoising.queries == 1000 and chain.model.levels == 5
    assert coco.start.stage == "objects365"


ANCESTORS = ("deformable_detr", "dab_deformable_detr", "dn_deformable_detr", "dino")


def test_ancestors_differ_in_switches_alone(tmp_path: Path) -> None:
    switches = {"query_selection", "query_form", "look_forward", "denoising"}
    models = {name: model_of(CONFIGS / "model" / "ancestors" / f"{name}.yaml", tmp_path) for name in ANCESTORS}
    plain = [replace(model, **{name: getattr(ModelConfig(), name) for name in switches}) for model in models.values()]
    assert all(model == plain[0] for model in plain)
    chosen = {
        name: (model.query_selection, model.query_form, model.look_forward, model.denoising.kind)
        for name, model in models.items()
    }
    assert chosen == {
        "deformable_detr": ("pure", "point", "once", "none"),
        "dab_deformable_detr": ("none", "anchor", "once", "none"),
        "dn_deformable_detr": ("none", "anchor", "once", "plain"),
        "dino": ("mixed", "anchor", "twice", "contrastive"),
    }


@pytest.mark.parametrize("name", ANCESTORS)
def test_every_ancestor_learns(name: str, tmp_path: Path) -> None:
    """The real files, a few steps on two pictures."""
    config = replace(model_of(CONFIGS / "model" / "ancestors" / f"{name}.yaml", tmp_path), attention="reference")
    torch.manual_seed(0)
    model = build_model(config, CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    boxes, losses = targets(2, 1), []
    for step in range(6):
        outputs = model(*images(2), boxes, generator(step))
        loss = Criterion(LossConfig())(outputs, boxes, 3.0)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
