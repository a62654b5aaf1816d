"""Rewriting a checkpoint into other files, and looking into one: the same bits, little memory, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dino_scale.checkpoint.manifest import read_manifest, verify
from dino_scale.checkpoint.ranges import ParameterReader
from dino_scale.checkpoint.reshard import reshard
from dino_scale.errors import CheckpointError, UserError
from launch.cli import main
from tests.support.written_checkpoint import whole_parameters, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("parts", [1, 2, 5, 178])
def test_state_is_bit_equal_in_any_number_of_parts(source: Path, tmp_path: Path, parts: int) -> None:
    before = read_manifest(source)
    reshard(source, tmp_path / "target", parts)
    after = verify(tmp_path / "target")
    assert whole_parameters(tmp_path / "target", after) == whole_parameters(source, before)
    assert len(list((tmp_path / "target").glob("shard-*"))) == parts
    assert (tmp_path / "target" / "common.safetensors").read_bytes() == (source / "common.safetensors").read_bytes()
    places = ("pieces", "files")
    assert {name: value for name, value in vars(after).items() if name not in places} == {
        name: value for name, value in vars(before).items() if name not in places
    }
    assert {path.name for path in (tmp_path / "target").iterdir()} == {*after.files, "manifest.json"}


def test_parts_have_equal_sizes(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "target", 4)
    manifest = read_manifest(tmp_path / "target")
    held = dict.fromkeys((f"shard-{part:05d}.safetensors" for part in range(4)), 0)
    for piece in (piece for pieces in manifest.pieces.values() for piece in pieces):
        held[piece.file] += piece.numel
    assert max(held.values()) - min(held.values()) <= 1, held


def test_there_and_back_gives_the_same_files(source: Path, tmp_path: Path) -> None:
    reshard(source, tmp_path / "two", 2)
    reshard(tmp_path / "two", tmp_path / "five", 5)
    reshard(tmp_path / "five", tmp_path / "again", 2)
    assert read_manifest(tmp_path / "again").files == read_manifest(tmp_path / "two").files


def test_refusals_leave_nothing_behind(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists: give the name of a new folder"):
        reshard(source, tmp_path / "there", 2)
    for parts in (0, 179):
        with pytest.raises(UserError, match="expected 1 to 178"):
            reshard(source, tmp_path / "target", parts)
    shard = source / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors: sha256 differs"):
        reshard(source, tmp_path / "target", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}


def test_manifest_with_a_hole_is_refused_and_nothing_is_left(source: Path, tmp_path: Path) -> None:
    data = json.loads((source / "manifest.json").read_text())
    del data["pieces"]["body.weight"][1]
    (source / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"parameter body\.weight is not whole"):
        reshard(source, tmp_path / "target", 2)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_reader_reads_what_is_asked_for_and_no_more(source: Path) -> None:
    manifest = read_manifest(source)
    expected = whole_parameters(source, manifest)["exp_avg:body.weight"]
    with ParameterReader(source, manifest) as reader:
        for start, numel in ((0, 143), (5, 1), (20, 100), (142, 1)):
            before, target = reader.bytes_read, bytearray(4 * numel)
            reader.read_into("exp_avg", "body.weight", start, memoryview(target))
            assert bytes(target) == expected[4 * start : 4 * (start + numel)]
            assert reader.bytes_read - before == len(target)
        with pytest.raises(CheckpointError, match="ends at element 143 of the 144"):
            reader.read_into("exp_avg", "body.weight", 140, memoryview(bytearray(16)))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
from launch.cli import main
code = main(sys.argv[2:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
heavy = [name for name in ("torch", "deepspeed", "numpy", "safetensors") if name in sys.modules]
print(code, peak, *heavy)
"""


def test_checkpoint_larger_than_memory(tmp_path: Path) -> None:
    """One shard of 240 MB, and 160 MB of address space for the whole program."""
    write_checkpoint(tmp_path / "big", {"a": (2500, 3000), "b": (12_500_000,)}, shards=1)
    shard = tmp_path / "big" / "shard-00000.safetensors"
    assert shard.stat().st_size > 240e6
    command = ["reshard", str(tmp_path / "big"), "--out", str(tmp_path / "small"), "--megabytes", "50"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(160_000_000), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    code, peak, *heavy = last.split()
    assert code == "0" and "5 shard(s)" in said[-1], done.stdout + done.stderr
    assert int(peak) * 1024 < 100e6, f"peak resident memory {peak} kB"
    assert heavy == []
    sizes = [path.stat().st_size for path in (tmp_path / "small").glob("shard-*")]
    assert len(sizes) == 5 and max(sizes) < 50e6 + 4096
    verify(tmp_path / "small")


def test_inspect_shows_tables(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "3 worker(s), ZeRO 2, fp32 parameters",
        "0.05",
        "2e-05",
        "178 in 4 tensors",
        "(1 skipped)",
        "fp32, exp_avg, exp_avg_sq",
        "shard-00002",
    ):
        assert text in shown, shown


def test_inspect_finds_damage(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = source / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["inspect", str(source), "--json"]) == 0  # sizes are right, digests were not asked for
    assert json.loads(capsys.readouterr().out)["verified"] is False
    assert main(["inspect", str(source), "--json", "--verify"]) == 3
    captured = capsys.readouterr()
    state = {entry["name"]: entry["problem"] for entry in json.loads(captured.out)["files"]}
    assert state == {
        "common.safetensors": "",
        "shard-00000.safetensors": "sha256 differs from the manifest",
        "shard-00001.safetensors": "",
        "shard-00002.safetensors": "",
    }
    assert "shard-00000.safetensors: sha256 differs" in captured.err
    shard.unlink()
    assert main(["inspect", str(source)]) == 3
    assert "shard-00000.safetensors: missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["reshard", "--parts", "2", "--out", "new"]])
def test_folder_that_is_no_checkpoint_is_a_user_error(
    source: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([*command, str(source / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    (source.parent / "step_00000008").mkdir()
    assert main([*command, str(source.parent)]) == 2
    assert "name one of them, such as" in capsys.readouterr().err
