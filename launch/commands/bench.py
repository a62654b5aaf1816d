"""`dino-scale bench loader`: what the data path costs on this machine, as ratios."""

from __future__ import annotations

import argparse

from rich.console import Console

from data_pipeline.bench import LoaderCosts, measure_loader
from launch.run_folder import write_text


def run(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    costs = measure_loader(arguments.shards, arguments.images, lambda text: console.print(f"{text} ..."))
    for line in lines(costs):
        console.print(line)
    if arguments.out is not None:
        write_text(arguments.out, costs.to_json())


def lines(costs: LoaderCosts) -> list[str]:
    found = [
        f"reading, per sample: {costs.unchecked_microseconds:.0f} us, {costs.raw_microseconds:.0f} us with checksum; "
        f"plain webdataset {costs.webdataset_microseconds:.0f} us: "
        f"{costs.unchecked_ratio:.1f} times cheaper, {costs.raw_ratio:.1f} with checksum",
        f"decoding, augmenting, padding, per image: {costs.fast_milliseconds:.1f} ms, the official chain "
        f"{costs.official_milliseconds:.1f} ms: {costs.fast_ratio:.1f} times cheaper",
    ]
    for order, by_size in costs.padding.items():
        parts = ", ".join(f"{share:.1%} at microbatch {size}" for size, share in by_size.items())
        found.append(f"padding, order {order}: {parts}")
    found.append(
        f"index of {costs.large_samples} samples: {costs.start_seconds:.2f} s to start, "
        f"{costs.worker_megabytes:.0f} MB of its own per process"
    )
    return found
