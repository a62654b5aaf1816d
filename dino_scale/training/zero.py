"""The only place that knows DeepSpeed: building the engine, and reading and writing its partitions by parameter name.

A `Fragment` is a 1-D piece of one parameter together with its optimizer state. Under ZeRO 1 to 3 a rank holds the
pieces that DeepSpeed gave it; under stage 0 it holds everything and owns (writes) an even share. Checkpoints and the
weight average are built on fragments alone, so neither knows the stage nor the number of workers.

The partition layout below is that of DeepSpeed 0.19.8; tests/training/test_zero.py fails loudly if another version
moves it. Calls that lose or refuse state in that version (universal checkpoint, safe_get/set_full_*) are not used.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.errors import ConfigError
from dino_scale.training import distributed
from dino_scale.training.optimizer import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCE_BUCKET = (
    50_000_000  # elements of gradients that travel at once; DeepSpeed's 500 million would hold 2 GB of a GPU
)
PERSISTENT_PARAMETER = 100_000  # elements up to which stage 3 keeps a parameter whole (DeepSpeed's default)


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


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did: the L2 norm of the whole gradient before clipping, and whether it was applied."""

    gradient_norm: float
    applied: bool


class ZeroEngine:
    """DeepSpeed around a module whose forward returns (loss, anything detached)."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        stage: int,
        microbatch: int,
        accumulation: int,
        clip_norm: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        """`module` is what is called; it contains `model`, whose parameter names are those of checkpoints.

        Both must be equal on all ranks. `accumulation` microbatches make one optimizer step of this rank.
        """
        self.stage = stage
        self.model = model
        self.kinds: tuple[str, ...] = ("fp32", *MOMENTS)
        self.groups = tuple(groups)
        self._names = {parameter: name for group in groups for name, parameter in group.parameters}
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameter for _, parameter in group.parameters],
                    "lr": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            betas=betas,
            eps=epsilon,
        )
        self._clip_norm = clip_norm
        config = _deepspeed_config(stage, microbatch, accumulation, clip_norm if stage > 0 else 0.0)
        self._engine = _initialise(module, self._optimizer, config)
        self._create_moments()
        self.fragments: tuple[Fragment, ...] = tuple(self._collect_fragments())

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one microbatch; DeepSpeed divides by accumulation and averages over ranks."""
        self._engine.backward(loss)

    def set_rate_factor(self, factor: float) -> None:
        """Set every group's learning rate to its own rate times `factor`."""
        for group, options in zip(self.groups, self._engine.optimizer.param_groups, strict=True):
            options["lr"] = group.learning_rate * factor

    def learning_rates(self) -> dict[str, float]:
        options = self._engine.optimizer.param_groups
        return {group.name: float(option["lr"]) for group, option in zip(self.groups, options, strict=True)}

    def step(self) -> StepOutcome | None:
        """End a microbatch: after the last of a step, clip and update and return the outcome, else None.

        A step whose gradient is not finite changes nothing on any rank. DeepSpeed 0.19.8 sees to that under stages 1
        to 3 (parameters being float32); stage 0 has no such guard, so clipping is done here.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        own_norm = self._clip() if self.stage == 0 else None
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if own_norm is None else own_norm)
        applied = math.isfinite(norm) and norm >= 0
        return StepOutcome(norm if applied else math.nan, applied)

    def _clip(self) -> float:
        """Stage 0: gradients are averaged and equal on all ranks; clip them, or drop them all if one is not finite."""
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._names), self._clip_norm or math.inf))
        if not math.isfinite(norm):
            self.model.zero_grad(set_to_none=True)
        return norm

    def optimizer_steps(self) -> int:
        """AdamW's own step count (skipped steps do not count)."""
        steps = {int(state["step"]) for state in self._optimizer.state.values()}
        return max(steps, default=0)

    def set_optimizer_steps(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(steps))

    def publish(self) -> None:
        """Make the module's weights equal the float32 masters after fragments were written to."""
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def gather(self, kind: str) -> dict[str, Tensor]:
        """Full float32 tensors of every trained parameter on every rank, on the CPU; bit-exact.

        Each rank puts its owned parts into zeros and the bits are summed as integers, so not even -0.0 changes.
        """
        full = {name: torch.zeros(shape).view(-1) for name, shape in self.shapes().items()}
        for fragment in self.fragments:
            offset, numel = fragment.owned
            begin = fragment.start + offset
            full[fragment.name][begin : begin + numel] = fragment.tensors[kind].narrow(0, offset, numel).cpu()
        for values in full.values():
            distributed.sum_over_ranks(values.view(torch.int32))
        return {name: values.view(self.shapes()[name]) for name, values in full.items()}

    def untrained(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of frozen parameters and buffers by name; equal on all ranks. Call on every rank."""
        frozen = self._frozen()
        with self._whole(frozen.values()):
            state = {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}
        return state | {name: buffer.cpu().clone() for name, buffer in self._buffers().items()}

    @torch.no_grad()
    def set_untrained(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite what `untrained` returns. Call on every rank with equal values."""
        frozen = self._frozen()
        with self._whole(frozen.values(), write=True):
            for name, parameter in frozen.items():
                parameter.copy_(state[name])
        for name, buffer in self._buffers().items():
            buffer.copy_(state[name])

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in persistent}

    def _whole(self, parameters: Iterable[nn.Parameter], write: bool = False) -> AbstractContextManager[None]:
        """Stage 3 splits frozen parameters too; inside this context they are whole."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(parameters), modifier_rank=0 if write else None)

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and memory."""
        self._engine.destroy()

    def attach(self, kind: str) -> None:
        """Give every fragment one more tensor, which starts as a copy of the weights and is saved with the rest."""
        for fragment in self.fragments:
            fragment.tensors[kind] = fragment.tensors["fp32"].detach().clone()
        self.kinds += (kind,)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every trained parameter."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for p, name in self._names.items()}

    def _create_moments(self) -> None:
        """AdamW makes its moments at the first step; make them now, so that a checkpoint can be loaded before it."""
        if self.stage in (1, 2):
            vectors = list(self._engine.optimizer.single_partition_of_fp32_groups)
        elif self.stage == 3:
            vectors = list(self._engine.optimizer.fp32_partitioned_groups_flat)
        else:
            vectors = list(self._names)
        for vector in vectors:
            state = self._optimizer.state[vector]
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(vector, memory_format=torch.preserve_format))
            state.setdefault("step", torch.tensor(0.0))

    def _collect_fragments(self) -> list[Fragment]:
        if self.stage in (1, 2):
            return self._fragments_of_stages_1_and_2()
        if self.stage == 3:
            return self._fragments_of_stage_3()
        return self._fragments_of_stage_0()

    def _fragments_of_stage_0(self) -> list[Fragment]:
        rank, world = distributed.rank(), distributed.world_size()
        fragments = []
        for parameter, name in self._names.items():
            share = math.ceil(parameter.numel() / world)
            begin = min(share * rank, parameter.numel())
            owned = (begin, min(share, parameter.numel() - begin))
            state = self._optimizer.state[parameter]
            tensors = {"fp32": parameter.data.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
            fragments.append(Fragment(name, tuple(parameter.shape), 0, parameter.numel(), owned, tensors))
        return fragments

    def _fragments_of_stages_1_and_2(self) -> list[Fragment]:
        optimizer = self._engine.optimizer
        fragments = []
        for index, vector in enumerate(optimizer.single_partition_of_fp32_groups):
            for parameter in optimizer.bit16_groups[index]:
                mapping = parameter._hp_mapping
                if mapping is None:  # no element of this parameter lies on this rank
                    continue
                in_parameter, in_vector = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                tensors = self._views(vector, in_vector.start, in_vector.numel)
                name = self._names[parameter]
                whole = (0, in_vector.numel)
                fragments.append(
                    Fragment(name, tuple(parameter.shape), in_parameter.start, in_parameter.numel, whole, tensors)
                )
        return fragments

    def _fragments_of_stage_3(self) -> list[Fragment]:
        optimizer = self._engine.optimizer
        fragments = []
        parameter: Any  # DeepSpeed adds ds_numel and ds_shape to parameters
        for parameter, name in self._names.items():
            index, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * distributed.rank()
            numel = max(0, min(length, parameter.ds_numel - start))
            if numel == 0:  # only padding of this parameter lies on this rank
                continue
            tensors = self._views(optimizer.fp32_partitioned_groups_flat[index], offset, numel)
            fragments.append(Fragment(name, tuple(parameter.ds_shape), start, numel, (0, numel), tensors))
        return fragments

    def _views(self, vector: Tensor, offset: int, numel: int) -> dict[str, Tensor]:
        state = self._optimizer.state[vector]
        views = {"fp32": vector.data.narrow(0, offset, numel)}
        return views | {kind: state[kind].narrow(0, offset, numel) for kind in MOMENTS}


def _deepspeed_config(stage: int, microbatch: int, accumulation: int, clip_norm: float) -> dict[str, Any]:
    """DeepSpeed's JSON; parameters stay float32 (bf16 is autocast inside the module)."""
    return {
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: exact and present on every device
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": stage > 0,
            "reduce_bucket_size": REDUCE_BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT_PARAMETER,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def load_deepspeed() -> Any:
    """The library, set up for training. The first call takes seconds, which a process may spend before it is needed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"DeepSpeed cannot be imported ({error}): install deepspeed==0.19.8") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives under names that newer torch has renamed: nothing a user could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Its shared-memory collectives serve inference only, and building them costs a C++ compile of 45 s at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _initialise(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    deepspeed = load_deepspeed()
    deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
