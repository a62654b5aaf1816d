"""What the resharding matrix runs: one process group per number of workers, many topologies in each.

A topology is (ZeRO stage, precision). A source trains some steps, saves, and goes on; a target loads the files of
every source in turn into one engine, and goes on as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_scale.checkpoint import store
from dino_scale.training.zero import ZeroEngine
from tests.support.tiny_training import build, digests, position, train

Topology = tuple[int, str]
RATES = {"detector": 0.03, "backbone": 0.01, "scale": 0.02}
STEPS, MORE = 7, 3  # steps before and after the checkpoint; the learning rate halves just before it


@dataclass(frozen=True)
class Outcome:
    """state: sha256 of the state at the checkpoint; losses: of the steps after it; final: sha256 after those."""

    state: str
    losses: list[float]
    final: str


def save_all(topologies: list[Topology], root: str) -> dict[Topology, Outcome]:
    """Train and save under every topology, each into `root`/STAGE-PRECISION."""
    outcomes = {}
    for stage, precision in topologies:
        engine, average = build(stage, microbatch=1, precision=precision)
        train(engine, average, range(STEPS), microbatch=1)
        state = digest(engine)
        store.save(Path(root, f"{stage}-{precision}"), engine, position(STEPS), keep_last=1)
        losses = train(engine, average, range(STEPS, STEPS + MORE), microbatch=1)
        outcomes[stage, precision] = Outcome(state, losses, digest(engine))
        engine.destroy()
    return outcomes


def load_all(topologies: list[Topology], sources: list[str]) -> dict[tuple[Topology, str], Outcome]:
    """Under every topology load every one of the folders `sources` and train on."""
    outcomes = {}
    for stage, precision in topologies:
        engine, average = build(stage, microbatch=1, precision=precision)
        for source in sources:
            newest = store.find_newest_together(Path(source), print)
            assert newest is not None
            assert newest[1].bf16_parameters == source.endswith("bf16_parameters")
            assert {name: group.learning_rate for name, group in newest[1].groups.items()} == RATES
            poison(engine)
            store.load(*newest, engine)
            state = digest(engine)
            losses = train(engine, average, range(STEPS, STEPS + MORE), microbatch=1)
            outcomes[(stage, precision), source] = Outcome(state, losses, digest(engine))
        engine.destroy()
    return outcomes


@torch.no_grad()
def poison(engine: ZeroEngine) -> None:
    """What is loaded must come from the files, not from what was there."""
    engine.set_untrained({name: torch.full_like(value, 9.0) for name, value in engine.untrained().items()})
    for fragment in engine.fragments:
        for tensor in fragment.tensors.values():
            tensor.fill_(9.0)
    engine.publish()


def digest(engine: ZeroEngine) -> str:
    """One sha256 over every kind of every parameter, frozen parameters and buffers."""
    every = digests(engine)
    return hashlib.sha256("".join(f"{name}={every[name]};" for name in sorted(every)).encode()).hexdigest()
