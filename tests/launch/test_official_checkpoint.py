"""A checkpoint in official naming goes in by the command line, evaluates, and comes out bit for bit."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.categories import coco_categories
from dino_scale.checkpoint.transfer import match_classes
from dino_scale.checkpoint.weights import load_weights
from dino_scale.structures import Category
from launch.cli import main
from tests.support.official import checkpoint, filled, small_r50_shapes

MINI = Path(__file__).parents[1] / "data" / "coco_mini"
PERSON, UNUSED, TOOTHBRUSH = 1, 12, 90  # raw COCO ids; no class has id 12


def dino_scale(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line, run in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # of argparse
            code = int(stop.code or 0)
    return code, out.getvalue(), errors.getvalue()


def succeed(*arguments: str | Path) -> str:
    code, out, errors = dino_scale(*arguments)
    assert code == 0, f"exit code {code}\n{out}\n{errors}"
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Three class rows are certain, one of which stands for no class."""
    state = filled(small_r50_shapes())
    for name, value in state.items():
        if name.endswith(("class_embed.0.bias", "class_embed.1.bias")):
            value[:] = -9.0
            value[[PERSON, UNUSED, TOOTHBRUSH]] = 9.0
    return state


@pytest.fixture(scope="module")
def imported(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The weights file and what the import printed. The weights lie in the averaged part, as parallel training left."""
    folder = tmp_path_factory.mktemp("official")
    content = checkpoint({name: torch.zeros_like(value) for name, value in state.items()})
    content["ema_model"] = {f"module.{name}": value for name, value in state.items()}
    torch.save(content, folder / "x.pth")
    weights = folder / "new" / "weights.safetensors"
    sizes = ("--short-side", "96", "--max-size", "160")
    printed = succeed("import-official", folder / "x.pth", "--part", "ema_model", "--out", weights, *sizes)
    return weights, printed


def test_import_reports_every_entry(imported: tuple[Path, str], state: dict[str, Tensor]) -> None:
    weights, printed = imported
    found = re.search(r"(\d+) entries of part 'ema_model' mapped to (\d+) tensors, none left over", printed)
    assert found is not None, printed
    assert (int(found[1]), int(found[2])) == (len(state), len(load_weights(weights).state))
    rows = [re.findall(r"[\w.]+", line) for line in printed.splitlines() if re.search(r"\d+\W+\d+\W*$", line)]
    assert sum(int(row[1]) for row in rows) == len(state)
    assert sum(int(row[2]) for row in rows) == len(load_weights(weights).state)


def test_categories_are_raw_ids(imported: tuple[Path, str]) -> None:
    categories = load_weights(imported[0]).categories
    assert [category.id for category in categories] == list(range(91))
    assert sum(category.name != "" for category in categories) == 80
    assert (categories[PERSON], categories[UNUSED]) == (Category(1, "person"), Category(12, ""))


def evaluated(weights: Path, annotations: Path, folder: Path) -> tuple[list[dict], dict]:
    """Detections and numbers of the weights on the eight photographs, packed with these annotations."""
    succeed("pack", "--annotations", annotations, "--images", MINI / "images", "--out", folder / "shards")
    succeed("evaluate", "--weights", weights, "--data", folder / "shards", "--out", folder / "out")
    found = json.loads((folder / "out" / "detections.json").read_text())
    return found, json.loads((folder / "out" / "evaluation.json").read_text())


def annotated_as_found(found: list[dict], path: Path) -> Path:
    """COCO annotations in which every image shows exactly what was found with certainty, boxes cut to the image."""
    content = json.loads((MINI / "instances.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    content["annotations"] = []
    for entry in found:
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        inside = x >= 0 and y >= 0 and x + w <= width and y + h <= height and min(w, h) > 4
        if entry["score"] > 0.5 and inside:
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, **entry, "area": w * h, "iscrowd": 0})
    path.write_text(json.dumps(content))
    return path


def test_evaluates_on_packed_coco(imported: tuple[Path, str], tmp_path: Path) -> None:
    found, _ = evaluated(imported[0], MINI / "instances.json", tmp_path / "real")
    assert {entry["category_id"] for entry in found if entry["score"] > 0.5} == {PERSON, TOOTHBRUSH}
    classes = {category.id for category in load_weights(imported[0]).categories if category.name}
    assert {entry["category_id"] for entry in found} <= classes
    per_image = Counter(entry["image_id"] for entry in found)
    assert len(per_image) == 8
    assert max(per_image.values()) <= 300 - 30, "the row without a class is certain of all 30 queries"


def test_numbers_are_of_the_right_classes(imported: tuple[Path, str], tmp_path: Path) -> None:
    """What was found, given as the truth, is found: class rows and annotations mean the same by the same id."""
    found, _ = evaluated(imported[0], MINI / "instances.json", tmp_path / "real")
    truth = annotated_as_found(found, tmp_path / "truth.json")
    again, result = evaluated(imported[0], truth, tmp_path / "found")
    assert again == found
    assert {row["name"] for row in result["classes"] if row["boxes"]} == {"person", "toothbrush"}
    assert result["metrics"]["AR100"] > 0.99


def test_unknown_classes_are_refused(imported: tuple[Path, str], tmp_path: Path) -> None:
    content = (MINI / "instances.json").read_text().replace('"zebra"', '"okapi"')
    (tmp_path / "other.json").write_text(content)
    shards = tmp_path / "shards"
    succeed("pack", "--annotations", tmp_path / "other.json", "--images", MINI / "images", "--out", shards)
    code, _, errors = dino_scale("evaluate", "--weights", imported[0], "--data", shards)
    assert (code, "does not know ['okapi']" in errors) == (3, True), errors


def test_rows_are_carried_over_by_name(imported: tuple[Path, str]) -> None:
    """A stage with contiguous classes that starts from these weights takes the rows of its classes."""
    pairs = match_classes(load_weights(imported[0]).categories, coco_categories(), ())
    assert pairs == [(new, category.id) for new, category in enumerate(coco_categories())]


def test_predicts_named_classes_only(imported: tuple[Path, str], tmp_path: Path) -> None:
    picture = sorted((MINI / "images").iterdir())[0]
    succeed("predict", "--weights", imported[0], picture, "--out", tmp_path / "found", "--threshold", "0.5")
    content = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert {entry["category_id"] for entry in content["annotations"]} == {PERSON, TOOTHBRUSH}
    assert len(content["categories"]) == 80


def test_comes_out_bit_for_bit(imported: tuple[Path, str], state: dict[str, Tensor], tmp_path: Path) -> None:
    printed = succeed("export", "--weights", imported[0], "--format", "official", "--out", tmp_path / "y.pth")
    assert f"{len(state)} entries under official names" in printed
    content = torch.load(tmp_path / "y.pth", weights_only=True)
    assert content["args"]["num_classes"] == 91
    assert content["model"].keys() == state.keys()
    for name, value in state.items():
        assert content["model"][name].dtype == value.dtype
        assert content["model"][name].numpy().tobytes() == value.numpy().tobytes(), name
    succeed(
        "import-official", tmp_path / "y.pth", "--out", tmp_path / "again", "--short-side", "96", "--max-size", "160"
    )
    assert (tmp_path / "again").read_bytes() == imported[0].read_bytes()


def test_plain_copy(imported: tuple[Path, str], tmp_path: Path) -> None:
    succeed("export", "--weights", imported[0], "--format", "safetensors", "--out", tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == imported[0].read_bytes()


def test_mistakes_are_one_line(imported: tuple[Path, str], state: dict[str, Tensor], tmp_path: Path) -> None:
    weights = imported[0]
    torch.save(checkpoint({**state, "fc.weight": torch.ones(1)}), tmp_path / "x.pth")
    more = {name: value for name, value in state.items() if "class_embed" not in name}
    more |= {name: torch.zeros(21, *value.shape[1:]) for name, value in state.items() if "class_embed" in name}
    torch.save(checkpoint(more), tmp_path / "fine_tuned.pth")
    cases = {
        ("import-official", tmp_path / "x.pth", "--out", weights): (2, "which exists"),
        ("import-official", tmp_path / "x.pth", "--out", tmp_path / "w"): (3, "left over (fc.weight)"),
        ("import-official", tmp_path / "fine_tuned.pth", "--out", tmp_path / "w"): (3, "has 21 rows: expected 91"),
        ("import-official", tmp_path / "x.pth", "--out", tmp_path / "w", "--max-size", "9"): (2, "--max-size 9"),
        ("export", "--weights", weights, "--format", "official", "--out", weights): (2, "which exists"),
        ("export", "--weights", weights, "--format", "onnx", "--out", tmp_path / "w"): (2, "'official', 'safetensors'"),
    }
    for arguments, (code, words) in cases.items():
        got, _, errors = dino_scale(*arguments)
        assert (got, words in errors) == (code, True), errors
        assert "Traceback" not in errors
    assert not (tmp_path / "w").exists()
