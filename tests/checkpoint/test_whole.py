"""Whole tensors from a sharded checkpoint equal what the engine that wrote it held."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dino_scale.checkpoint.store import list_checkpoints
from dino_scale.checkpoint.whole import read_whole
from dino_scale.errors import CheckpointError
from tests.support.processes import run_ranks
from tests.support.tiny_training import TinyModel, train_and_save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A checkpoint of two workers under ZeRO 2, and the digests of what they held."""
    root = tmp_path_factory.mktemp("checkpoints")
    _, digests = run_ranks(train_and_save, 2, 2, 3, str(root))[0]
    return list_checkpoints(root)[-1], digests


@pytest.mark.parametrize("kind", ["fp32", "ema", "exp_avg"])
def test_equals_what_was_saved(saved: tuple[Path, dict[str, str]], kind: str) -> None:
    folder, digests = saved
    state = read_whole(folder, kind)
    assert state.keys() == TinyModel().state_dict().keys()
    for name, tensor in state.items():
        digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert digest == digests.get(f"{kind}:{name}", digests.get(name)), name


def test_unknown_kind_and_missing_pieces_are_refused(saved: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = saved
    with pytest.raises(CheckpointError, match="expected weights among them"):
        read_whole(folder, "weights")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["pieces"]["head.weight"] = manifest["pieces"]["head.weight"][:0]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"head\.weight is not whole"):
        read_whole(tmp_path)
