"""The Triton kernels on a real device; what is proved without one is in the interpreted and the compiled tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.deform_attn import deform_attn, op
from kernels.matching import match
from tests.support.attention_cases import Case, assert_close, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: Case) -> Case:
    tensors = (case.value, case.offsets, case.logits, case.reference_points)
    return Case(*(tensor.cuda() for tensor in tensors), level_shapes=case.level_shapes)


def gradients(case: Case, impl: str, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in (case.value, case.offsets, case.logits)]
    output = deform_attn(*leaves, case.reference_points, case.level_shapes, impl)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.to(output))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("levels", "points"), [(1, 1), (4, 4), (5, 4), (3, 7), (5, 8)])
@pytest.mark.parametrize("channels", [8, 9, 12, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64(dtype: torch.dtype, channels: int, levels: int, points: int, box: bool) -> None:
    case = make_case(levels=levels, points=points, channels=channels, box=box, queries=101)
    case = replace(case, value=case.value.to(dtype))
    grad = torch.randn(2, 101, 3 * channels).to(dtype).float()
    actual = gradients(on_gpu(case), "auto", grad)
    expected = gradients(case.double(), "reference", grad)
    for computed, exact in zip(actual, expected, strict=True):
        assert_close(computed.cpu(), exact, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_gradients_are_bit_identical() -> None:
    case, grad = on_gpu(make_case(levels=2, queries=5000, channels=32)), torch.randn(2, 5000, 96)
    first = gradients(case, "auto", grad)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(case, "auto", grad), first, strict=True))


def test_registration_passes_opcheck() -> None:
    case = on_gpu(make_case(levels=2))
    tensors = [tensor.requires_grad_() for tensor in (case.value, case.offsets, case.logits)]
    sizes = [size for shape in case.level_shapes for size in shape]
    torch.library.opcheck(op._forward, (*tensors, case.reference_points, sizes, "triton"))


@pytest.mark.parametrize("counts", [[5, 2, 9], [0, 3, 0], [200, 100, 300]])
def test_matching_equals_the_cpu(counts: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(7, 3, 900, 9, generator=draw), torch.rand(7, 3, 900, 4, generator=draw) * 0.4 + 0.1
    labels, targets = torch.randint(9, (sum(counts),), generator=draw), torch.rand(sum(counts), 4, generator=draw)
    weights = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
    expected = match(logits, boxes, labels, targets, counts, **weights)
    on_device = (tensor.cuda() for tensor in (logits, boxes, labels, targets))
    assert torch.equal(match(*on_device, counts, **weights).cpu(), expected)


def test_matching_does_not_wait_for_the_host() -> None:
    logits, boxes = torch.randn(2, 2, 50, 9).cuda(), torch.rand(2, 2, 50, 4).cuda()
    labels, targets = torch.randint(9, (7,)).cuda(), torch.rand(7, 4).cuda()
    weights = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
    match(logits, boxes, labels, targets, [3, 4], **weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        match(logits, boxes, labels, targets, [3, 4], **weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_does_not_wait_for_the_host() -> None:
    """From the batch on the host to the gradients: the first step compiles and fills caches, the second is watched."""
    pytest.importorskip("timm", reason="the detector needs timm; the kernels do not")
    from dino_scale.config.schema import LossConfig
    from dino_scale.loss.criterion import Criterion
    from dino_scale.model.dino import build_model
    from dino_scale.model.preprocess import normalise
    from dino_scale.structures import Batch
    from tests.support.tiny_detector import CLASSES, generator, targets, tiny

    torch.manual_seed(0)
    model, criterion = build_model(tiny(attention="auto"), CLASSES).cuda().train(), Criterion(LossConfig())
    pixels = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = ((64, 96), (48, 72))
    batch = Batch(pixels, sizes, sizes, (0, 1), (0, 1), targets(3, 5))

    def step() -> None:
        images, padding = normalise(batch.to("cuda"), (0.5,) * 3, (0.2,) * 3)
        on_device = batch.to("cuda").targets
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(images, padding, on_device, generator())
        criterion(outputs, on_device, 8.0)["total"].backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
