"""Every trained parameter takes part in every microbatch, or training stops and names the one that did not.

DeepSpeed 0.19.8 needs that and does not check it: under ZeRO 3 a parameter without a gradient gets the one of the step
before again, silently; under ZeRO 1 to 3 one that has a gradient on some workers only makes the others abort or wait
for ever. Under stage 0 it would be harmless, but a run may go on under another stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dino_scale.errors import ConfigError


class Participation:
    """Watches which parameters a backward pass reaches.

    The check runs when autograd is done, before DeepSpeed exchanges gradients, so that a worker which found a mistake
    tells of it instead of waiting. Gradients that fill DeepSpeed's bucket (reduce_bucket_size) are exchanged earlier;
    then the others may abort first.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        """names: of all trained parameters. Call it after DeepSpeed has prepared them."""
        self._names = tuple(names.values())
        self._missing: set[str] = set()
        for parameter, name in names.items():
            parameter.register_post_accumulate_grad_hook(self._taker(name))

    def watch(self, loss: Tensor) -> None:
        """Check the backward pass about to begin at `loss`; ConfigError in it when a parameter is missing."""
        self._missing = set(self._names)
        loss.register_hook(self._when_done)

    def _taker(self, name: str) -> Any:
        return lambda _: self._missing.discard(name)

    def _when_done(self, _: Tensor) -> None:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._require_all)

    def _require_all(self) -> None:
        if not self._missing:
            return
        first = next(name for name in self._names if name in self._missing)
        raise ConfigError(
            f"parameter {first} took no part in a microbatch ({len(self._missing)} of {len(self._names)} did not): "
            "expected a gradient for every trained parameter in every microbatch, otherwise ZeRO would use an old one "
            "or wait for ever; freeze it (model.backbone.frozen_stages) or choose model.backbone.outputs that use it"
        )
