import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode import decode
from data_pipeline.order import Draws
from data_pipeline.transforms import (
    Crop,
    Plan,
    Resize,
    apply_to_boxes,
    apply_to_image,
    resize_for_evaluation,
    resized,
    sample_plan,
)
from dino_scale.config.decode import load_chain
from dino_scale.config.schema import AugmentationConfig

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "augment.json").read_text())
BOXES = np.array([[10, 20, 110, 70], [600, 400, 640, 480], [320, 240, 520, 440]], dtype=np.float64)  # of the recording
LABELS = np.array([3, 18, 90])
OFFICIAL = AugmentationConfig()


class OfficialDraws:
    """Draws in the way of the official code: Python's generator for all but the place of a crop, which is torch's."""

    def __init__(self, seed: int) -> None:
        self.python = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def uniform(self) -> float:
        return self.python.random()

    def integer(self, low: int, high: int) -> int:
        return self.python.randint(low, high)

    def choice(self, values: Sequence[int]) -> int:
        return self.python.choice(values)

    def offset(self, most: int) -> int:
        return int(torch.randint(0, most + 1, (1,), generator=self.torch))


def recorded_image() -> np.ndarray:
    return (np.random.RandomState(5).random_sample((480, 640, 3)) * 255).astype(np.uint8)


def normalised_mean(pixels: torch.Tensor) -> float:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return float(((pixels.permute(1, 2, 0) / 255 - mean) / std).mean())


def relative(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    centred = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    return centred / [width, height, width, height]


@pytest.mark.parametrize("case", GOLDEN["sizes"], ids=lambda case: f"{case['wh']}-{case['size']}-{case['max']}")
def test_resize_arithmetic_is_the_official_one(case: dict[str, Any]) -> None:
    width, height = case["wh"]
    size = resized(width, height, case["size"], case["max"])
    assert [size.height, size.width] == case["target_size_hw"] and [size.width, size.height] == case["out_wh"]
    plan = Plan(False, (size,), (size.height, size.width))
    boxes, keep = apply_to_boxes(np.array([[10.0, 20.0, 110.0, 90.0]]), width, height, plan)
    np.testing.assert_allclose(boxes[0], case["box"], rtol=1e-6)
    assert keep.all()


@pytest.mark.parametrize("run", GOLDEN["pipeline"], ids=lambda run: f"seed{run['seed']}")
def test_training_pipeline_is_the_official_one(run: dict[str, Any]) -> None:
    plan = sample_plan(640, 480, OFFICIAL, OfficialDraws(run["seed"]))
    assert list(plan.size) == run["size"]
    boxes, keep = apply_to_boxes(BOXES, 640, 480, plan)
    assert LABELS[keep].tolist() == run["labels"]
    np.testing.assert_allclose(relative(boxes[keep], *plan.size), run["boxes"], rtol=0, atol=2e-7)
    pixels = apply_to_image(recorded_image(), plan)
    assert list(pixels.shape) == run["chw"] and pixels.dtype == torch.uint8
    assert normalised_mean(pixels) == pytest.approx(run["mean"], abs=1e-3)


@pytest.mark.parametrize("run", GOLDEN["pipeline"], ids=lambda run: f"seed{run['seed']}")
def test_the_reference_executor_is_the_official_pipeline(run: dict[str, Any]) -> None:
    """Its mean is the recorded one to rounding; the fast executor stays within 2/255 of it, pixel by pixel."""
    plan = sample_plan(640, 480, OFFICIAL, OfficialDraws(run["seed"]))
    reference = apply_to_image(recorded_image(), plan, "reference")
    assert list(reference.shape) == run["chw"] and reference.dtype == torch.uint8
    assert normalised_mean(reference) == pytest.approx(run["mean"], abs=1e-5)
    difference = (apply_to_image(recorded_image(), plan).int() - reference.int()).abs()
    assert int(difference.max()) <= 2 and float((difference > 0).float().mean()) < 0.02


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "data/coco_mini/images").glob("*.jpg")), ids=lambda path: path.stem
)
def test_both_executors_agree_on_photographs(path: Path) -> None:
    image = decode(path.read_bytes())
    with Image.open(path) as picture:
        assert np.array_equal(image, np.asarray(picture.convert("RGB"))), "the decoders agree bit for bit"
    for number in range(3):
        plan = sample_plan(image.shape[1], image.shape[0], OFFICIAL, Draws(0, 0, number))
        fast, reference = (apply_to_image(image, plan, executor) for executor in ("fast", "reference"))
        assert int((fast.int() - reference.int()).abs().max()) <= 2


def test_the_recorded_runs_cover_both_branches() -> None:
    plans = [sample_plan(640, 480, OFFICIAL, OfficialDraws(run["seed"])) for run in GOLDEN["pipeline"]]
    assert {len(plan.steps) for plan in plans} == {1, 3} and {plan.flip for plan in plans} == {True, False}


def test_validation_transform_is_the_official_one() -> None:
    golden = GOLDEN["val"]
    pixels = resize_for_evaluation(recorded_image(), 800, 1333)
    assert list(pixels.shape) == golden["chw"]
    assert normalised_mean(pixels) == pytest.approx(golden["mean"], abs=1e-3)
    np.testing.assert_allclose(relative(BOXES, 480, 640), golden["boxes"], atol=2e-7)


@pytest.mark.parametrize(("width", "height", "short"), [(64, 48, 31), (64, 48, 100), (37, 91, 60), (128, 72, 72)])
def test_pixels_are_within_two_of_pillow(width: int, height: int, short: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = resized(width, height, short, None)
    expected = np.asarray(Image.fromarray(image).resize((size.width, size.height), Image.Resampling.BILINEAR))
    found = resize_for_evaluation(image, short, 10_000).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 2


sizes = st.integers(1, 200)
configs = st.builds(
    lambda scales, longest, crop, low, span, before: AugmentationConfig(
        scales=tuple(scales), max_size=longest, crop=crop, crop_resize=tuple(before), crop_min=low, crop_max=low + span
    ),
    st.lists(st.integers(16, 120), min_size=1, max_size=3),
    st.integers(120, 300),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 150),
    st.integers(0, 60),
    st.lists(st.integers(16, 150), min_size=1, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(width=sizes, height=sizes, config=configs, number=st.integers(0, 10**6))
def test_every_plan_fits_every_image(width: int, height: int, config: AugmentationConfig, number: int) -> None:
    """Also images smaller than the crop: the size promised is the size made, crops stay inside, boxes too."""
    plan = sample_plan(width, height, config, Draws(0, 0, number))
    inside = (height, width)
    for step in plan.steps:
        if isinstance(step, Crop):
            assert 0 <= step.top <= inside[0] - step.height and 0 <= step.left <= inside[1] - step.width
            assert config.crop_min <= step.width <= config.crop_max or step.width == inside[1]
            assert config.crop_min <= step.height <= config.crop_max or step.height == inside[0]
        before, inside = inside, (step.height, step.width)
    assert inside == plan.size and min(inside) >= 1
    rounding = max(before) / min(before) / 2  # the official arithmetic rounds the short side, then stretches
    assert max(inside) <= config.max_size + rounding
    image = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert tuple(apply_to_image(image, plan).shape) == (3, *plan.size)
    boxes, keep = apply_to_boxes(np.array([[0.0, 0.0, width, height]]), width, height, plan)
    assert keep.all()
    np.testing.assert_allclose(boxes, [[0, 0, plan.size[1], plan.size[0]]], rtol=1e-9)


def test_boxes_follow_the_pixels() -> None:
    """A bright rectangle stays where its box says, through flip, crop and both resizes."""
    image = np.zeros((90, 120, 3), dtype=np.uint8)
    image[30:60, 50:90] = 255
    config = AugmentationConfig(scales=(100, 140), max_size=300, crop_resize=(80, 120), crop_min=60, crop_max=90)
    checked = 0
    for number in range(60):
        plan = sample_plan(120, 90, config, Draws(3, 0, number))
        boxes, keep = apply_to_boxes(np.array([[50.0, 30.0, 90.0, 60.0]]), 120, 90, plan)
        bright = apply_to_image(image, plan)[0].numpy() > 127
        assert bright.any() == keep[0] or not keep[0] or min(boxes[0, 2:] - boxes[0, :2]) < 2
        if not bright.any():
            continue
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(boxes[0], found, atol=1.01)
        checked += 1
    assert checked > 40


def test_a_box_outside_the_crop_is_dropped() -> None:
    plan = Plan(False, (Crop(0, 0, 10, 10), Resize(20, 20)), (20, 20))
    boxes, keep = apply_to_boxes(np.array([[10.0, 0, 15, 5], [9, 0, 15, 5], [2, 2, 4, 4]]), 30, 30, plan)
    assert keep.tolist() == [False, True, True]
    assert boxes[keep].tolist() == [[18, 0, 20, 10], [4, 4, 8, 8]]


@pytest.fixture(scope="module")
def scaled_up() -> AugmentationConfig:
    """Of the stage that fine-tunes the large detector on COCO, as its chain is decoded."""
    chain = load_chain(Path(__file__).parents[2] / "configs/chain/objects365_coco_swin_l.yaml", [])
    stage = chain.stages["coco"]
    assert (stage.evaluation.short_side, stage.evaluation.max_size) == (int(1.5 * 800), int(1.5 * 1333))
    return stage.augmentation


def test_the_scaled_up_stage_has_the_official_lists_times_one_and_a_half(scaled_up: AugmentationConfig) -> None:
    """As the official `data_aug_scale_overlap` makes them: int(1.5 * x) of every number."""
    scales, crop_resize = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800), (400, 500, 600)
    official = AugmentationConfig(
        scales=tuple(int(1.5 * scale) for scale in scales),
        max_size=int(1.5 * 1333),
        crop_resize=tuple(int(1.5 * size) for size in crop_resize),
        crop_min=int(1.5 * 384),
        crop_max=int(1.5 * 600),
    )
    assert scaled_up == official
    assert (OFFICIAL.scales, OFFICIAL.crop_resize) == (scales, crop_resize)


@settings(max_examples=300, deadline=None)
@given(width=st.integers(50, 3000), height=st.integers(50, 3000), sample=st.integers(0, 2**40))
def test_planned_sizes_of_the_scaled_up_stage_stay_within(
    scaled_up: AugmentationConfig, width: int, height: int, sample: int
) -> None:
    config = scaled_up
    plan = sample_plan(width, height, config, Draws(1, 0, sample))
    last = plan.steps[-2] if len(plan.steps) > 1 else Resize(height, width)
    ratio = max(last.height, last.width) / min(last.height, last.width)
    assert min(plan.size) <= config.scales[-1]
    assert max(plan.size) <= config.max_size + ratio / 2, "the official arithmetic rounds the short side"
    if len(plan.steps) > 1:
        first, crop = plan.steps[:2]
        assert min(first.height, first.width) in config.crop_resize
        assert crop.height <= config.crop_max and crop.width <= config.crop_max
