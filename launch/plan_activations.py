"""What one microbatch occupies between forward and backward, counted on a step whose tensors have no storage.

The real detector and loss run, with gradients, on fake tensors: every operator yields shapes and types only. A dispatch
mode adds up the storages that are alive. Nothing is guessed from formulas, and Swin-L at 1200 x 2000 takes seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_scale.config.schema import LossConfig, ModelConfig
from dino_scale.loss.criterion import Criterion
from dino_scale.model.denoising import Denoiser, DenoisingQueries, Draws
from dino_scale.model.dino import Dino, build_model
from dino_scale.precision import BF16_PARAMETERS
from dino_scale.structures import Batch, Targets
from dino_scale.training.objective import Objective

# Denoising fills its queries whatever the boxes are (groups = queries // boxes), so their number hardly matters.
BOXES_PER_IMAGE = 20
_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# What autocast runs in float32 on CUDA (torch's list) but not on the CPU, as far as detectors use it.
_WIDENED_ON_CUDA = ("layer_norm", "group_norm", "softmax.int")


@dataclass(frozen=True)
class Microbatch:
    """What goes through the model at once. size: padded (height, width) in pixels."""

    images: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Activations:
    """Bytes. peak: the most that is alive at any moment of forward and backward, besides parameters and gradients;
    saved: what backward keeps of the forward pass; batch: the uint8 images alone, a part of both."""

    peak: int
    saved: int
    batch: int


def measure_activations(
    config: ModelConfig, classes: int, loss: LossConfig, precision: str, microbatch: Microbatch, device: str = "cpu"
) -> Activations:
    """device: whose autocast rules count, "cpu" or "cuda"; no device is touched."""
    with torch.device("meta"):
        model = build_model(config, classes, pretrained=False).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = model.to_empty(device="cpu")
        if precision == BF16_PARAMETERS:
            model = model.bfloat16()
        if model.denoiser is not None:
            model.add_module("denoiser", _DenoiserWithValues(model, classes, fake))
        for parameter in model.parameters():  # kept from step to step, so no part of what comes and goes
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        mean, std = _MEAN_STD
        objective = Objective(model, Criterion(loss, _match_nothing), precision=precision, mean=mean, std=std)
        rules = _cuda_autocast() if device == "cuda" and precision != "fp32" else nullcontext()
        return _count(objective, microbatch, rules)


def _count(objective: Objective, microbatch: Microbatch, rules: AbstractContextManager[Any]) -> Activations:
    alive = _AliveStorages(objective)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not alive.ignores(tensor):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with alive, rules:  # in backward too, which recomputes what is checkpointed
        batch = _batch(microbatch)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss, _ = objective(batch, 1.0, torch.Generator())
        kept = sum(saved.values())
        loss.backward()
    return Activations(peak=alive.peak, saved=kept, batch=batch.images.nbytes)


def _batch(microbatch: Microbatch) -> Batch:
    count, size = microbatch.images, microbatch.size
    boxes = count * BOXES_PER_IMAGE
    targets = Targets(torch.empty(boxes, dtype=torch.int64), torch.empty((boxes, 4)), (BOXES_PER_IMAGE,) * count)
    images = torch.empty((count, 3, *size), dtype=torch.uint8)
    return Batch(images, (size,) * count, (size,) * count, (0,) * count, (0,) * count, targets)


class _AliveStorages(TorchDispatchMode):
    """Adds up the bytes of storages made while it is active, less those that are gone again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._watched: dict[int, weakref.ref] = {}
        kept = [*module.parameters(), *module.buffers()]
        kept += [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        self._kept = {tensor.untyped_storage()._cdata for tensor in kept}

    def ignores(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._kept

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not self.ignores(leaf):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _DenoiserWithValues(nn.Module):
    """How many labels change decides shapes, so the model's denoiser runs on real tensors, and only its result is fake.

    What its embedding saves (boxes x hidden) is left out.
    """

    def __init__(self, model: Dino, classes: int, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        with unset_fake_temporarily():
            self._denoiser = Denoiser(model.config.denoising, classes, model.config.hidden)

    def forward(self, targets: Targets, generator: torch.Generator | None, draws: Draws | None) -> DenoisingQueries:
        with unset_fake_temporarily():
            boxes = sum(targets.counts)
            real = Targets(torch.zeros(boxes, dtype=torch.int64), torch.full((boxes, 4), 0.5), targets.counts)
            queries = self._denoiser(real, torch.Generator())
        return replace(
            queries,
            content=self._fake.from_tensor(queries.content.detach()).requires_grad_(),
            reference=self._fake.from_tensor(queries.reference),
            positives=self._fake.from_tensor(queries.positives),
        )


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """While it lasts, autocast on the CPU runs in float32 what it runs in float32 on CUDA, too."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in _WIDENED_ON_CUDA:
            library.impl(name, _widened(getattr(torch.ops.aten, name.split(".")[0])), "AutocastCPU")
        yield


def _widened(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(first: Tensor, *rest: Any) -> Tensor:
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(first.float(), *rest)

    return run


def _match_nothing(logits: Tensor, boxes: Tensor, targets: Targets, config: LossConfig) -> Tensor:
    """Which query answers for a box does not change the size of anything."""
    return torch.zeros((len(logits), len(targets.labels)), dtype=torch.int64, device=logits.device)
