"""Checkpoints: bit-exact at any topology, torn ones found out, nothing half-written, no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dino_scale.checkpoint import store
from dino_scale.errors import CheckpointError
from tests.support.processes import run_ranks
from tests.support.tiny_training import load_and_train, module_equals_masters, train_and_save, train_whole

STEPS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[float]]:
    """A checkpoint after 4 steps of 2 workers under ZeRO 1, its state, and the losses of an undisturbed run of 8."""
    root = tmp_path_factory.mktemp("checkpoints")
    _, state = run_ranks(train_and_save, 2, 1, STEPS, str(root))[0]
    whole, _, _ = run_ranks(train_whole, 2, 1, 2 * STEPS)[0]
    return root, state, whole


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 3), (2, 0), (2, 1), (2, 3), (3, 2)])
def test_state_is_bit_equal_at_any_topology_and_training_goes_on(saved, world: int, stage: int) -> None:
    root, state, whole = saved
    loaded, losses, _, _ = run_ranks(load_and_train, world, stage, str(root), STEPS)[0]
    assert loaded == state
    assert losses == pytest.approx(whole[STEPS:], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_can_be_the_source(tmp_path: Path, stage: int) -> None:
    _, state = run_ranks(train_and_save, 2, stage, STEPS, str(tmp_path))[0]
    loaded, _, _, _ = run_ranks(load_and_train, 1, 1, str(tmp_path), 1)[0]
    assert loaded == state


def test_resumed_run_ends_bitwise_where_the_undisturbed_one_does(saved) -> None:
    root, _, _ = saved
    _, _, resumed, _ = run_ranks(load_and_train, 2, 1, str(root), STEPS)[0]
    _, undisturbed, _ = run_ranks(train_whole, 2, 1, 2 * STEPS)[0]
    assert resumed == undisturbed


@pytest.mark.parametrize("stage", [1, 3])
def test_module_computes_with_the_loaded_weights(saved, stage: int) -> None:
    outputs = run_ranks(module_equals_masters, 2, stage, str(saved[0]))[0]
    assert outputs["engine"] == pytest.approx(outputs["plain"], rel=1e-6)


def _two_checkpoints(saved, tmp_path: Path) -> tuple[Path, Path]:
    """A good checkpoint of step 2 and a copy of it that says step 4."""
    good, newest = tmp_path / "step_00000002", tmp_path / "step_00000004"
    shutil.copytree(saved[0] / "step_00000004", good)
    shutil.copytree(saved[0] / "step_00000004", newest)
    return good, newest


def _truncate(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _flip_a_byte(folder: Path) -> None:
    path = folder / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _change_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "truncated": _truncate,
    "altered": _flip_a_byte,
    "missing": lambda folder: (folder / "shard-00000.safetensors").unlink(),
    "torn": lambda folder: (folder / "manifest.json").unlink(),
    "JSON": lambda folder: (folder / "manifest.json").write_text('{"format": "dino'),
    "version 3": lambda folder: _change_manifest(folder, version=3),
    "field": lambda folder: _change_manifest(folder, pieces=7),
    "leaves the folder": lambda folder: _change_manifest(folder, files={"../x": {"bytes": 0, "sha256": ""}}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path: Path, damage: str) -> None:
    good, newest = _two_checkpoints(saved, tmp_path)
    DAMAGES[damage](newest)
    said: list[str] = []
    found = store.find_newest(tmp_path, said.append)
    assert found is not None and found[0] == good
    assert len(said) == 1 and newest.name in said[0] and damage in said[0] and good.name in said[0]


def test_only_damaged_checkpoints_are_an_error_not_a_new_start(saved, tmp_path: Path) -> None:
    good, newest = _two_checkpoints(saved, tmp_path)
    _truncate(good)
    _flip_a_byte(newest)
    with pytest.raises(CheckpointError, match="delete that folder to start anew"):
        store.find_newest(tmp_path, print)


def test_folder_that_was_not_committed_is_not_seen(saved, tmp_path: Path) -> None:
    shutil.copytree(saved[0] / "step_00000004", tmp_path / ".step_00000008.partial")
    assert store.find_newest(tmp_path, print) is None


def test_no_pickle_is_read(saved, tmp_path: Path) -> None:
    """A file that runs code when unpickled, put where a checkpoint's shard is expected, is refused and not run."""
    marker = tmp_path / "marker"
    folder = tmp_path / "root" / "step_00000004"
    shutil.copytree(saved[0] / "step_00000004", folder)
    hostile = b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    (folder / "common.safetensors").write_bytes(hostile)
    entry = {"bytes": len(hostile), "sha256": __import__("hashlib").sha256(hostile).hexdigest()}
    files = json.loads((folder / "manifest.json").read_text())["files"] | {"common.safetensors": entry}
    _change_manifest(folder, files=files)
    with pytest.raises(AssertionError, match="Error"):
        run_ranks(load_and_train, 1, 0, str(tmp_path / "root"), 1)
    assert not marker.exists()
