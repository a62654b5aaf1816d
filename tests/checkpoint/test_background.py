"""Writing in the background: commit when all ranks are done, retention, a full disk at any moment, two writers."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino_scale.checkpoint import background, layout, store
from dino_scale.checkpoint.background import BackgroundWrite
from tests.support import handmade

PAGE = 4096


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_nothing_is_committed_before_the_last_rank_is_done(tmp_path: Path) -> None:
    last, *others = reversed(handmade.shipments(tmp_path, 3, world=3))
    writes = [BackgroundWrite(shipment) for shipment in others]
    for write in writes:
        write.wait_for_own_files()
    writes[-1].join(0.3)  # rank 0: it waits for the last rank
    assert layout.list_checkpoints(tmp_path) == []
    writes.append(BackgroundWrite(last))
    for write in writes:
        write.join()
        assert write.error is None
    assert names(tmp_path) == ["step_00000003"]
    assert handmade.values(tmp_path / "step_00000003") == {3.0}
    assert names(tmp_path / "step_00000003")[-3:] == [f"shard-{rank:05d}.safetensors" for rank in range(3)]


def test_a_cancelled_write_is_not_committed(tmp_path: Path) -> None:
    first, _ = handmade.shipments(tmp_path, 3, world=2)
    write = BackgroundWrite(first)
    write.cancel()
    write.join()
    assert layout.list_checkpoints(tmp_path) == [] and write.error is None


def test_folders_that_the_machines_do_not_share_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "VISIBLE_SECONDS", 0.1)
    here, _ = handmade.shipments(tmp_path / "here", 3, world=2)
    _, there = handmade.shipments(tmp_path / "there", 3, world=2)
    writes = [BackgroundWrite(here), BackgroundWrite(there)]
    for write in writes:
        write.wait_for_own_files()
        assert write.error is None
        write.expect_marks()
        write.join()
    assert writes[0].error is not None and "the files that rank 1 wrote" in writes[0].error
    assert "all machines share" in writes[0].error
    assert layout.list_checkpoints(tmp_path / "here") == []


def test_only_the_newest_are_kept_and_the_best_apart(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        handmade.write(tmp_path, step, keep_last=2)
    handmade.write(tmp_path, 3, keep_last=None)
    for step in (4, 5):
        handmade.write(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["best_00000003", "step_00000004", "step_00000005"]
    assert handmade.values(tmp_path / "best_00000003") == {3.0}
    handmade.write(tmp_path, 5, keep_last=None)
    assert names(tmp_path) == ["best_00000005", "step_00000004", "step_00000005"]


def test_a_best_checkpoint_can_be_continued_from(tmp_path: Path) -> None:
    handmade.write(tmp_path, 2)
    handmade.write(tmp_path, 2, keep_last=None)
    found = store.find_newest(tmp_path, print)
    assert found is not None and found[0].name == "best_00000002"  # it knows of its own evaluation
    handmade.write(tmp_path, 4)
    found = store.find_newest(tmp_path, print)
    assert found is not None and found[0].name == "step_00000004"
    (found[0] / "manifest.json").unlink()
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    found = store.find_newest(tmp_path, print)
    assert found is not None and found[0].name == "best_00000002"


def test_damaged_later_ones_do_not_push_out_whole_earlier_ones(tmp_path: Path) -> None:
    for step in (2, 6, 8):
        handmade.write(tmp_path, step)
    for step in (6, 8):
        (tmp_path / f"step_{step:08d}" / "manifest.json").unlink()
    handmade.write(tmp_path, 4, keep_last=2)
    assert names(tmp_path)[:2] == ["step_00000002", "step_00000004"]
    handmade.write(tmp_path, 6, keep_last=2)  # the damaged one is replaced when the run comes to its step
    found = store.find_newest(tmp_path, lambda text: None)
    assert found is not None and found[0].name == "step_00000006"


def test_a_deletion_that_fails_is_told_and_no_failure(tmp_path: Path) -> None:
    handmade.write(tmp_path, 1)
    (tmp_path / f".step_00000001.{os.getpid()}.retired").write_text("in the way of the rename")
    write = BackgroundWrite(handmade.shipments(tmp_path, 2, keep_last=1)[0])
    write.join()
    assert write.error is None and "an old checkpoint stays" in write.notes[0]
    assert handmade.values(tmp_path / "step_00000002") == {2.0}


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    handmade.write(tmp_path, 1)
    for name in (".step_00000002.abc-1.partial", ".step_00000000.77.retired", ".mine", "notes.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    layout.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "notes.partial", "step_00000001"]
    layout.remove_leftovers(tmp_path / "absent")


def test_two_writers_at_once_never_mix(tmp_path: Path) -> None:
    """Two runs that think the folder is theirs save the same steps: each checkpoint is whole and of one of them."""

    def save_all(offset: float) -> None:
        for step in range(1, 9):
            shipment = handmade.shipments(tmp_path, step, keep_last=8)[0]
            for tensors in shipment.contents.values():
                for tensor in tensors.values():
                    tensor += offset
            BackgroundWrite(shipment).join()

    writers = [threading.Thread(target=save_all, args=(offset,)) for offset in (0.0, 0.5)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    folders = layout.list_checkpoints(tmp_path)
    assert [layout.step_of(folder) for folder in folders] == list(range(1, 9))
    for folder in folders:
        assert handmade.values(folder) in ({float(layout.step_of(folder))}, {layout.step_of(folder) + 0.5})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={100 * PAGE}", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_full_at_any_page_leaves_the_checkpoint_before(small_disk: Path) -> None:
    """The room left for a save grows page by page: it fails in a shard, in a mark, in the manifest, then succeeds."""
    handmade.write(small_disk, 1)
    filler = small_disk / "filler"
    failed_in = set()
    shapes = {f"layer.{index}.weight": (3,) for index in range(40)}  # the manifest is larger than the marks it replaces
    for pages in range(40):
        free = os.statvfs(small_disk).f_bavail
        filler.write_bytes(bytes(PAGE * (free - pages)))
        write = BackgroundWrite(handmade.shipments(small_disk, 2, shapes=shapes)[0])
        write.join()
        filler.unlink()
        found = store.find_newest(small_disk, pytest.fail)
        assert found is not None
        if write.error is None:
            break
        assert "no space left on device" in write.error
        assert found[1].step == 1
        failed_in |= {path.name for path in write.shipment.partial.iterdir()}
        layout.remove_leftovers(small_disk)
    assert write.error is None and found[1].step == 2
    assert {"shard-00000.safetensors", "common.safetensors", "done-00000.partial", "manifest.json"} <= failed_in


def test_a_file_that_may_not_grow_fails_the_save(tmp_path: Path) -> None:
    """The limit on a file's size works for everybody, where a small disk takes an administrator."""
    handmade.write(tmp_path, 1)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (300, {resource.RLIM_INFINITY}))\n"
        "from dino_scale.checkpoint.background import BackgroundWrite; from tests.support import handmade\n"
        "write = BackgroundWrite(handmade.shipments(Path(sys.argv[1]), 2)[0]); write.join(); print(write.error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "file too large" in done.stdout
    found = store.find_newest(tmp_path, pytest.fail)
    assert found is not None and found[1].step == 1
