"""Length and learning-rate curve of a stage."""

from __future__ import annotations

import pytest

from dino_scale.config.schema import ScheduleConfig
from dino_scale.errors import ConfigError
from dino_scale.training.schedule import rate_factor, total_steps


def test_official_twelve_epochs() -> None:
    schedule = ScheduleConfig(epochs=12, drop_at=(11 / 12,))
    total = total_steps(schedule, 118287, 16)
    assert total == 88716
    per_epoch = total // 12
    assert rate_factor(schedule, 11 * per_epoch - 1, total) == 1.0
    assert rate_factor(schedule, 11 * per_epoch, total) == pytest.approx(0.1)


def test_warmup_and_cosine() -> None:
    schedule = ScheduleConfig(steps=110, warmup_steps=10, decay="cosine", final_factor=0.1)
    factors = [rate_factor(schedule, step, 110) for step in range(110)]
    assert factors[:10] == sorted(factors[:10]) and factors[0] > 0
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[60] == pytest.approx(0.55)
    assert 0.1 < factors[-1] < 0.102


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        ScheduleConfig(epochs=1, steps=1)
    with pytest.raises(ConfigError, match="exactly one"):
        ScheduleConfig()
