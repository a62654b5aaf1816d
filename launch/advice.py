"""What to change when a worker has run out of memory."""

from __future__ import annotations

from launch.worker import StageJob


def against_memory(job: StageJob) -> str:
    """The settings that lower a worker's memory, with their present values, and how to continue with them."""
    stage, key = job.config.stages[job.stage], f"stages.{job.stage}"
    choices = []
    if stage.batch.microbatch > 1:
        choices.append(f"lower {key}.batch.microbatch (now {stage.batch.microbatch})")
    if stage.zero_stage < 3:
        choices.append(f"raise {key}.zero_stage (now {stage.zero_stage})")
    if not job.config.model.backbone.checkpoint_activations:
        choices.append("set model.backbone.checkpoint_activations=true")
    choices.append(f"lower {key}.augmentation.scales and max_size (now {stage.augmentation.max_size})")
    return f"{', or '.join(choices)}; then: dino-scale resume {job.run_dir} --set KEY=VALUE"
