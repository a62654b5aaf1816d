"""The arguments of `dino-scale bench WHAT`; nothing heavy is imported before a measurement runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

AddCommand = Callable[..., argparse.ArgumentParser]  # (subparsers, name, text, example, run)


def add_benchmarks(parser: argparse.ArgumentParser, add: AddCommand) -> None:
    """Put one subcommand per measurement below `parser`; `add` makes one, as for the commands above it."""
    what = parser.add_subparsers(title="what is measured", metavar="WHAT", required=True)
    _kernels(what, add)
    _step(what, add)
    _loader(what, add)
    _ladder(what, add)
    _startup(what, add)
    _checkpoint(what, add)


def _kernels(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_kernels import run

        run(options)

    text = "deformable attention and matching beside the usual ways to compute them"
    parser = add(what, "kernels", text, "dino-scale bench kernels --device cpu --out kernels.csv", run)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="the least of N times counts; default 5")
    parser.add_argument("--only", default="", metavar="TEXT", help="comparisons whose name contains this; default: all")
    compiled = "no times: registers and spills of the kernels for GPUs that need not be here"
    parser.add_argument("--compiled", action="store_true", help=compiled)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="new file")


def _step(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_step import run

        run(options)

    text = "operators of a training step of DINO R50 4-scale, with the usual ones and with ours"
    parser = add(what, "step", text, "dino-scale bench step --device cpu --out step.csv", run)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--size", type=int, default=320, metavar="PIXELS", help="side of the images; default 320")
    parser.add_argument("--images", type=int, default=2, metavar="N", help="microbatch; default 2")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="the least of N times counts; default 3")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="new file")


def _loader(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_loader import run

        run(options)

    text = "reading, decoding and padding against the usual way, as ratios"
    parser = add(what, "loader", text, "dino-scale bench loader shards/train", run)
    parser.add_argument("shards", type=Path, metavar="SHARDS", help="folder made by pack")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="images to decode; default 200")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures here")


def _ladder(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_ladder import run

        run(options)

    text = "DINO and the detectors it descends from, trained alike on synthetic pictures"
    parser = add(what, "ladder", text, "dino-scale bench ladder --steps 800 --images 1600 --out ladder.csv", run)
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="optimizer steps; default 800")
    parser.add_argument("--images", type=int, default=1600, metavar="N", help="training pictures; default 1600")
    parser.add_argument("--validation", type=int, default=200, metavar="N", help="validation pictures; default 200")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="default: 0")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="1 (default): this process; more: Ray")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="new file; default R/ladder.csv")
    parser.add_argument("--run-dir", type=Path, metavar="R", help="new folder; default runs/ladder-DATE-TIME")


def _checkpoint(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_checkpoint import run

        run(options)

    text = "how long a save stops training, beside torch.save; saving and loading beside the bare disk"
    parser = add(what, "checkpoint", text, "dino-scale bench checkpoint --out checkpoint.csv", run)
    sizes = ("r50", "swin_l", "small")
    parser.add_argument("--models", nargs="+", choices=sizes, default=["r50", "swin_l"], help="default: r50 swin_l")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="the least of N times counts; default 3")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="new file; its disk is measured")


def _startup(what: Any, add: AddCommand) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.bench_startup import run

        run(options)

    text = "from the command to the first step, and where the time goes"
    parser = add(what, "startup", text, "dino-scale bench startup --repeat 3 --out startup.csv", run)
    parser.add_argument(
        "--engines", nargs="+", choices=("local", "torchrun", "ray"), default=["local", "torchrun", "ray"]
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="under torchrun and ray; default 2")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="starts of each; default 3")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="new file")
