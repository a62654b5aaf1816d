"""The only place that imports DeepSpeed: building the engine, driving it, and its state by parameter name.

Under ZeRO 1 to 3 a rank holds the fragments that DeepSpeed gave it; under stage 0 it holds everything and owns (writes)
an even share. Checkpoints and the weight average are built on fragments alone, so neither knows the stage, the number
of workers or the precision. How DeepSpeed lays fragments out is known to partitions.py.

Precision: parameters are float32 (bf16 is then autocast inside the module), or with `bf16_parameters` they are bfloat16
beside float32 masters; gradients are accumulated and exchanged in float32 either way.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.errors import ConfigError
from dino_scale.training import distributed
from dino_scale.training.optimizer import ParameterGroup
from dino_scale.training.participation import Participation
from dino_scale.training.partitions import MOMENTS, VERSION, Fragment, Partitions

REDUCE_BUCKET = 50_000_000  # elements of gradients that travel at once; DeepSpeed's own 500 million fill 2 GB of a GPU
PERSISTENT_PARAMETER = 100_000  # elements up to which stage 3 keeps a parameter whole (DeepSpeed's default)


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
        bf16_parameters: bool = False,
    ) -> None:
        """`module` is what is called; it contains `model`, whose parameter names are those of checkpoints.

        Both must be equal on all ranks. `accumulation` microbatches make one optimizer step of this rank.
        bf16_parameters: trained and frozen parameters become bfloat16; the masters keep the values that `model` has
        now, in float32. Not under stage 0, where DeepSpeed's optimizer differs from that of the other stages.
        """
        if bf16_parameters and stage == 0:
            raise ConfigError("bf16 parameters under ZeRO stage 0: expected stage 1, 2 or 3, or autocast (bf16)")
        self.stage = stage
        self.bf16_parameters = bf16_parameters
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
        exact = _copies(model) if bf16_parameters else {}
        clip = clip_norm if stage > 0 else 0.0
        self._engine = _initialise(
            module, self._optimizer, _deepspeed_config(stage, microbatch, accumulation, clip, bf16_parameters)
        )
        self._excess = _to_power_of_two(distributed.world_size()) if bf16_parameters else 1.0
        if self._excess != 1 and stage > 1:
            self._engine.optimizer.override_loss_scale(self._excess)
        self._partitions = Partitions(stage, self._engine.optimizer, self._optimizer, self._names)
        self._partitions.create_moments()
        self.fragments: tuple[Fragment, ...] = self._partitions.fragments()
        self._participation = Participation(self._names)
        self._exact_frozen = {name: exact[name] for name in self._frozen() if name in exact}
        self._set_masters(exact)

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one microbatch; DeepSpeed divides by accumulation and averages over ranks.

        ConfigError when a trained parameter takes no part in it.
        """
        self._participation.watch(loss)
        self._engine.backward(loss * self._excess if self._excess != 1 and self.stage == 1 else loss)

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
        to 3; stage 0 has no such guard, so clipping is done here.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        if self._excess != 1 and self.stage == 1:
            self._remove_excess()
        own_norm = self._clip() if self.stage == 0 else None
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() if own_norm is None else own_norm)
        overflow = bool(getattr(self._engine.optimizer, "overflow", False))
        applied = math.isfinite(norm) and norm >= 0 and not overflow
        return StepOutcome(norm if applied else math.nan, applied)

    def _clip(self) -> float:
        """Stage 0: gradients are averaged and equal on all ranks; clip them, or drop them all if one is not finite."""
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._names), self._clip_norm or math.inf))
        if not math.isfinite(norm):
            self.model.zero_grad(set_to_none=True)
        return norm

    def _remove_excess(self) -> None:
        """Stage 1 with bf16 parameters has an optimizer without a loss scale, and its sums are whole on every rank."""
        sums, _ = self._engine.optimizer.get_grads_for_reduction()
        for values in sums:
            values.div_(self._excess)

    def optimizer_steps(self) -> int:
        """AdamW's own step count (skipped steps do not count)."""
        steps = {int(state["step"]) for state in self._optimizer.state.values()}
        return max(steps, default=0)

    def set_optimizer_steps(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            state["step"] = torch.tensor(float(steps))

    def publish(self) -> None:
        """Make the module's weights equal the float32 masters after fragments were written to."""
        self._partitions.publish()

    @torch.no_grad()
    def _set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Float32 masters as they were before DeepSpeed rounded the parameters they are made from."""
        for fragment in self.fragments if values else ():
            whole = values[fragment.name].view(-1)
            fragment.tensors["fp32"].copy_(whole.narrow(0, fragment.start, fragment.numel))

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
        """Copies, on the CPU, of frozen parameters and buffers by name; equal on all ranks. Call on every rank.

        Frozen parameters are given in the precision they came in, also where the module computes with bfloat16.
        """
        frozen = {name: parameter for name, parameter in self._frozen().items() if name not in self._exact_frozen}
        with self._whole(frozen.values()):
            state = {name: parameter.detach().cpu().clone() for name, parameter in frozen.items()}
        state |= {name: values.clone() for name, values in self._exact_frozen.items()}
        return state | {name: buffer.cpu().clone() for name, buffer in self._buffers().items()}

    @torch.no_grad()
    def set_untrained(self, state: Mapping[str, Tensor]) -> None:
        """Overwrite what `untrained` returns. Call on every rank with equal values."""
        frozen = self._frozen()
        with self._whole(frozen.values(), write=True):
            for name, parameter in frozen.items():
                parameter.copy_(state[name])
        for name, values in self._exact_frozen.items():
            values.copy_(state[name])
        for name, buffer in self._buffers().items():
            buffer.copy_(state[name])

    def _frozen(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in persistent}

    def _whole(
        self, parameters: Iterable[nn.Parameter], write: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Stage 3 splits frozen parameters too; inside this context they are whole."""
        if self.stage < 3:
            return contextlib.nullcontext()
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


def _to_power_of_two(workers: int) -> float:
    """What makes a power of two of the number of workers.

    Losses come multiplied by that number, over which DeepSpeed averages. In bfloat16 every gradient on the way is
    rounded otherwise by a factor that is no power of two, so it is made one, and the excess is taken off the float32
    sums: by DeepSpeed itself where it has a loss scale.
    """
    return (1 << (workers - 1).bit_length()) / workers


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def _deepspeed_config(
    stage: int, microbatch: int, accumulation: int, clip_norm: float, bf16_parameters: bool
) -> dict[str, Any]:
    """DeepSpeed's JSON. Gradients of bfloat16 parameters are summed in float32, over microbatches and over workers:
    in bfloat16 the sum would depend on the number of workers."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": stage > 0,
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage3_param_persistence_threshold": PERSISTENT_PARAMETER,
    }
    config = {
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: exact and present on every device
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if bf16_parameters:
        zero["reduce_scatter"] = stage != 2  # with it stage 2 divides by the number of workers before it widens
        config |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return config


def require_version(found: str) -> None:
    """ConfigError unless it is the version whose partitions this program reads ("+..." for a local build is fine)."""
    if found.split("+")[0] != VERSION:
        raise ConfigError(
            f"DeepSpeed {found} is installed, expected {VERSION}, whose partitions this program reads: "
            f"pip install deepspeed=={VERSION}"
        )


def load_deepspeed() -> Any:
    """The library, set up for training. The first call takes seconds, which a process may spend before it is needed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"DeepSpeed cannot be imported ({error}): install deepspeed=={VERSION}") from error
    require_version(deepspeed.__version__)
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
    from deepspeed.utils import groups

    # It keeps a copy of the process group, which may be one that this process has left since.
    groups._release_process_group_references()
    with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints the memory in use, at every group
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
