"""What this program knows about the insides of DeepSpeed's optimizers: where each piece of each parameter lies.

Everything here reads attributes that DeepSpeed does not promise to keep. The layouts are those of VERSION;
`ZeroEngine` refuses another one, and tests/training/test_partitions.py fails loudly when a layout has moved.
DeepSpeed's own calls for the purpose lose or refuse state in that version (universal checkpoint, safe_get_full_*,
safe_set_full_*) and are not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.errors import DinoScaleError
from dino_scale.training import distributed

VERSION = "0.19.8"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`, as held by this rank.

    tensors: kind ("fp32", "exp_avg", "exp_avg_sq", "ema") to a float32 vector of `numel` elements. They are views of
    the engine's state: writing to them changes it (call `ZeroEngine.publish` afterwards).
    owned: (offset, numel) within the fragment of the part that this rank writes to a checkpoint; over all ranks the
    owned parts cover every parameter exactly once.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    owned: tuple[int, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Partitions:
    """The float32 weights and moments of one engine, under any ZeRO stage.

    zero: DeepSpeed's optimizer (under stage 0 AdamW itself). adamw: torch's, which holds the moments. Under stage 1
    with bf16 parameters DeepSpeed has an optimizer of its own kind, with other names for the same layout.
    """

    def __init__(self, stage: int, zero: Any, adamw: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
        self._stage, self._zero, self._adamw, self._names = stage, zero, adamw, names

    def create_moments(self) -> None:
        """AdamW makes its moments at the first step; make them now, so that a checkpoint can be loaded before it."""
        for vector in self._vectors() if self._stage else self._names:
            state = self._adamw.state[vector]
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(vector, memory_format=torch.preserve_format))
            state.setdefault("step", torch.tensor(0.0))

    def fragments(self) -> tuple[Fragment, ...]:
        """All fragments of this rank; DinoScaleError when over all ranks they do not cover every parameter once."""
        if self._stage == 0:
            found = self._of_stage_0()
        elif self._stage == 3:
            found = self._of_stage_3()
        else:
            found = self._of_stages_1_and_2()
        self._require_cover(found)
        return tuple(found)

    def publish(self) -> None:
        """Make the module's weights equal the float32 masters."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero.checkpoint_event_prologue()
            for index in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            self._zero.checkpoint_event_epilogue()

    def _vectors(self) -> list[Tensor]:
        """This rank's flat float32 vector of every parameter group (stage 3: of every sub-group)."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        if hasattr(self._zero, "fp32_groups_flat_partition"):
            return list(self._zero.fp32_groups_flat_partition)
        return list(self._zero.single_partition_of_fp32_groups)

    def _of_stage_0(self) -> list[Fragment]:
        rank, world = distributed.rank(), distributed.world_size()
        fragments = []
        for parameter, name in self._names.items():
            share = math.ceil(parameter.numel() / world)
            begin = min(share * rank, parameter.numel())
            owned = (begin, min(share, parameter.numel() - begin))
            state = self._adamw.state[parameter]
            tensors = {"fp32": parameter.data.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
            fragments.append(Fragment(name, tuple(parameter.shape), 0, parameter.numel(), owned, tensors))
        return fragments

    def _of_stages_1_and_2(self) -> list[Fragment]:
        groups = self._zero.bf16_groups if hasattr(self._zero, "bf16_groups") else self._zero.bit16_groups
        fragments = []
        for vector, parameters in zip(self._vectors(), groups, strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:  # no element of this parameter lies on this rank
                    continue
                in_parameter, in_vector = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                tensors = self._views(vector, in_vector.start, in_vector.numel)
                name, whole = self._names[parameter], (0, in_vector.numel)
                fragments.append(
                    Fragment(name, tuple(parameter.shape), in_parameter.start, in_parameter.numel, whole, tensors)
                )
        return fragments

    def _of_stage_3(self) -> list[Fragment]:
        vectors = self._vectors()
        fragments = []
        parameter: Any  # DeepSpeed adds ds_numel and ds_shape to parameters
        for parameter, name in self._names.items():
            index, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = length * distributed.rank()
            numel = max(0, min(length, parameter.ds_numel - start))
            if numel == 0:  # only padding of this parameter lies on this rank
                continue
            tensors = self._views(vectors[index], offset, numel)
            fragments.append(Fragment(name, tuple(parameter.ds_shape), start, numel, (0, numel), tensors))
        return fragments

    def _views(self, vector: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
        state = self._adamw.state[vector]
        views = {"fp32": vector.data.narrow(0, offset, numel)}
        return views | {kind: state[kind].narrow(0, offset, numel) for kind in MOMENTS}

    def _require_cover(self, fragments: list[Fragment]) -> None:
        order = {name: place for place, name in enumerate(self._names.values())}
        held = torch.zeros(len(order), dtype=torch.int64)
        for fragment in fragments:
            held[order[fragment.name]] += fragment.owned[1]
        sizes = [int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in self._names]
        distributed.sum_over_ranks(held)
        for name, present, expected in zip(order, held.tolist(), sizes, strict=True):
            if present != expected:
                raise DinoScaleError(
                    f"parameter {name} has {expected} elements, DeepSpeed's partitions under ZeRO {self._stage} hold "
                    f"{present}: they are not laid out as in DeepSpeed {VERSION}"
                )
