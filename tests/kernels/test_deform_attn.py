"""Values and gradients of deformable attention against the float64 reference, properties, and official recordings."""

from __future__ import annotations

import hashlib
import logging
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.deform_attn import cpu, cpu_loops, lines, op
from tests.support import attention_properties
from tests.support.attention_cases import Case, assert_close, check_against_double, gradients, make_case

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("channels", [8, 9, 12, 16, 30, 32, 64])
def test_equals_float64_for_every_head_size(channels: int, box: bool, impl: str) -> None:
    check_against_double(make_case(channels=channels, box=box), 1e-5, impl)


def test_the_loops_change_whenever_the_vectors_do() -> None:
    """Numba's cache looks at the file of a function alone: with other vectors it would go on with the old code."""
    found = hashlib.sha256(Path(lines.__file__).read_bytes()).hexdigest()[:16]
    assert found == cpu_loops.LINES_DIGEST, "lines.py has changed: enter this digest in cpu_loops.py"


def test_more_than_two_to_the_31_numbers() -> None:
    """Offsets of 64 bits. Sparse memory: of these 8.6 GB only the touched pages exist."""
    height, width, heads, channels = 4096, 4112, 4, 16  # whole lines of memory, so that nothing is copied
    cells = height * width
    assert 2 * cells * heads * channels > 2**31
    value = torch.from_numpy(np.zeros((2, cells, heads, channels), np.float32))
    value[1, -1] = 3.0
    corner = torch.tensor([[[[(width - 0.5) / width, (height - 0.5) / height]]]]).expand(2, 1, 1, 2)
    offsets, logits = torch.zeros(2, 1, heads, 1, 1, 2), torch.zeros(2, 1, heads, 1)
    output = Case(value, offsets, logits, corner, ((height, width),)).run("cpu")
    assert output[0].eq(0).all() and (output[1] - 3).abs().max() < 0.01


def test_gradients_of_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_properties.gradients_of_more_than_two_to_the_31_numbers(cpu.backward, monkeypatch)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("points", [1, 2, 3, 4, 5, 6, 7, 8])
def test_equals_float64_for_every_number_of_levels_and_points(levels: int, points: int) -> None:
    check_against_double(make_case(levels=levels, points=points, box=points % 2 == 0, seed=points), 1e-5)


@pytest.mark.parametrize("box", [False, True])
def test_bfloat16_values_stay_within_their_rounding(box: bool) -> None:
    case = make_case(levels=4, box=box, channels=32)
    check_against_double(replace(case, value=case.value.bfloat16()), 5e-3)
    raw = replace(case, logits=case.logits.bfloat16(), value=case.value.half())
    check_against_double(raw, 5e-3)


def test_bfloat16_offsets_are_taken_as_they_are() -> None:
    """A rounded offset may land on a whole cell, so only values are compared."""
    case = make_case(levels=4, channels=32)
    rounded = replace(case, offsets=case.offsets.bfloat16(), value=case.value.bfloat16(), logits=case.logits.bfloat16())
    assert_close(rounded.run(), rounded.double().run("reference"), 5e-3)


@pytest.mark.parametrize("box", [False, True])
def test_float64_passes_gradcheck(box: bool) -> None:
    case = make_case(levels=2, batch=1, queries=2, heads=2, channels=3, points=2, box=box).double()

    def run(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return replace(case, value=value, offsets=offsets, logits=logits).run()

    leaves = [tensor.requires_grad_() for tensor in (case.value, case.offsets, case.logits)]
    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("queries", [0, 1])
def test_none_or_one_query(queries: int) -> None:
    case = make_case(queries=queries)
    check_against_double(case, 1e-5)
    assert case.run().shape == (2, queries, 48)


def test_inputs_need_not_be_contiguous() -> None:
    case = make_case(box=True)
    strided = Case(
        case.value.transpose(1, 3).contiguous().transpose(1, 3),
        case.offsets.transpose(0, 4).contiguous().transpose(0, 4),
        torch.cat([case.logits, case.logits], -1)[..., : case.logits.shape[-1]],
        case.reference_points[:, :, :1].expand(-1, -1, 3, -1),
        case.level_shapes,
    )
    assert not any(t.is_contiguous() for t in (strided.value, strided.offsets, strided.logits))
    dense = Case(*(t.contiguous() for t in list(vars(strided).values())[:4]), level_shapes=case.level_shapes)
    grad = torch.randn(2, 48, 13).transpose(1, 2)
    for actual, expected in zip(gradients(strided, "cpu", grad), gradients(dense, "cpu", grad), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 2.0**31, -(2.0**63)])
def test_broken_coordinates_contribute_nothing(broken: float, box: bool, impl: str) -> None:
    case = make_case(box=box)
    offsets, outside = case.offsets.clone(), case.offsets.clone()
    offsets[:, ::3, 1, :, 0, 0] = broken
    outside[:, ::3, 1, :, 0, 0] = 1e4
    grad = torch.randn(2, 13, 48)
    actual = gradients(replace(case, offsets=offsets), impl, grad)
    expected = gradients(replace(case, offsets=outside).double(), "reference", grad)
    for computed, exact in zip(actual, expected, strict=True):
        assert_close(computed, exact, 1e-5)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_broken_reference_points_contribute_nothing(broken: float, impl: str) -> None:
    case = make_case(box=False)
    reference_points = case.reference_points.clone()
    reference_points[0, 0] = broken
    actual = gradients(replace(case, reference_points=reference_points), impl, torch.ones(2, 13, 48))
    assert all(tensor.isfinite().all() for tensor in actual)
    assert actual[0][0, 0].eq(0).all() and actual[2][0, 0].eq(0).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_exact_cells_and_borders(impl: str) -> None:
    """On a cell the sample is the cell and the slope the one to its right; on -1 and on the width it is nothing."""
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)
    pixels = torch.tensor([-1.0, -0.5, 0.0, 1.0, 3.0, 3.5, 4.0])
    offsets = torch.stack([pixels + 0.5, torch.full_like(pixels, 0.5)], -1).view(1, 7, 1, 1, 1, 2)
    case = Case(value, offsets, torch.zeros(1, 7, 1, 1), torch.zeros(1, 7, 1, 2), ((1, 4),))
    output, _, grad_offsets, _ = gradients(case, impl, torch.ones(1, 7, 1))
    assert output.flatten().tolist() == [0.0, 0.5, 1.0, 10.0, 1000.0, 500.0, 0.0]
    assert grad_offsets[0, 2:5, 0, 0, 0, 0].tolist() == [9.0, 90.0, -1000.0]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_is_linear_in_value_with_the_right_adjoint(impl: str) -> None:
    attention_properties.linear_in_value_with_the_right_adjoint(impl, channels=32)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_constant_maps_give_the_constant_inside(impl: str) -> None:
    attention_properties.constant_maps_give_the_constant_inside(impl)


def test_queries_are_independent() -> None:
    attention_properties.queries_are_independent("cpu")


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_moving_map_and_samples_together_changes_nothing(impl: str) -> None:
    attention_properties.moving_map_and_samples_together_changes_nothing(impl)


@pytest.mark.parametrize("box", [False, True])
def test_every_number_of_every_result_is_written(box: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_properties.every_number_of_every_result_is_written("cpu", monkeypatch, box=box)


def test_result_is_bit_identical_over_repeats_and_thread_counts() -> None:
    case = make_case(queries=101, channels=32)
    grad = torch.randn(2, 101, 96)
    expected = gradients(case, "cpu", grad)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for actual, first in zip(gradients(case, "cpu", grad), expected, strict=True):
                assert torch.equal(actual, first)
    finally:
        torch.set_num_threads(before)


def test_several_threads_may_call_at_once() -> None:
    cases = [make_case(queries=50 + seed, seed=seed) for seed in range(6)]
    grads = [torch.randn(2, 50 + seed, 48) for seed in range(6)]
    expected = [gradients(case, "cpu", grad) for case, grad in zip(cases, grads, strict=True)]
    results: dict[int, tuple[Tensor, ...]] = {}

    def work(index: int) -> None:
        results[index] = gradients(cases[index], "cpu", grads[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, first in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(results[index], first, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_core_equals_the_official_recording(impl: str) -> None:
    """The recording starts at locations and weights: location = 0 + offset / size, weights = softmax(log weights)."""
    recorded = {key: torch.from_numpy(array) for key, array in np.load(DATA / "goldens" / "components.npz").items()}
    shapes = tuple((int(height), int(width)) for height, width in recorded["core.shapes"])
    sizes = torch.tensor([[width, height] for height, width in shapes])[:, None]
    weights = recorded["core.w"].flatten(-2)
    case = Case(recorded["core.value"], recorded["core.loc"] * sizes, weights.log(), torch.zeros(2, 5, 3, 2), shapes)
    output, grad_value, grad_offsets, grad_logits = gradients(case, impl, recorded["core.gout"])
    assert_close(output, recorded["core.out"], 2e-6)
    assert_close(grad_value, recorded["core.gvalue"], 2e-6)
    assert_close(grad_offsets * sizes, recorded["core.gloc"], 2e-5)
    slopes = recorded["core.gw"].flatten(-2)
    assert_close(grad_logits, weights * (slopes - (weights * slopes).sum(-1, keepdim=True)), 1e-5)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("box", [False, True])
def test_module_equals_the_official_recording(box: bool, impl: str) -> None:
    recorded = {key: torch.from_numpy(array) for key, array in np.load(DATA / "goldens" / "components.npz").items()}
    shapes = tuple((int(height), int(width)) for height, width in recorded["core.shapes"])

    def linear(name: str, features: Tensor) -> Tensor:
        return F.linear(features, recorded[f"mod.sd.{name}.weight"], recorded[f"mod.sd.{name}.bias"])

    value = linear("value_proj", recorded["mod.x"]).masked_fill(recorded["mod.mask"][..., None], 0)
    case = Case(
        value.view(2, -1, 4, 16),
        linear("sampling_offsets", recorded["mod.q"]).view(2, 5, 4, 3, 2, 2),
        linear("attention_weights", recorded["mod.q"]).view(2, 5, 4, 6),
        recorded["mod.r4" if box else "mod.r2"],
        shapes,
    )
    output = linear("output_proj", case.run(impl))
    assert_close(output, recorded["mod.out4" if box else "mod.out2"], 5e-6)


def test_wrong_arguments_are_named() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"impl='fast' is unknown; choose one of auto"):
        case.run("fast")
    with pytest.raises(ValueError, match=r"level_shapes .* do not describe 3 levels of 42 tokens"):
        replace(case, level_shapes=((5, 7), (1, 1), (3, 3))).run()
    with pytest.raises(ValueError, match=r"logits has shape \(2, 13, 3, 11\), expected \(2, 13, 3, 12\)"):
        replace(case, logits=case.logits[..., 1:]).run("reference")
    with pytest.raises(ValueError, match="reference_points require grad"):
        replace(case, reference_points=case.reference_points.clone().requires_grad_()).run()
    with pytest.raises(ValueError, match="expected value"):
        replace(case, value=case.value[0]).run()


def test_choice_of_implementation() -> None:
    assert op.choose_implementation("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(RuntimeError, match="impl='cpu' got tensors on cuda"):
        op.choose_implementation("cpu", torch.device("cuda"))
    assert op.choose_implementation("auto", torch.device("cuda")) == "triton"
    with pytest.raises(RuntimeError, match="impl='triton' got tensors on cpu, but runs on CUDA devices only"):
        op.choose_implementation("triton", torch.device("cpu"))


def test_automatic_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    op._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.deform_attn.op"):
        make_case().run("auto")
        make_case().run("auto")
        make_case().run("reference")
    assert [record.message for record in caplog.records] == ["deformable attention on cpu runs the cpu implementation"]
