"""The command line: `dino-scale COMMAND ...`, the same as `python -m launch COMMAND ...`.

Exit codes: 0 done, 2 user error, 3 data error, 4 interrupted but resumable, 1 a bug in this program.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from dino_scale.errors import USERS_FILE_ERRORS, ClusterLostError, DinoScaleError, UserError
from launch.bench_cli import add_benchmarks
from launch.plan_cli import add_plan_options
from launch.security import redacted

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

_DEBUG = "DINO_SCALE_DEBUG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ClusterLostError as error:
        _leave_at_once(_fail(str(error), error.exit_code))
    except DinoScaleError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 4)
    except OSError as error:
        if error.errno in USERS_FILE_ERRORS:
            return _fail(f"{error.filename or 'a file'}: {(error.strerror or str(error)).lower()}", UserError.exit_code)
        return _report_bug()
    except Exception:
        return _report_bug()
    return 0


def _fail(message: str, code: int) -> int:
    if os.environ.get(_DEBUG):
        print(redacted(traceback.format_exc()), file=sys.stderr)
    print(f"dino-scale: {redacted(message)}", file=sys.stderr)
    return code


def _leave_at_once(code: int) -> NoReturn:
    """Without the interpreter's own end, in which a library that waits for a lost cluster crashes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_bug() -> int:
    print(redacted(traceback.format_exc()), file=sys.stderr)
    print("dino-scale: this is a bug in dino-scale; please report the lines above", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dino-scale",
        description="Train DINO object detectors: raw folders to shards to a pre-trained, fine-tuned detector.",
        epilog=f"Exit codes: 0 done, 2 user error, 3 data error, 4 interrupted but resumable, 1 bug. "
        f"{_DEBUG}=1 shows where an error arose.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_demo, _pack, _doctor, _plan, _train, _resume, _evaluate, _predict, _report):
        add(commands)
    for add in (_import_official, _export, _reshard, _inspect, _bench):
        add(commands)
    return parser


def _command(
    commands: Commands,
    name: str,
    text: str,
    example: str,
    run: str | Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    """run: what the command does; a name stands for the `run` of launch/commands/NAME.py, imported only then."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=partial(_run_module, run) if isinstance(run, str) else run)
    return parser


def _run_module(name: str, options: argparse.Namespace) -> None:
    import_module(f"launch.commands.{name}").run(options)


def _add_overrides(parser: argparse.ArgumentParser, example: str = "stages.pretrain.batch.microbatch=4") -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override one configuration key, such as {example}; may be repeated",
    )


def _add_insecure(parser: argparse.ArgumentParser) -> None:
    text = "join a Ray cluster that asks for no token; the same as --set launch.insecure=true"
    override = "launch.insecure=true"
    parser.add_argument("--insecure", action="append_const", dest="overrides", default=[], const=override, help=text)


# One function per command: its arguments, and the import of what it runs. Nothing heavy is imported before that.


def _demo(commands: Commands) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.demo import demo

        demo(options.run_dir)

    text = "the whole chain on this machine with synthetic data: pack, pre-train, fine-tune, evaluate, report"
    parser = _command(commands, "demo", text, "dino-scale demo --run-dir runs/demo", run)
    parser.add_argument("--run-dir", type=_folder, metavar="R", help="new folder; default runs/demo-DATE-TIME")


def _pack(commands: Commands) -> None:
    text = "images and an annotation file into shards with an index"
    example = "dino-scale pack --format coco --annotations instances.json --images images --out shards/train"
    parser = _command(commands, "pack", text, example, "pack")
    _add_raw_data(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="new folder")
    parser.add_argument("--restart", action="store_true", help="forget the finished shards of an interrupted pack")


def _doctor(commands: Commands) -> None:
    text = "check packed shards byte by byte, or tell what pack would write and mend; nothing is written"
    example = "dino-scale doctor shards/train\n  dino-scale doctor --annotations instances.json --images images"
    parser = _command(commands, "doctor", text, example, "doctor")
    parser.add_argument("shards", type=Path, nargs="?", metavar="SHARDS", help="folder made by pack")
    _add_raw_data(parser, required=False)


def _add_raw_data(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options that say which images and annotations; the same for pack and doctor."""
    add = parser.add_argument
    add("--format", choices=("coco", "objects365"), default="coco", help="default: coco")
    add("--annotations", type=Path, required=required, metavar="A.json", help="COCO-style annotation file")
    for option in ("--images", "--images2"):
        add(
            option,
            type=Path,
            action="append",
            dest="images",
            required=required and option == "--images",
            metavar="DIR",
            help="folder of images" if option == "--images" else "second folder of images",
        )
    add("--first", type=int, default=0, metavar="N", help="only the first N images of A.json")
    add("--also", type=Path, metavar="B.json", help="add the images of a second annotation file")
    add("--also-after", type=int, default=0, metavar="N", help="of B.json leave out the first N images")
    add("--skip-unreadable", action="store_true", help="leave out and count images that are missing or do not decode")
    add(
        "--workers", type=int, metavar="N",
        help="processes; the result does not depend on it; default: CPU cores, at most 8; with --address all of them",
    )  # fmt: skip
    add(
        "--address", metavar="A",
        help="work as Ray tasks: auto or host:port joins a cluster (all its machines must see the folders), local "
        "starts Ray here; default: no Ray",
    )  # fmt: skip


def _plan(commands: Commands) -> None:
    text = "what a chain will do and need: steps, memory, traffic, time, cost; no accelerator is touched"
    example = "dino-scale plan configs/chain/objects365_coco_swin_l.yaml --gpu-memory 80 --images-per-second 40"
    parser = _command(commands, "plan", text, example, "plan")
    parser.add_argument("chain", type=Path, metavar="CHAIN.yaml")
    add_plan_options(parser)
    _add_overrides(parser)


def _train(commands: Commands) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.train import train

        train(options.chain, options.run_dir, options.overrides)

    example = "dino-scale train configs/chain/demo.yaml --run-dir runs/first --set launch.workers=2"
    parser = _command(commands, "train", "run a chain of stages in a new run folder", example, run)
    parser.add_argument("chain", type=Path, metavar="CHAIN.yaml")
    parser.add_argument("--run-dir", type=_folder, metavar="R", help="new folder; default runs/NAME-DATE-TIME")
    _add_insecure(parser)
    _add_overrides(parser)


def _resume(commands: Commands) -> None:
    def run(options: argparse.Namespace) -> None:
        from launch.commands.train import resume

        resume(options.run_dir, options.overrides)

    text = "continue a run where it stopped, on whatever workers there are now"
    parser = _command(commands, "resume", text, "dino-scale resume runs/first --set launch.workers=1", run)
    parser.add_argument("run_dir", type=_folder, metavar="R", help="run folder of train or demo")
    _add_insecure(parser)
    _add_overrides(parser)


def _evaluate(commands: Commands) -> None:
    example = "dino-scale evaluate --weights runs/first/finetune/weights.safetensors --data shards/validation"
    parser = _command(commands, "evaluate", "COCO numbers of trained weights on packed data", example, "evaluate")
    parser.add_argument("--weights", type=Path, required=True, metavar="W")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="folder made by pack, or its address")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for evaluation.json and detections.json")
    _add_overrides(parser, "evaluation.short_side=640")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument(
        "--backend",
        choices=("pycocotools", "faster"),
        default="pycocotools",
        help="faster: numbers by faster-coco-eval, nothing per image; default: pycocotools",
    )


def _predict(commands: Commands) -> None:
    text = "draw the boxes a detector finds, and write them as a COCO-format file"
    example = "dino-scale predict --weights runs/first/finetune/weights.safetensors photos --out found"
    parser = _command(commands, "predict", text, example, "predict")
    parser.add_argument("--weights", type=Path, required=True, metavar="W")
    parser.add_argument("pictures", type=Path, metavar="IMAGE|FOLDER")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions")
    parser.add_argument(
        "--threshold", type=_share, default=0.3, metavar="SCORE", help="smallest score kept, 0 to 1; default 0.3"
    )
    _add_overrides(parser, "evaluation.short_side=640")


def _report(commands: Commands) -> None:
    text = "write report.html of a run anew: curves, per-class AP, best and worst pictures"
    parser = _command(commands, "report", text, "dino-scale report runs/first", "report")
    parser.add_argument("run_dir", type=_folder, metavar="R", help="run folder of train or demo")


def _import_official(commands: Commands) -> None:
    text = "a checkpoint of the authors' repository into a weights file"
    parser = _command(
        commands,
        "import-official",
        text,
        "dino-scale import-official checkpoint0011_4scale.pth --out W",
        "import_official",
    )
    parser.add_argument("checkpoint", type=Path, metavar="X.pth")
    parser.add_argument("--out", type=Path, required=True, metavar="W", help="new weights file (.safetensors)")
    parser.add_argument("--part", choices=("model", "ema_model"), default="model", help="default: model")
    parser.add_argument("--short-side", type=int, default=800, metavar="PIXELS", help="of images; default 800")
    parser.add_argument("--max-size", type=int, default=1333, metavar="PIXELS", help="of images; default 1333")
    parser.add_argument("--names", action="store_true", help="print every entry with the name it gets")


def _export(commands: Commands) -> None:
    text = "a checkpoint into a weights file, or a weights file into a checkpoint of the authors' repository"
    example = (
        "dino-scale export runs/first --best --out best.safetensors\n"
        "  dino-scale export runs/first/finetune/checkpoints/step_00001000 --out early.safetensors\n"
        "  dino-scale export --weights runs/first/finetune/weights.safetensors --format official --out X.pth"
    )
    parser = _command(commands, "export", text, example, "export")
    parser.add_argument("source", type=Path, nargs="?", metavar="R|CKPT", help="run folder, or a checkpoint in it")
    parser.add_argument(
        "--best", action="store_true", help="of R: the checkpoint of the best evaluation, not the newest"
    )
    parser.add_argument("--stage", metavar="NAME", help="of R; default: the last one that has a checkpoint")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained, also where averages were kept")
    parser.add_argument("--weights", type=Path, metavar="W", help="instead of a checkpoint: a weights file")
    parser.add_argument("--format", choices=("official", "safetensors"), help="needed with --weights")
    parser.add_argument("--out", type=Path, required=True, metavar="X", help="new file")


def _reshard(commands: Commands) -> None:
    text = "a checkpoint in another number of files, in little memory; training reads any number of files as it is"
    example = "dino-scale reshard runs/first/pretrain/checkpoints/step_00001000 --out archive --parts 4"
    parser = _command(commands, "reshard", text, example, "reshard")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder step_XXXXXXXX of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT2", help="new folder")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--parts", type=int, metavar="N", help="number of shard files")
    size.add_argument("--megabytes", type=float, metavar="MB", help="largest size of the tensors of a shard file")


def _inspect(commands: Commands) -> None:
    text = "what a checkpoint holds; exit code 3 where a file is damaged"
    example = "dino-scale inspect runs/first/pretrain/checkpoints/step_00001000 --verify"
    parser = _command(commands, "inspect", text, example, "inspect")
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder step_XXXXXXXX of a run")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its digest")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _bench(commands: Commands) -> None:
    text = "measurements on this machine"
    add_benchmarks(commands.add_parser("bench", help=text, description=text), _command)


def _folder(text: str) -> Path:
    """Of a run: it needs renames and locks, which object stores do not have."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"is '{text}': expected a path on a file system that all workers share")
    return Path(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is '{text}': expected a number from 0 to 1")
    return value
