"""What the tests of DeepSpeed's layout and traps run in their processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_scale.errors import ConfigError
from dino_scale.training import distributed
from dino_scale.training.optimizer import ParameterGroup
from dino_scale.training.zero import ZeroEngine
from tests.support.tiny_training import TinyModel, build, train

Topology = tuple[int, str]  # ZeRO stage, precision


@dataclass(frozen=True)
class Probes:
    """layouts: what is misplaced; states: after three steps; said and moments: see the functions that make them."""

    layouts: dict[Topology, list[str]]
    states: dict[Topology, dict[str, Tensor]]
    said: dict[int, str]
    moments: dict[int, tuple[float, float]]


def probe(fp32: list[Topology], bf16: list[Topology]) -> Probes:
    both = (*fp32, *bf16)
    return Probes(
        probe_layouts(*both), state_after_steps(*both), leave_out_everywhere(0, 1, 2, 3), moment_without_guard(1, 2, 3)
    )


def probe_layouts(*topologies: Topology) -> dict[Topology, list[str]]:
    """Per topology everything that is not where `ZeroEngine.fragments` says it is."""
    return {topology: _probe(*topology) for topology in topologies}


def _probe(stage: int, precision: str) -> list[str]:
    engine, _ = build(stage, microbatch=1, precision=precision)
    start = plain_state()
    wrong = [f"{name} at the start" for name in differing(engine.gather("fp32"), start)]
    wrong += [f"{name} at the start" for name in differing(engine.untrained(), start)]
    for fragment in engine.fragments:
        held = start[fragment.name].view(-1)[fragment.start : fragment.start + fragment.numel]
        if fragment.shape != tuple(start[fragment.name].shape) or not torch.equal(fragment.tensors["fp32"], held):
            wrong.append(f"{fragment.name} from {fragment.start} on")
    marked = {name: torch.arange(value.numel()).view(value.shape) / 7 for name, value in engine.gather("fp32").items()}
    for fragment in engine.fragments:
        end = fragment.start + fragment.numel
        fragment.tensors["fp32"].copy_(marked[fragment.name].view(-1)[fragment.start : end])
    engine.publish()
    trained = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    with engine._whole(trained), torch.no_grad():
        module = {name: value.detach().float().clone() for name, value in engine.model.named_parameters()}
    rounded = {name: (value if precision == "fp32" else value.bfloat16().float()) for name, value in marked.items()}
    wrong += [f"{name} in the module" for name in rounded if not torch.equal(module[name], rounded[name])]
    engine.destroy()
    return wrong


def plain_state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return TinyModel().state_dict()


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name, value in found.items()
        if value.dtype != expected[name].dtype or not torch.equal(value, expected[name])
    ]


def state_after_steps(*topologies: Topology) -> dict[Topology, dict[str, Tensor]]:
    """Weights, moments and average after three steps."""
    states = {}
    for stage, precision in topologies:
        engine, average = build(stage, microbatch=1, precision=precision)
        train(engine, average, range(3), microbatch=1)
        states[stage, precision] = {
            f"{kind}:{name}": v for kind in engine.kinds for name, v in engine.gather(kind).items()
        }
        engine.destroy()
    return states


class Forked(nn.Module):
    """One of its layers takes part when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)

    def forward(self, x: Tensor, use: bool) -> tuple[Tensor, None]:
        y = self.always(x)
        return (y + self.sometimes(x) if use else y).pow(2).mean(), None


def forked_engine(stage: int, bf16_parameters: bool = False) -> ZeroEngine:
    torch.manual_seed(0)
    module = Forked()
    groups = [ParameterGroup("all", 1e-2, 0.0, tuple(module.named_parameters()))]
    shape = {"microbatch": 1, "accumulation": 1, "clip_norm": 0.0, "betas": (0.9, 0.999), "epsilon": 1e-8}
    return ZeroEngine(module, module, groups, stage=stage, bf16_parameters=bf16_parameters, **shape)


def leave_out_everywhere(*stages: int) -> dict[int, str]:
    """What is said when a layer takes part in the first step and not in the second, on all ranks."""
    said = {}
    for stage in stages:
        engine = forked_engine(stage)
        for use in (True, False):
            loss, _ = engine(torch.ones(1, 6), use)
            try:
                engine.backward(loss)
                engine.step()
            except ConfigError as error:
                said[stage] = f"{use}: {error}"
        engine.destroy()
    return said


def leave_out_on_one_rank(stage: int, folder: str) -> None:
    """The layer takes part on rank 0 only; the other rank writes down what it is told and ends."""
    engine = forked_engine(stage)
    loss, _ = engine(torch.ones(1, 6), distributed.rank() == 0)
    try:
        engine.backward(loss)
    except ConfigError as error:
        Path(folder, str(distributed.rank())).write_text(str(error))
        raise


def moment_without_guard(*stages: int) -> dict[int, tuple[float, float]]:
    """First moment of the layer after a step with it, and after a step without it that nobody checked."""
    moments = {}
    for stage in stages:
        engine = forked_engine(stage)
        found = []
        for use in (True, False):
            loss, _ = engine(torch.ones(1, 6), use)
            engine._engine.backward(loss)
            engine.step()
            found.append(float(engine.gather("exp_avg")["sometimes.weight"].norm()))
        moments[stage] = (found[0], found[1])
        engine.destroy()
    return moments
