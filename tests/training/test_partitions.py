"""Where DeepSpeed keeps what, and what it does wrong in silence: these tests fail when an upgrade changes either."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from dino_scale.config.schema import StageConfig
from dino_scale.errors import ConfigError
from dino_scale.training.partitions import VERSION
from dino_scale.training.zero import require_version
from tests.support.processes import run_ranks
from tests.support.tiny_partitions import Probes, forked_engine, leave_out_on_one_rank, probe

FP32 = [(stage, "fp32") for stage in range(4)]
BF16 = [(stage, "bf16_parameters") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def probed() -> list[Probes]:
    """What each of three ranks finds: most of them hold nothing but padding of the smallest group."""
    return run_ranks(probe, 3, FP32, BF16)


def test_every_element_lies_where_the_fragments_say(probed: list[Probes]) -> None:
    """Masters start unrounded, frozen parameters stay so, and what is written to fragments reaches the module."""
    for found in probed:
        assert found.layouts == {topology: [] for topology in (*FP32, *BF16)}


def test_state_by_name_does_not_depend_on_the_stage(probed: list[Probes]) -> None:
    found = probed[0].states
    for topologies, tolerance in ((FP32, 1e-5), (BF16, 1e-5)):
        expected = found[topologies[0]]
        for topology in topologies[1:]:
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[topology][name],
                    value,
                    rtol=tolerance,
                    atol=1e-6,
                    msg=lambda text, at=(topology, name): f"{at} {text}",
                )


def test_parameter_that_takes_no_part_is_named_under_every_stage(probed: list[Probes]) -> None:
    for found in probed:
        assert sorted(found.said) == [0, 1, 2, 3]
        for text in found.said.values():
            assert text.startswith("False: parameter sometimes.weight took no part in a microbatch (2 of 4 did not)")


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_rank_that_leaves_a_parameter_out_says_so_before_the_others_wait_for_it(stage: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0"):
        run_ranks(leave_out_on_one_rank, 2, stage, str(tmp_path), timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert "parameter sometimes.weight took no part" in (tmp_path / "1").read_text()


def test_the_guard_is_needed(probed: list[Probes]) -> None:
    """Without it stage 3 takes the gradient of the step before once more, where the others take zero.

    Should this fail after an upgrade of DeepSpeed, the trap may be gone, and participation.py with it.
    """
    assert sorted(probed[0].moments) == [1, 2, 3]
    for stage, (before, after) in probed[0].moments.items():
        assert after == pytest.approx(before * (1.9 if stage == 3 else 0.9), rel=1e-5), stage


def test_another_version_of_deepspeed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DeepSpeed 0\.20\.0 is installed, expected .*: pip install deepspeed=="):
        require_version("0.20.0")
    require_version(f"{VERSION}+cu128")
    require_version(metadata.version("deepspeed"))


def test_bf16_parameters_without_zero_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="precision is bf16_parameters with zero_stage 0: expected zero_stage 1, 2 or 3"
    ):
        StageConfig(precision="bf16_parameters", zero_stage=0)
    StageConfig(precision="bf16_parameters", zero_stage=1)
    with pytest.raises(ConfigError, match="bf16 parameters under ZeRO stage 0"):
        forked_engine(0, bf16_parameters=True)
