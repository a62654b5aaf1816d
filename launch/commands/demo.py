"""`dino-scale demo`: the whole way from pictures to a fine-tuned detector, on this machine, with data it draws."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.pack import pack
from data_pipeline.synthetic import DOMAINS, Domain, remove_leftovers, write_synthetic, written_splits
from dino_scale.config.decode import load_chain
from dino_scale.config.schema import ChainConfig
from dino_scale.errors import Interrupted, UserError
from launch.commands.train import start
from launch.progress import Progress
from launch.run_folder import require_new

CHAIN = Path(__file__).parents[2] / "configs" / "chain" / "demo.yaml"


@dataclass(frozen=True)
class Sizes:
    """Images drawn for a domain."""

    train: int
    validation: int


SIZES: dict[Domain, Sizes] = {"objects": Sizes(2400, 200), "scenes": Sizes(200, 300)}


def demo(run_dir: Path | None) -> None:
    if not CHAIN.is_file():
        raise UserError(f"{CHAIN} is missing: the demo runs from a checkout of the repository")
    path = Path(os.path.abspath(run_dir or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"))
    require_new(path, beside=("data",))  # the drawing of an earlier call may be there, or a part of it
    shards = path / "data" / "shards"
    config = with_data_in(load_chain(CHAIN), shards)
    try:
        with Progress() as progress:
            for text in make_data(path / "data", SIZES, config.seed):
                progress.message(text)
    except KeyboardInterrupt:
        raise Interrupted(
            f"the demo was stopped while it drew its data; continue with: dino-scale demo --run-dir {path}"
        ) from None
    start(config, path, beside=("data",))


def with_data_in(config: ChainConfig, folder: Path) -> ChainConfig:
    """The chain with its data folders, which the file gives as DOMAIN/SPLIT, taken from `folder`."""
    stages = {}
    for name, stage in config.stages.items():
        data = replace(stage.data, train=str(folder / stage.data.train), validation=str(folder / stage.data.validation))
        stages[name] = replace(stage, data=data)
    return replace(config, stages=stages)


def make_data(folder: Path, sizes: dict[Domain, Sizes], seed: int) -> Iterator[str]:
    """Draws folder/raw/DOMAIN and packs folder/shards/DOMAIN/SPLIT; yields a line about each step.

    What an earlier call has finished there stays; a call that was killed at any moment can be made again.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    remove_leftovers(raw)
    for domain in DOMAINS:
        size = sizes[domain]
        if (raw / domain).exists():
            splits = written_splits(raw / domain)
            yield f"pictures of the domain {domain} are there"
        else:
            yield f"drawing {size.train} + {size.validation} pictures of the domain {domain}"
            splits = write_synthetic(raw / domain, domain, seed, size.train, size.validation)
        for name, split in splits.items():
            out = folder / "shards" / domain / name
            if out.exists():
                yield f"packed images are in {out}"
                continue
            report = pack(split.annotations, [split.images], out, "coco")
            yield f"packed {report.samples} images with {report.boxes} boxes into {out}"
