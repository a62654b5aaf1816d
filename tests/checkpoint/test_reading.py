"""Each rank reads its share of a checkpoint to check it, and its own ranges to load it; all agree about damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dino_scale.checkpoint.reshard import reshard
from dino_scale.checkpoint.tensor_file import FileEntry
from dino_scale.checkpoint.verification import share
from tests.support.processes import run_ranks
from tests.support.range_reading import bytes_read, save_wide, what_is_said
from tests.support.written_checkpoint import write_checkpoint

SLACK = 200_000  # bytes: headers, the manifest, modules that Python imports on the way


def test_ranks_read_their_own_ranges_and_no_file_twice(tmp_path: Path) -> None:
    """Saved by one worker in one file, cut in four by `reshard`, loaded by two."""
    run_ranks(save_wide, 1, 1, str(tmp_path / "one"))
    (folder,) = (tmp_path / "one").iterdir()
    reshard(folder, tmp_path / "four" / folder.name, 4)
    counts = run_ranks(bytes_read, 2, 2, str(tmp_path / "four"))
    total = counts[0]["total"]
    assert total > 12e6
    for count in counts:
        assert abs(count["load"] - total / 2) < SLACK, counts
        assert abs(count["verify"] - total / 2) < SLACK, counts


def test_all_ranks_hear_of_damage_that_one_of_them_finds(tmp_path: Path) -> None:
    for step in (2, 4):
        write_checkpoint(tmp_path / f"step_{step:08d}", shards=4)
    damaged = tmp_path / "step_00000004" / "shard-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for name, said in run_ranks(what_is_said, 3, str(tmp_path)):
        assert name == "step_00000002"
        assert len(said) == 1
        assert f"{damaged}: sha256 differs" in said[0] and "using step_00000002 instead" in said[0]


def test_files_are_dealt_evenly_and_each_once() -> None:
    files = {f"file-{number}": FileEntry(size, "") for number, size in enumerate((90, 50, 40, 40, 30, 20, 0))}
    shares = [share(files, rank, 3) for rank in range(3)]
    assert sorted(name for own in shares for name in own) == sorted(files)
    assert [sum(files[name].bytes for name in own) for own in shares] == [90, 100, 80]


def test_another_rule_of_random_draws_is_refused(tmp_path: Path) -> None:
    run_ranks(save_wide, 1, 1, str(tmp_path))
    (folder,) = tmp_path.iterdir()
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"random_rule": 1', '"random_rule": 2'))
    with pytest.raises(AssertionError, match="draws random numbers by rule 2, this program by 1"):
        run_ranks(bytes_read, 1, 1, str(tmp_path))
