"""A tiny two-domain data set, drawn and packed once for all tests of this folder; and the environment of Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.commands.demo import Sizes, make_data
from launch.ray_session import environment

# Ray settles on import whether it asks for a token and where it listens, and test modules that need its exceptions
# import it while they are collected: this comes before any of them, as in the program itself.
os.environ.update(environment(local=True))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with DOMAIN/{train,validation}."""
    folder = tmp_path_factory.mktemp("data") / "data"
    messages = list(make_data(folder, {"objects": Sizes(16, 4), "scenes": Sizes(8, 4)}, seed=0))
    assert any("packed 16 images" in message for message in messages)
    return folder / "shards"
