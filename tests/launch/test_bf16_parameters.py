"""A stage trained with bf16 parameters and continued in fp32 under another ZeRO stage, as a user does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

CHAIN = """
name: halves
model:
  extends: {configs}/model/small.yaml
  hidden: 32
  heads: 2
  feedforward: 32
  queries: 40
launch: {{engine: local, threads: 1}}
stages:
  only:
    extends: {configs}/stage/small_images.yaml
    data: {{train: {shards}/train, validation: {shards}/validation, loader_workers: 0}}
    batch: {{global_size: 4, microbatch: 2}}
    schedule: {{steps: 6}}
    checkpoint: {{every_steps: 2, keep_last: 9}}
    precision: bf16_parameters
    ema_decay: 0.9
    log_every_steps: 1
"""


def dino_scale(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_a_run_in_bf16_parameters_is_continued_in_fp32(tiny_data: Path, tmp_path: Path) -> None:
    configs = Path(__file__).parents[2] / "configs"
    chain, run = tmp_path / "chain.yaml", tmp_path / "run"
    chain.write_text(CHAIN.format(configs=configs, shards=tiny_data / "objects"))
    dino_scale("train", chain, "--run-dir", run)
    weights = load_file(run / "only" / "weights.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in weights.values())
    checkpoints = run / "only" / "checkpoints"
    assert "bf16 parameters beside fp32 masters" in dino_scale("inspect", checkpoints / "step_00000004", "--verify")

    # As if it had been killed after step 4; then another precision and stage take over.
    for path in (checkpoints / "step_00000006", run / "only" / "evaluation"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    (run / "only" / "weights.safetensors").unlink()
    state = json.loads((run / "chain.json").read_text())
    state["stages"]["only"] |= {"state": "running", "step": 4}
    (run / "chain.json").write_text(json.dumps(state))
    said = dino_scale("resume", run, "--set", "stages.only.precision=fp32", "--set", "stages.only.zero_stage=3")
    assert "continues from step_00000004" in said
    assert "fp32 parameters" in dino_scale("inspect", checkpoints / "step_00000006")
    lines = [json.loads(line) for line in (run / "only" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
