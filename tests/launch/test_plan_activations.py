"""The activations of the plan against those of real steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_scale.config.decode import load_chain
from dino_scale.config.schema import LossConfig, ModelConfig
from dino_scale.model.dino import build_model
from launch.commands.demo import CHAIN
from launch.plan_activations import Microbatch, measure_activations
from tests.support.memory_of_engines import batch
from tests.support.real_step import CLASSES, objective_of, step

ROOT = Path(__file__).resolve().parents[2]


def small(recompute: bool = False, attention: str = "auto") -> ModelConfig:
    model = load_chain(CHAIN).model
    return replace(model, attention=attention, backbone=replace(model.backbone, checkpoint_activations=recompute))


def really_saved(model: ModelConfig, precision: str, shape: Microbatch) -> int:
    """Bytes of all storages that autograd keeps of a real forward pass, parameters and buffers aside."""
    objective = objective_of(model, precision)
    own = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    pixels = batch(images=shape.images, size=shape.size, boxes=20)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective(pixels, 40.0, torch.Generator().manual_seed(0))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_tensors_are_those_of_a_real_forward_pass(precision: str, recompute: bool) -> None:
    shape = Microbatch(2, (96, 128))
    planned = measure_activations(small(recompute), CLASSES, LossConfig(), precision, shape)
    real = really_saved(small(recompute), precision, shape)
    assert abs(planned.saved - real) < 0.03 * real
    assert planned.batch == 2 * 3 * 96 * 128
    assert planned.peak > planned.saved


def test_measuring_leaves_no_rule_behind() -> None:
    """CUDA's autocast rules are lent to the CPU for the time of measuring only."""
    x, weight = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    measure_activations(small(), CLASSES, LossConfig(), "bf16", Microbatch(1, (64, 64)), device="cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (4,), weight).dtype == torch.bfloat16


def test_cuda_keeps_more_under_autocast() -> None:
    planned = [
        measure_activations(small(), CLASSES, LossConfig(), "bf16", Microbatch(2, (96, 128)), device).saved
        for device in ("cpu", "cuda")
    ]
    assert planned[0] < planned[1]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "recompute"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_peak_is_the_growth_of_a_process_in_a_real_step(precision: str, recompute: bool) -> None:
    shape = Microbatch(4, (448, 512))
    planned = measure_activations(small(recompute), CLASSES, LossConfig(), precision, shape)
    arguments = json.dumps([precision, recompute, shape.images, shape.size])
    code = f"from tests.support.real_step import measured_growth; print(measured_growth(*{json.loads(arguments)!r}))"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # memory goes back at once
    done = subprocess.run(
        [sys.executable, "-c", code.replace("'", '"')], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    assert grown > 200e6  # enough to tell activations from noise
    assert abs(planned.peak - grown) < 0.2 * grown, (planned, grown)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_is_that_of_a_gpu(precision: str) -> None:
    shape = Microbatch(4, (448, 512))
    planned = measure_activations(small(), CLASSES, LossConfig(), precision, shape, device="cuda")
    objective = objective_of(small(), precision).to("cuda")
    step(objective, batch(images=1, size=(64, 64), boxes=20).to("cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(objective, batch(images=shape.images, size=shape.size, boxes=20).to("cuda"))
    grown = torch.cuda.max_memory_allocated() - before
    assert abs(planned.peak - grown) < 0.2 * grown, (planned, grown)


def test_a_model_of_every_kind_can_be_measured() -> None:
    """Swin with windows and recomputation, and a Deformable DETR without denoising."""
    for name in ("coco_swin_l_5scale_12_epochs", "ladder/deformable_detr"):
        model = load_chain(CHAIN.parent / f"{name}.yaml").model
        model = replace(model, backbone=replace(model.backbone, weights=""))
        assert measure_activations(model, CLASSES, LossConfig(), "bf16", Microbatch(1, (256, 320))).peak > 10e6
        with torch.device("meta"):
            assert build_model(model, CLASSES, pretrained=False).config == model
