"""Deformable attention as a torch operator: registration, compilation, checkpointing, autocast, processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.deform_attn import deform_attn, op

SHAPES = ((4, 5), (2, 3))
without_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, without_device])]
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


def inputs(queries: int = 7, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    value, offsets, logits = (
        torch.randn(shape, generator=draw).to(device).requires_grad_()
        for shape in ((2, 26, 2, 8), (2, queries, 2, 2, 3, 2), (2, queries, 2, 6))
    )
    return value, offsets, logits, torch.rand(2, queries, 2, 2, generator=draw).to(device)


def test_registration_passes_opcheck() -> None:
    sizes = [4, 5, 2, 3]
    torch.library.opcheck(op._forward, (*inputs(), sizes, "cpu"))
    tensors = [tensor.detach() for tensor in inputs()]
    torch.library.opcheck(op._backward, (torch.randn(2, 7, 16), *tensors, sizes, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device: str, impl: str, dynamic: bool) -> None:
    def loss(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor) -> Tensor:
        return (deform_attn(value * 2, offsets, logits, reference_points, SHAPES, impl) ** 2).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for queries in (7, 9):
        arguments = inputs(queries, device)
        expected = torch.autograd.grad(loss(*arguments), arguments[:3])
        actual = torch.autograd.grad(compiled(*arguments), arguments[:3])
        for computed, eager in zip(actual, expected, strict=True):
            assert torch.allclose(computed, eager, rtol=1e-5, atol=1e-6)


@needs_a_compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_fuses_around_it(device: str, dynamic: bool) -> None:
    """Dynamic: one graph serves another number of queries, without being compiled again."""

    def loss(value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor) -> Tensor:
        output = deform_attn(value.relu() + 1, offsets.tanh() * 2, logits, reference_points, SHAPES)
        return (output.sigmoid() * 3).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=dynamic):
        for queries in (7, 9) if dynamic else (7,):
            arguments = inputs(queries, device)
            expected = torch.autograd.grad(loss(*arguments), arguments[:3])
            actual = torch.autograd.grad(compiled(*arguments), arguments[:3])
            for computed, eager in zip(actual, expected, strict=True):
                assert torch.allclose(computed, eager, rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    def forward(self, value: Tensor, offsets: Tensor, logits: Tensor, reference_points: Tensor) -> Tensor:
        return deform_attn(value * 2, offsets, logits, reference_points, SHAPES) + 1


@pytest.mark.parametrize("device", DEVICES)
def test_exports_as_one_node_for_any_number_of_queries(device: str, tmp_path: Path) -> None:
    queries = torch.export.Dim("queries", min=2, max=100)
    arguments = tuple(tensor.detach() for tensor in inputs(device=device))
    program = torch.export.export(Layer(), arguments, dynamic_shapes=(None, *({1: queries},) * 3))
    nodes = [node for node in program.graph.nodes if "dino_scale.deform_attn" in str(node.target)]
    assert len(nodes) == 1
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for number in (7, 9):
        arguments = tuple(tensor.detach() for tensor in inputs(number, device))
        assert torch.equal(loaded(*arguments), Layer()(*arguments))


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_gives_the_same_gradients(device: str) -> None:
    arguments = inputs(device=device)
    plain = deform_attn(*arguments, SHAPES)
    saved = checkpoint(deform_attn, *arguments, SHAPES, use_reentrant=False)
    expected = torch.autograd.grad(plain.sin().sum(), arguments[:3])
    actual = torch.autograd.grad(saved.sin().sum(), arguments[:3])
    for computed, direct in zip(actual, expected, strict=True):
        # On a GPU the value gradient is summed by float atomics, in any order.
        assert torch.equal(computed, direct) if device == "cpu" else torch.allclose(computed, direct, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_takes_what_autocast_gives(device: str) -> None:
    """Projections under autocast are bfloat16, reference points stay float32."""
    torch.manual_seed(0)
    to_value, to_offsets, to_logits = (torch.nn.Linear(16, width).to(device) for width in (16, 24, 12))
    tokens, queries = torch.randn(2, 26, 16, device=device), torch.randn(2, 7, 16, device=device)
    references = torch.rand(2, 7, 2, 2, device=device)
    with torch.autocast(device, torch.bfloat16):
        value = to_value(tokens).view(2, 26, 2, 8)
        offsets, logits = to_offsets(queries).view(2, 7, 2, 2, 3, 2), to_logits(queries).view(2, 7, 2, 6)
        output = deform_attn(value, offsets, logits, references, SHAPES)
        mixed = deform_attn(value, offsets.float(), logits.float(), references, SHAPES)
    assert offsets.dtype == output.dtype == mixed.dtype == torch.bfloat16
    (output.float().sum() + mixed.float().sum()).backward()
    for layer in (to_value, to_offsets, to_logits):
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
        assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_only_where_asked(device: str) -> None:
    value, offsets, logits, reference_points = inputs(device=device)
    output = deform_attn(value.detach(), offsets, logits.detach(), reference_points, SHAPES)
    output.sum().backward()
    assert offsets.grad is not None and value.grad is None and logits.grad is None


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivative_is_refused(device: str) -> None:
    arguments = inputs(device=device)
    first = torch.autograd.grad(deform_attn(*arguments, SHAPES).sin().sum(), arguments[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative; use impl='reference'"):
        first.square().sum().backward()
    reference = deform_attn(*arguments, SHAPES, "reference").sin().sum()
    slope = torch.autograd.grad(reference, arguments[0], create_graph=True)[0]
    assert torch.autograd.grad(slope.square().sum(), arguments[0])[0].abs().sum() > 0


def test_fresh_processes_may_fill_one_cache_together(tmp_path: Path) -> None:
    script = (
        "import torch; from kernels.deform_attn import deform_attn;"
        "v = torch.ones(1, 4, 1, 8, requires_grad=True);"
        "o = deform_attn(v, torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 2), 0.5),"
        " [(2, 2)]); o.sum().backward(); print(o.sum().item(), v.grad.sum().item())"
    )
    root = str(Path(op.__file__).parents[2])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.communicate(timeout=120)[0].split() == ["8.0", "8.0"]
        assert process.returncode == 0
    assert list(tmp_path.rglob("*.nbc"))
