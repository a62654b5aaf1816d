"""Training through a damaged shard, on the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from data_pipeline.index import Index
from data_pipeline.pack import pack
from data_pipeline.synthetic import write_synthetic

CHAIN = """
name: mini
model: {{extends: {configs}/model/small.yaml, hidden: 32, heads: 2, feedforward: 32, queries: 40}}
launch: {{engine: local, workers: 1, threads: 1}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}, validation: "", loader_workers: 0, order: size_planned, pad_multiple: 32}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: 6}}
    checkpoint: {{every_steps: 2, keep_last: 2}}
    precision: fp32
    log_every_steps: 1
"""


def dino_scale(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_damage_stops_a_run_in_one_line_and_a_larger_share_lets_it_go_on(tmp_path: Path) -> None:
    split = write_synthetic(tmp_path / "raw", "scenes", seed=3, train=12, validation=1)["train"]
    shards = tmp_path / "shards"
    pack(split.annotations, [split.images], shards)
    configs = Path(__file__).parents[2] / "configs"
    (tmp_path / "chain.yaml").write_text(CHAIN.format(configs=configs, shards=shards))
    index = Index.open(shards)
    data = bytearray((shards / "shard-00000.tar").read_bytes())
    for sample in (3, 7):
        data[int(index.columns["image_offsets"][sample]) + 400] ^= 0xFF
    (shards / "shard-00000.tar").write_bytes(data)

    run = tmp_path / "run"
    stopped = dino_scale("train", tmp_path / "chain.yaml", "--run-dir", run)
    assert stopped.returncode == 3, stopped.stdout + stopped.stderr
    assert "could not be read and were replaced, more than data.bad_share (0.001)" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    shutil.rmtree(run)

    done = dino_scale(
        "train", tmp_path / "chain.yaml", "--run-dir", run, "--set", "stages.only.data.bad_share=0.5"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "only/bad_samples.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} <= {3, 7} and len(lines) == 4, "two epochs of twelve images"
    assert all(line["rank"] == 0 and "checksum" in line["reason"] and line["file_name"] for line in lines)
    logged = [json.loads(line) for line in (run / "only/metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["replaced_samples"] == 4
