"""The Triton kernels on a real device; what is proved without one is in the interpreted and the compiled tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.deform_attn import deform_attn, op
from kernels.matching import match
from kernels.matching.reference import matching_cost
from tests.support import attention_properties
from tests.support.attention_cases import Case, assert_close, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: Case) -> Case:
    return case.to("cuda")


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
@pytest.mark.parametrize("channels", [8, 9, 12, 30, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_float64(dtype: torch.dtype, channels: int, levels: int, points: int, box: bool) -> None:
    case = make_case(levels=levels, points=points, channels=channels, box=box, queries=101)
    case = replace(case, value=case.value.to(dtype))
    grad = torch.randn(2, 101, 3 * channels).to(dtype).float()
    actual = gradients(on_gpu(case), "auto", grad)
    expected = gradients(case.double(), "reference", grad)
    for computed, exact in zip(actual, expected, strict=True):
        assert_close(computed.cpu(), exact, 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("channels", [8, 9, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fixed", [False, True])
def test_windows_equal_float64(dtype: torch.dtype, channels: int, fixed: bool) -> None:
    """The interpreter does not round matrix products to the precision that they have on a device."""
    shapes = ((30, 41), (15, 21))
    case = make_case(levels=2, points=4, channels=channels, queries=1545)
    draw = torch.Generator().manual_seed(1)
    value = torch.randn(2, 1545, 3, channels, generator=draw).to(dtype)
    places = [
        torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width).flip(-1)
        for height, width in shapes
    ]
    references = torch.cat(places)[None, :, None].expand(2, -1, 2, -1).contiguous()
    # Whole pixels and a part between 0.01 and 0.99: slopes jump at whole coordinates.
    whole = torch.randn(case.offsets.shape, generator=draw).mul(3).floor()
    sizes = torch.tensor([[width, height] for height, width in shapes])[:, None]
    part = 0.01 + 0.98 * torch.rand(case.offsets.shape, generator=draw)
    at = (references[:, :, None, :, None] * sizes - 0.5).floor() - (references[:, :, None, :, None] * sizes - 0.5)
    case = Case(value, whole + part + at, case.logits, references, shapes)
    grad = torch.randn(2, 1545, 3 * channels).to(dtype).float()
    torch.use_deterministic_algorithms(fixed)
    try:
        actual = gradients(on_gpu(case), "triton_windowed", grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for computed, exact in zip(actual, gradients(case.double(), "reference", grad), strict=True):
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
    # The tests of opcheck run both operators twice and compare; float atomics differ in their last bits.
    bounds = {"rtol": 1e-4, "atol": 1e-4}
    torch.library.opcheck(op._forward, (*tensors, case.reference_points, sizes, "triton"), **bounds)
    values = [tensor.detach() for tensor in tensors]
    grad = torch.randn(2, 13, 48, device="cuda")
    torch.library.opcheck(op._backward, (grad, *values, case.reference_points, sizes, "triton"), **bounds)


@pytest.mark.parametrize("channels", [9, 32])
def test_is_linear_in_value_with_the_right_adjoint(channels: int) -> None:
    attention_properties.linear_in_value_with_the_right_adjoint("triton", "cuda", channels=channels)


def test_constant_maps_give_the_constant_inside() -> None:
    attention_properties.constant_maps_give_the_constant_inside("triton", "cuda")


def test_queries_are_independent() -> None:
    attention_properties.queries_are_independent("triton", "cuda")


def test_moving_map_and_samples_together_changes_nothing() -> None:
    attention_properties.moving_map_and_samples_together_changes_nothing("triton", "cuda")


@pytest.mark.parametrize("channels", [8, 9, 30])
def test_every_number_of_every_result_is_written(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_properties.every_number_of_every_result_is_written(
        "triton", monkeypatch, "cuda", channels=channels, queries=33
    )


def test_addresses_of_more_than_31_bits() -> None:
    """4.6 GB of values and 9.1 GB of sums; the last cell of the second image is read and added to."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free memory on the device")
    height, width, heads, channels = 4096, 4352, 8, 8
    value = torch.zeros((2, height * width, heads, channels), dtype=torch.bfloat16, device="cuda")
    value[1, -1] = 3.0
    place = torch.tensor([[[[(width - 0.25) / width, (height - 0.5) / height]]]]).expand(2, 1, 1, 2).cuda()
    offsets, logits = torch.zeros(2, 1, heads, 1, 1, 2).cuda(), torch.zeros(2, 1, heads, 1).cuda()
    case = Case(value, offsets, logits, place, ((height, width),))
    output, grad_value, grad_offsets, _ = gradients(case, "triton", torch.ones(2, 1, heads * channels))
    assert output[0].eq(0).all() and (output[1] - 2.25).abs().max() < 0.01
    assert (grad_value[:, -1] - 0.75).abs().max() < 0.01 and grad_value[:, :-1].count_nonzero() == 0
    assert grad_offsets[0].eq(0).all() and (grad_offsets[1, ..., 0] + 24).abs().max() < 0.1


@pytest.mark.parametrize("counts", [[5, 2, 9], [0, 3, 0], [200, 100, 300]])
def test_matching_equals_the_cpu(counts: list[int]) -> None:
    draw = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(7, 3, 900, 9, generator=draw), torch.rand(7, 3, 900, 4, generator=draw) * 0.4 + 0.1
    labels, targets = torch.randint(9, (sum(counts),), generator=draw), torch.rand(sum(counts), 4, generator=draw)
    weights = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
    expected = match(logits, boxes, labels, targets, counts, **weights)
    on_device = (tensor.cuda() for tensor in (logits, boxes, labels, targets))
    assert torch.equal(match(*on_device, counts, **weights).cpu(), expected)


def test_every_index_is_written_and_collapsed_predictions_are_solved() -> None:
    """In deterministic mode torch fills new memory with NaN or the largest integer."""
    draw, counts = torch.Generator().manual_seed(0), [40, 0, 25]
    logits = torch.randn(2, 3, 1, 9, generator=draw) + 1e-3 * torch.randn(2, 3, 900, 9, generator=draw)
    boxes = torch.rand(2, 3, 1, 4, generator=draw) * 0.4 + 0.1 + 1e-3 * torch.rand(2, 3, 900, 4, generator=draw)
    labels, targets = torch.randint(9, (65,), generator=draw), torch.rand(65, 4, generator=draw) * 0.4 + 0.1
    weights = {"class_cost": 2.0, "box_cost": 5.0, "giou_cost": 2.0, "alpha": 0.25}
    torch.use_deterministic_algorithms(True)
    try:
        chosen = match(*(tensor.cuda() for tensor in (logits, boxes, labels, targets)), counts, **weights).cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = match(logits, boxes, labels, targets, counts, **weights)
    for layer in range(2):
        for image, start in ((0, 0), (2, 40)):
            own = slice(start, start + counts[image])
            problem = logits[layer, image], boxes[layer, image], labels[own], targets[own]
            cost, order = matching_cost(*problem, **weights).double(), torch.arange(counts[image])
            found, best = cost[chosen[layer, own], order].sum(), cost[expected[layer, own], order].sum()
            assert len(set(chosen[layer, own].tolist())) == counts[image]
            assert torch.allclose(found, best, rtol=1e-5, atol=1e-4)


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
