"""The options of `dino-scale plan`; nothing heavy is imported here."""

from __future__ import annotations

import argparse


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """What the plan cannot know from the configuration."""
    add = parser.add_argument
    add("--gpu-memory", type=_positive, metavar="GB", help="recommend ZeRO stage and microbatch for a GPU of this size")
    add("--images-per-second", metavar="N|FILE", help="of all workers; or a run's metrics.jsonl, scaled by workers")
    add("--price-per-hour", type=_positive, metavar="PRICE", help="of one worker, in any currency")
    add("--workers-per-node", type=_count, default=8, metavar="N", help="default 8")
    add(
        "--images", type=_images, action="append", default=[], metavar="STAGE=N",
        help="training images of a stage whose data is not there yet; may be repeated",
    )  # fmt: skip
    add("--image-size", type=_size, metavar="HxW", help="padded pixels; default: the largest the augmentation can make")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="whose memory is planned; default: cuda")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is '{text}': expected a number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is '{text}': expected a whole number above 0")
    return int(text)


def _images(text: str) -> tuple[str, int]:
    stage, _, number = text.rpartition("=")
    return stage, _count(number)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _count(height), _count(width)
