"""Damaged and hostile checkpoints are named, and the one before is used; nothing in them is believed or run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dino_scale.checkpoint import store
from dino_scale.checkpoint.layout import list_checkpoints
from dino_scale.errors import CheckpointError
from tests.support import handmade

SHARD = "shard-00000.safetensors"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with checkpoints of two ranks after steps 2 and 4."""
    handmade.write(tmp_path, 2, world=2)
    handmade.write(tmp_path, 4, world=2)
    return tmp_path


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def put(key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda content: content.update({key: value}))


def piece(index: int, **changes: object) -> Callable[[Path], None]:
    """A change of one of the two pieces of layer.weight (elements 0 to 14 and 15 to 29)."""
    return edit(lambda content: content["pieces"]["layer.weight"][index].update(changes))


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "manifest.json").write_text(content) and None


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    """Another file of that name, with size and digest in the manifest that fit: only the content betrays it."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit(lambda manifest: manifest["files"].update({name: entry}))(folder)

    return apply


def reshape(folder: Path) -> None:
    """The shard's tensors as columns: the same bytes under another header."""
    save_file({key: value.view(-1, 1) for key, value in load_file(folder / SHARD).items()}, folder / "new")
    replace(SHARD, (folder / "new").read_bytes())(folder)


def cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-5])


def flip(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[len(content) // 2] ^= 16
    (folder / SHARD).write_bytes(content)


ENTRY = {"bytes": 1, "sha256": "0" * 64}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (cut, "truncated or altered"),
    "missing shard": (lambda folder: (folder / "shard-00001.safetensors").unlink(), "00001.safetensors: missing"),
    "flipped bit": (flip, "sha256 differs"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "manifest.json is missing"),
    "manifest is a folder": (
        lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").mkdir()),
        "cannot be read",
    ),
    "half a manifest": (text('{"format": "dino'), "not readable as JSON"),
    "manifest of zeros": (text("\0" * 4096), "not readable as JSON"),
    "deep manifest": (text("[" * 100_000), "nested too deeply"),
    "long number": (text('{"format": ' + "9" * 10_000 + "}"), "not readable as JSON"),
    "twice the same field": (text('{"step": 1, "step": 2}'), "'step' stands twice"),
    "newer version": (put("version", 3), "format version 3, expected 2: use the dino-scale that wrote it"),
    "other format": (put("format", "torch"), "not a manifest of"),
    "NaN step": (put("step", float("nan")), "NaN is not JSON"),
    "infinite best": (edit(lambda c: c.update(best={"metric": "AP", "value": float("inf"), "step": 1})), "Infinity"),
    "best beyond floats": (text('{"a": 1e999}'), "not a manifest"),
    "negative step": (put("step", -1), "step has -1"),
    "step as text": (put("step", "4"), "step has '4'"),
    "step as truth": (put("step", True), "step has True"),
    "unknown field": (put("run", "os.system"), "unexpected keyword argument 'run'"),
    "lacking field": (edit(lambda content: content.pop("files")), "'files'"),
    "absolute path": (edit(lambda c: c["files"].update({"/etc/passwd": ENTRY})), "'/etc/passwd' leaves the folder"),
    "path upwards": (edit(lambda c: c["files"].update({"../x": ENTRY})), "'../x' leaves the folder"),
    "hidden path": (edit(lambda c: c["files"].update({"..": ENTRY})), "'..' leaves the folder"),
    "piece elsewhere": (piece(0, file="../shard"), "said to lie in '../shard'"),
    "digest of another kind": (edit(lambda c: c["files"][SHARD].update(sha256="md5")), "sha256 'md5'"),
    "negative size": (edit(lambda c: c["files"][SHARD].update(bytes=-1)), "has -1"),
    "huge file": (edit(lambda c: c["files"][SHARD].update(bytes=1 << 60)), "truncated or altered"),
    "huge parameter": (
        edit(lambda c: c["parameters"].update({"layer.weight": [1 << 40, 1 << 40]})),
        "layer.weight is not whole",
    ),
    "huge piece": (
        edit(
            lambda c: (
                c["parameters"].update({"layer.bias": [1 << 50]}),
                c["pieces"].update({"layer.bias": [{"file": SHARD, "start": 0, "numel": 1 << 50}]}),
            )
        ),
        "has no room for them",
    ),
    "negative start": (piece(0, start=-3), "has -3"),
    "negative length": (piece(1, numel=-15), "has -15"),
    "overlap": (piece(1, start=14), "overlap or leave a hole at 15"),
    "hole": (piece(1, start=16), "overlap or leave a hole at 15"),
    "too short": (piece(1, numel=14), "hold 29 of 30"),
    "piece left out": (edit(lambda c: c["pieces"]["layer.weight"].pop()), "hold 15 of 30"),
    "parameter left out": (edit(lambda c: c["pieces"].pop("layer.bias")), "layer.bias is not whole"),
    "unknown parameter": (edit(lambda c: c["pieces"].update(x=[])), "pieces of x, no parameter"),
    "no weights": (put("kinds", ["exp_avg"]), "kinds has ['exp_avg']"),
    "kind invented": (put("kinds", ["fp32", "ema"]), "tensor ema:layer.bias:0 is None, the manifest says"),
    "no common file": (edit(lambda c: c["files"].pop("common.safetensors")), "files lacks common.safetensors"),
    "piece in another shard": (piece(0, file="shard-00001.safetensors"), "the manifest says None"),
    "other tensors": (reshape, "the manifest says"),
    "header bomb": (replace(SHARD, (500_000).to_bytes(8, "little") + b" " * 600_000), "500000 bytes, at most"),
    "endless header": (replace(SHARD, b"\xff" * 800), "said to have 18446744073709551615 bytes"),
    "not tensors": (replace("common.safetensors", b"cos\nsystem\n(S'true'\ntR."), "altered"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_used(root: Path, damage: str) -> None:
    apply, expected = DAMAGES[damage]
    apply(root / "step_00000004")
    said: list[str] = []
    found = store.find_newest(root, said.append)
    assert found is not None and found[0] == root / "step_00000002" and found[1].step == 2
    assert len(said) == 1
    assert "step_00000004" in said[0] and expected in said[0] and said[0].endswith("; using step_00000002 instead")


def test_without_damage_the_newest_is_used(root: Path) -> None:
    said: list[str] = []
    found = store.find_newest(root, said.append)
    assert found is not None and found[0].name == "step_00000004" and not said
    assert handmade.values(found[0]) == {4.0}


def test_an_unreadable_manifest_costs_no_memory(root: Path) -> None:
    """A sparse file of 100 GB stands where the manifest was; reading stops long before its end."""
    with (root / "step_00000004" / "manifest.json").open("wb") as file:
        file.truncate(100 << 30)
    said: list[str] = []
    assert store.find_newest(root, said.append) is not None
    assert "not readable as JSON (more than" in said[0]


def test_only_damaged_checkpoints_are_an_error(root: Path) -> None:
    for folder in list_checkpoints(root):
        cut(folder)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left in .*delete that folder to start anew"):
        store.find_newest(root, print)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "common.safetensors", "manifest.json", "extra.pkl"])
def test_a_pickle_in_a_checkpoint_is_not_run(root: Path, name: str) -> None:
    """The file would leave a marker when unpickled; its size and digest are those that the manifest gives."""
    marker = root / "marker"
    hostile = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    folder = root / "step_00000004"
    if name == "manifest.json":
        (folder / name).write_bytes(hostile)
    else:
        replace(name, hostile)(folder)
    if name == "extra.pkl":
        (folder / name).with_name("unlisted.pt").write_bytes(hostile)
    found = store.find_newest(root, print)
    assert found is not None
    assert not marker.exists()
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({hostile!r})"], check=True)
    assert marker.exists(), "the file is harmless: this test proves nothing"


def test_what_was_not_committed_is_not_seen(root: Path) -> None:
    """A folder whose last rename is missing, whole as it is, and one that was being deleted."""
    os.rename(root / "step_00000004", root / ".step_00000004.abc-1.partial")
    found = store.find_newest(root, print)
    assert found is not None and found[0].name == "step_00000002"
    os.rename(root / "step_00000002", root / ".step_00000002.12.retired")
    assert store.find_newest(root, print) is None


def test_strangers_in_the_folder_are_left_alone(root: Path) -> None:
    (root / "step_notes").mkdir()
    (root / "step_00000009").write_text("a file")
    found = store.find_newest(root, print)
    assert found is not None and found[0].name == "step_00000004"


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save 24 MB is killed at different moments."""
    step = 1
    for pause in (0.0, 0.003, 0.011, 0.017, 0.029, 0.043):
        command = [sys.executable, "-m", "tests.support.handmade", str(tmp_path), str(step)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        step = int(writer.stdout.readline())
        time.sleep(pause)
        writer.kill()
        writer.communicate()
        said: list[str] = []
        found = store.find_newest(tmp_path, said.append)
        assert found is not None and not said
        assert found[1].step >= step and handmade.values(found[0]) == {float(found[1].step)}
        step = found[1].step + 1
