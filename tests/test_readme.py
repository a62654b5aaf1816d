"""What README tells a newcomer to type must be accepted."""

from __future__ import annotations

import re
from pathlib import Path

from dino_scale.config.decode import load_chain

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_chain_is_valid(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(example.replace("configs/", f"{ROOT}/configs/"), encoding="utf-8")
    chain = load_chain(path, ["stages.train.optimizer.learning_rate=2e-4"])
    assert chain.name == "mine"
    assert chain.stages["train"].optimizer.learning_rate == 2e-4
    assert chain.model.hidden < 256  # the small model was read


def test_make_targets_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([\w-]+)", readme, re.MULTILINE))
    assert targets >= {"demo", "test", "env"}
    assert targets <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
