"""The run folder: what is written is read back, what is torn or foreign is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dino_scale.config.decode import dump_chain
from dino_scale.config.dump import leaves
from dino_scale.config.schema import ChainConfig, LaunchConfig, ScheduleConfig, StageConfig, StartConfig
from dino_scale.errors import ConfigError, RunFolderError
from launch import run_folder
from launch.run_folder import RunFolder, StageState, require_new, write_text

STAGE = StageConfig(schedule=ScheduleConfig(steps=5))
CONFIG = ChainConfig(name="test", stages={"first": STAGE, "second": STAGE})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def finish(folder: RunFolder, name: str) -> None:
    (folder.path / name).mkdir(exist_ok=True)
    (folder.path / name / "weights.safetensors").write_bytes(b"x")
    folder.record(name, "done", 5, {"AP": 0.5}, 2.0)


def test_a_new_folder_is_read_back(folder: RunFolder) -> None:
    again = RunFolder.open(folder.path)
    assert again == folder
    assert again.stages == {"first": StageState(), "second": StageState()}
    assert again.next_stage() == "first"


def test_stages_run_in_order_and_finished_ones_never_again(folder: RunFolder) -> None:
    folder.record("first", "running", 0, {}, 0.0)
    assert RunFolder.open(folder.path).next_stage() == "first"
    folder.record("first", "interrupted", 3, {}, 1.5)
    finish(folder, "first")
    again = RunFolder.open(folder.path)
    assert again.stages["first"] == StageState("done", 5, {"AP": 0.5}, 3.5)  # seconds of both attempts
    assert again.next_stage() == "second"
    finish(again, "second")
    assert RunFolder.open(folder.path).next_stage() is None


def test_a_run_folder_is_not_used_twice(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="exists already: continue it with `dino-scale resume"):
        RunFolder.create(folder.path, CONFIG)


def test_what_may_lie_in_a_new_run_folder(tmp_path: Path) -> None:
    require_new(tmp_path / "absent")
    (tmp_path / "run").mkdir()
    require_new(tmp_path / "run")
    (tmp_path / "run" / "data").mkdir()
    require_new(tmp_path / "run", beside=("data",))
    for beside in ((), ("other",)):
        with pytest.raises(RunFolderError, match="exists already: choose another --run-dir"):
            require_new(tmp_path / "run", beside)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="exists already"):
        require_new(tmp_path / "file")


def test_a_changed_configuration_is_refused_with_the_difference(folder: RunFolder) -> None:
    write_text(folder.path / "config.yaml", dump_chain(replace(CONFIG, seed=7)))
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(folder.path)
    assert str(caught.value).splitlines()[1:] == ["  seed: was 0, is 7"]
    assert RunFolder.open(folder.path, ["seed=7"]).config.seed == 7


def test_a_change_named_by_set_is_accepted_and_kept(folder: RunFolder) -> None:
    overrides = ["launch.workers=4", "stages.first.augmentation.scales=[96]"]
    changed = RunFolder.open(folder.path, overrides)
    assert changed.config.launch.workers == 4
    assert RunFolder.open(folder.path).config == CONFIG  # not before it is accepted
    changed.accept_config()
    assert RunFolder.open(folder.path).config == changed.config
    with pytest.raises(ConfigError, match="did you mean first"):
        RunFolder.open(folder.path, ["stages.frist.zero_stage=2"])


def test_naming_a_key_does_not_excuse_its_neighbours(folder: RunFolder) -> None:
    write_text(folder.path / "config.yaml", dump_chain(replace(CONFIG, seed=7, name="other")))
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(folder.path, ["seed=7"])
    assert str(caught.value).splitlines()[1:] == ['  name: was "test", is "other"']


NEW = ("stages.first.augmentation.flip", "stages.second.schedule.decay", "launch.retries", "model.denoising.kind")


def forget(folder: RunFolder, keys: tuple[str, ...]) -> None:
    """As a program left the run folder that did not know `keys` yet."""
    edit(lambda content: [content["config"].pop(key) for key in keys])(folder.path)
    write_text(folder.path / "config.yaml", dump_chain(folder.config, without=keys))


def test_a_key_that_the_program_has_gained_takes_its_default(folder: RunFolder) -> None:
    forget(folder, NEW)
    assert "\n      decay:" not in (folder.path / "config.yaml").read_text().partition("second:")[2]
    again = RunFolder.open(folder.path)
    assert again.config == CONFIG
    write_text(folder.path / "config.yaml", dump_chain(CONFIG))  # a resume that ended between the two files
    assert RunFolder.open(folder.path).config == CONFIG
    again.accept_config()
    assert RunFolder.open(folder.path) == folder


def test_a_whole_section_that_the_program_has_gained_takes_its_default(folder: RunFolder) -> None:
    section = tuple(key for key in leaves(CONFIG) if key.startswith("stages.first.evaluation."))
    assert len(section) > 3
    forget(folder, section)
    assert RunFolder.open(folder.path).config == CONFIG


def test_a_gained_key_of_another_value_is_refused(folder: RunFolder) -> None:
    forget(folder, NEW)
    text = dump_chain(replace(CONFIG, launch=LaunchConfig(retries=9)))
    write_text(folder.path / "config.yaml", text)
    with pytest.raises(RunFolderError) as caught:
        RunFolder.open(folder.path)
    assert str(caught.value).splitlines()[1:] == ["  launch.retries: was 5, is 9"]
    assert RunFolder.open(folder.path, ["launch.retries=9"]).config.launch.retries == 9


def test_an_entry_of_a_table_has_no_default(folder: RunFolder) -> None:
    """Its absence says something, unlike that of a key."""
    first = replace(STAGE, start=StartConfig(class_choices={"tv. new": "Monitor/TV"}))
    write_text(folder.path / "config.yaml", dump_chain(replace(CONFIG, stages=CONFIG.stages | {"first": first})))
    with pytest.raises(RunFolderError, match=r'class_choices.tv. new: was absent, is "Monitor/TV"'):
        RunFolder.open(folder.path)


def edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        content = json.loads((path / "chain.json").read_text())
        change(content)
        (path / "chain.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "chain.json").unlink(), "has no chain.json"),
        (lambda path: (path / "config.yaml").unlink(), "has no config.yaml"),
        (lambda path: (path / "chain.json").write_text('{"format": 1, "st'), "chain.json cannot be read"),
        (lambda path: (path / "chain.json").write_bytes(b"\xff"), "chain.json cannot be read"),
        (lambda path: (path / "chain.json").write_text("[]"), "does not have format 1"),
        (edit(lambda content: content.update(format=2)), "does not have format 1"),
        (edit(lambda content: content.pop("config")), "has no config or no stages"),
        (edit(lambda content: content["stages"].pop("first")), "lists the stages second, config.yaml first, second"),
        (edit(lambda content: content["stages"]["first"].pop("step")), "has a stage first of the wrong form"),
        (edit(lambda content: content["stages"]["first"].update(state="gone")), "in the unknown state 'gone'"),
        (edit(lambda content: content["stages"]["first"].update(state="done")), "weights.safetensors is missing"),
    ],
)
def test_a_torn_folder_is_refused(damage: Callable[[Path], object], expected: str, folder: RunFolder) -> None:
    damage(folder.path)
    with pytest.raises(RunFolderError, match=expected):
        RunFolder.open(folder.path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(RunFolderError, match=r"has no chain\.json: it is not a run folder, or it is torn"):
        RunFolder.open(tmp_path)


def test_state_is_readable_whenever_the_writer_is_killed(folder: RunFolder) -> None:
    """A process that does nothing but write states is killed at random moments; the file is always whole."""
    code = (
        "import sys, pathlib; from launch.run_folder import RunFolder\n"
        "folder = RunFolder.open(pathlib.Path(sys.argv[1])); step = 0\n"
        "print('ready', flush=True)\n"
        "while True:\n    step += 1; folder.record('first', 'running', step, {}, 0.0)\n"
    )
    for pause in (0.0, 0.013, 0.031, 0.057):
        writer = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(pause)
        writer.kill()
        writer.wait()
        assert RunFolder.open(folder.path).next_stage() == "first"


def test_one_driver_at_a_time(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_LOCK_SECONDS", 0.0)
    code = (
        "import sys, pathlib; from launch.run_folder import RunFolder\n"
        "with RunFolder.open(pathlib.Path(sys.argv[1])).locked():\n    print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"), folder.locked():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder.locked():  # a killed process holds nothing
        pass
