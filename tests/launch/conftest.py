"""A tiny two-domain data set, drawn and packed once for all tests of this folder; and tokens for Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.commands.demo import Sizes, make_data
from launch.security import authentication

# Ray settles on import whether it asks for a token, and test modules that need its exceptions import it while they are
# collected: before any of them, as the program itself does.
os.environ.update(authentication(os.environ, local=True, insecure=False))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with DOMAIN/{train,validation}."""
    folder = tmp_path_factory.mktemp("data") / "data"
    messages = list(make_data(folder, {"objects": Sizes(16, 4), "scenes": Sizes(8, 4)}, seed=0))
    assert any("packed 16 images" in message for message in messages)
    return folder / "shards"
