"""From a raw download to a resumed training run, every step on the command line: photographs of COCO from a folder, and
the Objects365-like tree with every known defect from a store that fails now and then."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_pipeline.index import Index
from tests.support.object_store import serve
from tests.support.objects365_tree import EXPECTED, Tree

pytestmark = pytest.mark.slow

MINI = Path(__file__).parents[1] / "data" / "coco_mini"
CONFIGS = Path(__file__).parents[2] / "configs"
CHAIN = """
name: mini
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32, queries: 40}}
launch: {{engine: local, workers: 1, threads: 1}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{{data}, loader_workers: 1, pad_multiple: 32}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: 24}}
    checkpoint: {{every_steps: 2, keep_last: 2}}
    precision: fp32
    log_every_steps: 1
"""


@dataclass(frozen=True)
class Source:
    """arguments: that name a raw dataset. images: how many pack. repairs: what of report.json must be told."""

    arguments: tuple[str, ...]
    images: int
    repairs: dict[str, int]


def photographs(_: Path) -> Source:
    return Source(("--annotations", f"{MINI}/instances.json", "--images", f"{MINI}/images"), 8, {})


def defective_tree(folder: Path) -> Source:
    root = Tree(folder / "raw").root
    arguments = (
        "--format", "objects365", "--annotations", f"{root}/train/zhiyuan_objv2_train.json",
        "--images", f"{root}/train", "--images2", f"{root}/val",
        "--also", f"{root}/val/zhiyuan_objv2_val.json", "--also-after", "5",
    )  # fmt: skip
    return Source(arguments, 11, EXPECTED)


@contextmanager
def from_the_folder(shards: Path) -> Iterator[str]:
    yield f"train: {shards}, validation: {shards}, order: size_planned"


@contextmanager
def from_a_faulty_store(shards: Path) -> Iterator[str]:
    """Whole shards through a cache with a limit; every first request for a range goes wrong."""
    kinds = ("error", "short")
    with serve(shards, lambda name, earlier: "none" if earlier else kinds[len(name) % 2]) as store:
        yield (
            f"train: '{store.url}', cache: {shards.parent}/cache, cache_shards: true, cache_gigabytes: 0.001, "
            "order: windowed"
        )


def dino_scale(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("make", "through"), [(photographs, from_the_folder), (defective_tree, from_a_faulty_store)])
def test_pack_doctor_train_stop_resume(make, through, tmp_path: Path) -> None:
    """The run that is stopped and resumed ends with the weights of the undisturbed one."""
    source, shards = make(tmp_path), tmp_path / "shards"
    before = dino_scale("doctor", *source.arguments)
    assert f"pack would write {source.images} images" in before
    assert all(f"{kind}: {count}" in before for kind, count in source.repairs.items())
    dino_scale("pack", *source.arguments, "--out", shards, "--workers", "2")
    report = json.loads((shards / "report.json").read_text())["repairs"]
    assert {kind: repair["count"] for kind, repair in report.items()} == source.repairs
    assert "all as packed" in dino_scale("doctor", shards) and len(Index.open(shards)) == source.images
    with through(shards) as data:
        (tmp_path / "chain.yaml").write_text(CHAIN.format(configs=CONFIGS, data=data))
        one, two = tmp_path / "one", tmp_path / "two"
        dino_scale("train", tmp_path / "chain.yaml", "--run-dir", one)
        stop_after_three_steps(tmp_path / "chain.yaml", two)
        dino_scale("resume", two)
    first, second = (load_file(run / "only/weights.safetensors") for run in (one, two))
    assert all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)
    assert not list(tmp_path.glob("*/only/bad_samples.jsonl"))


def stop_after_three_steps(chain: Path, run: Path) -> None:
    command = [sys.executable, "-m", "launch", "train", str(chain), "--run-dir", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = run / "only/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 4, output
