"""The shape of the project, checked on its source text: floors, cycles, importers of heavy libraries, unread
configuration keys, length of files and functions. The last part proves that each check can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {"kernels": 1, "dino_scale": 2, "data_pipeline": 3, "launch": 4}
LONGEST_FILE, LONGEST_FUNCTION = 450, 80

COMPAT = "dino_scale.torchvision_compat"


@dataclass(frozen=True)
class Home:
    """Where a heavy library may be imported: a module, or a package (then `single`: in one module of it only).

    required: somebody must import it, otherwise the dependency is a dead one.
    """

    place: str
    single: bool = True
    required: bool = True


HOMES = {
    "ray": Home("launch.ray_session"),
    "deepspeed": Home("dino_scale.training.zero"),
    "timm": Home("dino_scale.model.backbone"),
    "pycocotools": Home("dino_scale.evaluation.coco"),
    "faster_coco_eval": Home("dino_scale.evaluation.faster", required=False),
    "fsspec": Home("data_pipeline", required=False),
    "webdataset": Home("data_pipeline"),
    "simplejpeg": Home("data_pipeline"),
    "zlib_ng": Home("data_pipeline", required=False),
    "triton": Home("kernels", single=False),
    "numba": Home("kernels", single=False),
}


@dataclass(frozen=True)
class Module:
    """A source file. name: dotted; imports: dotted names as written, with the line of each."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[tuple[str, int], ...]


def read_modules(root: Path) -> dict[str, Module]:
    modules = {}
    for package in FLOORS:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
            modules[name] = Module(name, path, tree, tuple(_imports(name, path, tree)))
    return modules


def _imports(name: str, path: Path, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every import anywhere in the file; `from a import b` counts as a.b (which may be a module or a name in a)."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(modules: dict[str, Module]) -> dict[str, dict[str, int]]:
    """module -> imported module of the project -> line."""
    found: dict[str, dict[str, int]] = {}
    for module in modules.values():
        targets = found.setdefault(module.name, {})
        for written, line in module.imports:
            target = written if written in modules else written.rpartition(".")[0]
            if target in modules and target != module.name:
                targets.setdefault(target, line)
    return found


def climbing_imports(modules: dict[str, Module]) -> list[str]:
    return [
        f"{source}:{line} imports {target}: imports go down only"
        for source, targets in own_imports(modules).items()
        for target, line in targets.items()
        if FLOORS[target.split(".")[0]] > FLOORS[source.split(".")[0]]
    ]


def import_cycles(modules: dict[str, Module]) -> list[str]:
    """Cycles as "a -> b -> a", one per strongly connected group found on the way."""
    edges = own_imports(modules)
    done: set[str] = set()
    cycles = []
    for start in edges:
        trail: list[str] = []
        stack = [(start, iter(edges[start]))] if start not in done else []
        trail = [start]
        while stack:
            name, targets = stack[-1]
            following = next(targets, None)
            if following is None:
                done.add(name)
                stack.pop()
                trail.pop()
            elif following in trail:
                cycles.append(" -> ".join([*trail[trail.index(following) :], following]))
            elif following not in done:
                stack.append((following, iter(edges[following])))
                trail.append(following)
    return cycles


def misplaced_libraries(modules: dict[str, Module]) -> list[str]:
    problems = []
    for library, home in HOMES.items():
        importers = sorted({module.name for module in modules.values() if _uses(module, library)})
        problems += [
            f"{name} imports {library}: expected only {home.place} to do so"
            for name in importers
            if name != home.place and not name.startswith(home.place + ".")
        ]
        if home.single and len(importers) > 1:
            problems.append(f"{library} is imported by {', '.join(importers)}: expected one module")
        if home.required and not importers:
            problems.append(f"{library} is imported nowhere: expected in {home.place}")
    return problems


def unprepared_torchvision(modules: dict[str, Module]) -> list[str]:
    """torchvision may only be imported where `ensure_importable` stands ready."""
    ready = f"{COMPAT}.ensure_importable"
    return [
        f"{module.name} imports torchvision without {ready}"
        for module in modules.values()
        if _uses(module, "torchvision") and module.name != COMPAT
        if ready not in {written for written, _ in module.imports}
    ]


def _uses(module: Module, library: str) -> bool:
    return any(written.split(".")[0] == library for written, _ in module.imports)


def unread_leaves(modules: dict[str, Module]) -> list[str]:
    """Leaves of the configuration that no code outside dino_scale/config reads, as Class.field.

    A read is an attribute access that is not called, on something that can hold that class: its field name in the
    schema (`.schedule.steps`), or a name annotated with the class in the same module (`config: ScheduleConfig`).
    """
    classes = _schema_classes(modules["dino_scale.config.schema"].tree)
    holders: dict[str, set[str]] = {name: set() for name in classes}
    for fields in classes.values():
        for field, annotation in fields.items():
            for held in _classes_in(annotation, classes):
                holders[held] |= {field, field.removesuffix("s")}
    read: set[tuple[str, str]] = set()
    for module in modules.values():
        if not module.name.startswith("dino_scale.config"):
            read |= _reads(module.tree, classes, holders)
    return [
        f"{name}.{field}"
        for name, fields in classes.items()
        for field, annotation in fields.items()
        if not _classes_in(annotation, classes) and (name, field) not in read
    ]


def _schema_classes(tree: ast.Module) -> dict[str, dict[str, ast.expr]]:
    return {
        node.name: {
            line.target.id: line.annotation
            for line in node.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def _classes_in(annotation: ast.expr | None, classes: Iterable[str]) -> set[str]:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    return names & set(classes)


def _reads(
    tree: ast.Module, classes: dict[str, dict[str, ast.expr]], holders: dict[str, set[str]]
) -> set[tuple[str, str]]:
    local = {name: set(held) for name, held in holders.items()}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            for held in _classes_in(node.annotation, classes):
                local[held].add(node.arg)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name | ast.Attribute):
            for held in _classes_in(node.annotation, classes):
                local[held].add(_last_name(node.target))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        (name, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
        for name, fields in classes.items()
        if node.attr in fields and _last_name(node.value) in local[name]
    }


def _last_name(node: ast.expr) -> str:
    """`a.b.stages[key]` -> "stages"."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def too_long(paths: Iterable[Path]) -> list[str]:
    problems = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") >= LONGEST_FILE:
            problems.append(f"{path} has {text.count(chr(10))} lines: expected fewer than {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    problems.append(f"{path}:{node.lineno} {node.name} has {lines} lines: at most {LONGEST_FUNCTION}")
    return problems


# The project itself.


@pytest.fixture(scope="module")
def project() -> dict[str, Module]:
    return read_modules(ROOT)


def test_imports_go_down_only(project: dict[str, Module]) -> None:
    assert climbing_imports(project) == []


def test_no_import_cycles(project: dict[str, Module]) -> None:
    assert import_cycles(project) == []


def test_each_heavy_library_has_one_importer(project: dict[str, Module]) -> None:
    assert misplaced_libraries(project) == []


def test_torchvision_is_imported_prepared(project: dict[str, Module]) -> None:
    assert unprepared_torchvision(project) == []


def test_every_configuration_leaf_is_read(project: dict[str, Module]) -> None:
    assert unread_leaves(project) == []


def test_files_and_functions_are_short() -> None:
    paths = [path for folder in (*FLOORS, "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert too_long(paths) == []


def test_command_line_starts_light() -> None:
    """`dino-scale --help` must not wait for torch; pickling and forking the driver must not carry it either."""
    heavy = ["torch", "torchvision", *HOMES]
    code = f"import sys, launch.cli; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# The checks themselves, on trees made to break each rule.


def plant(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_modules(root)


def test_checker_sees_an_import_up(tmp_path: Path) -> None:
    modules = plant(
        tmp_path,
        {
            "kernels/op.py": "def f():\n    from dino_scale.errors import UserError\n    return UserError\n",
            "dino_scale/errors.py": "class UserError(Exception): ...\n",
            "launch/cli.py": "import dino_scale.errors\n",
        },
    )
    assert climbing_imports(modules) == ["kernels.op:2 imports dino_scale.errors: imports go down only"]


@pytest.mark.parametrize(
    "back", ["import dino_scale.a", "from dino_scale import a", "from . import a", "from .a import f"]
)
def test_checker_sees_a_cycle_through_a_function(tmp_path: Path, back: str) -> None:
    modules = plant(
        tmp_path,
        {
            "dino_scale/__init__.py": "",
            "dino_scale/a.py": "from dino_scale.b import g\n\n\ndef f(): ...\n",
            "dino_scale/b.py": "from dino_scale.c import h\n\n\ndef g(): ...\n",
            "dino_scale/c.py": f"def h():\n    {back}\n",
        },
    )
    assert import_cycles(modules) == ["dino_scale.a -> dino_scale.b -> dino_scale.c -> dino_scale.a"]


def test_checker_accepts_a_diamond(tmp_path: Path) -> None:
    modules = plant(
        tmp_path,
        {
            "dino_scale/a.py": "import dino_scale.b, dino_scale.c\n",
            "dino_scale/b.py": "import dino_scale.d\n",
            "dino_scale/c.py": "import dino_scale.d\n",
            "dino_scale/d.py": "",
        },
    )
    assert import_cycles(modules) == []


def test_checker_sees_misplaced_doubled_and_absent_libraries(tmp_path: Path) -> None:
    modules = plant(
        tmp_path,
        {
            "launch/ray_session.py": "import ray\n",
            "launch/chain.py": "def f():\n    from ray.util import placement_group\n",
            "data_pipeline/a.py": "import simplejpeg\n",
            "data_pipeline/b.py": "import simplejpeg\n",
            "kernels/x.py": "import triton, numba\n",
            "kernels/y.py": "import triton.language\n",
            "dino_scale/training/zero.py": "import deepspeed\n",
            "dino_scale/model/backbone.py": "import timm\n",
            "data_pipeline/shards.py": "import webdataset\n",
        },
    )
    assert misplaced_libraries(modules) == [
        "launch.chain imports ray: expected only launch.ray_session to do so",
        "ray is imported by launch.chain, launch.ray_session: expected one module",
        "pycocotools is imported nowhere: expected in dino_scale.evaluation.coco",
        "simplejpeg is imported by data_pipeline.a, data_pipeline.b: expected one module",
    ]


def test_checker_sees_unprepared_torchvision(tmp_path: Path) -> None:
    modules = plant(
        tmp_path,
        {
            "data_pipeline/bad.py": "from torchvision.transforms import v2\n",
            "data_pipeline/good.py": f"from {COMPAT} import ensure_importable\nimport torchvision\n",
        },
    )
    assert unprepared_torchvision(modules) == [
        f"data_pipeline.bad imports torchvision without {COMPAT}.ensure_importable"
    ]


def test_checker_names_unread_leaves(tmp_path: Path) -> None:
    schema = """
class InnerConfig:
    train: str = ""
    mean: float = 0.0
    steps: int = 0
    unused: int = 0

class OuterConfig:
    inner: InnerConfig = None
    rows: dict[str, InnerConfig] = None
    seed: int = 0
"""
    user = """
def f(model, tensor, config: OuterConfig, other):
    model.train()
    tensor.mean()
    other.unused
    config.inner = 3
    return config.seed + config.rows["x"].steps
"""
    modules = plant(tmp_path, {"dino_scale/config/schema.py": schema, "dino_scale/user.py": user})
    assert unread_leaves(modules) == ["InnerConfig.train", "InnerConfig.mean", "InnerConfig.unused"]


def test_checker_measures_lengths(tmp_path: Path) -> None:
    long_function = tmp_path / "function.py"
    long_function.write_text("def f():\n" + "    x = 1\n" * LONGEST_FUNCTION, encoding="utf-8")
    long_file = tmp_path / "file.py"
    long_file.write_text("x = 1\n" * LONGEST_FILE, encoding="utf-8")
    assert [line.removeprefix(str(tmp_path)) for line in too_long([long_function, long_file])] == [
        f"/function.py:1 f has {LONGEST_FUNCTION + 1} lines: at most {LONGEST_FUNCTION}",
        f"/file.py has {LONGEST_FILE} lines: expected fewer than {LONGEST_FILE}",
    ]
