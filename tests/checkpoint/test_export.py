"""A checkpoint becomes the weights file that its stage would write, whoever wrote it, and in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_scale.checkpoint.export import export_weights
from dino_scale.errors import CheckpointError
from tests.support.exporting import CATEGORIES, PREPARATION, save_and_export
from tests.support.processes import run_ranks
from tests.support.tiny_detector import TINY
from tests.support.written_checkpoint import write_checkpoint


@pytest.mark.parametrize(
    ("world", "stage", "precision", "feedforward"), [(1, 0, "fp32", 90_000), (2, 3, "bf16_parameters", 48)]
)
def test_bytes_are_those_that_the_stage_writes(
    tmp_path: Path, world: int, stage: int, precision: str, feedforward: int
) -> None:
    found = run_ranks(save_and_export, world, stage, precision, feedforward, str(tmp_path))[0]
    for kind in ("ema", "fp32"):
        equal, grown = found[kind]
        assert equal, kind
        assert grown < 30e6, kind
    if feedforward > 1000:
        assert found["bytes"] > 60e6, "too small a model to tell whether it was held in memory"
    ema, fp32 = ((tmp_path / "checkpoints" / f"{kind}.safetensors").read_bytes() for kind in ("ema", "fp32"))
    assert ema != fp32


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_00000004")
    target = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match=r"is absent, in the model of shape .* tensors differ"):
        export_weights(tmp_path / "step_00000004", target, TINY, CATEGORIES, PREPARATION)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000004"
    write_checkpoint(folder)
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors: sha256 differs"):
        export_weights(folder, tmp_path / "w.safetensors", TINY, CATEGORIES, PREPARATION)
