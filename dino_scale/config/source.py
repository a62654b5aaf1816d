"""Configuration text as a tree that remembers where every value was written.

YAML is read as nodes, never constructed: types come from the schema (`decode.py`), so `1e-4`, `no` and `on` mean what
the field asks for. `extends` is resolved here, at the top of a file and inside any mapping.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import yaml
from yaml.composer import ComposerError

from dino_scale.errors import ConfigError

MAX_BYTES = 256 * 1024  # of one file: YAML in pure Python is slow, a configuration is small
MAX_DEPTH = 24  # of nested mappings and lists; the schema needs 6
MAX_FILES = 200  # read for one configuration, all `extends` counted


@dataclass(frozen=True)
class Scalar:
    """One value as written. plain: without quotes. where: `file:line` or `--set key`."""

    text: str
    plain: bool
    where: str


@dataclass(frozen=True)
class List:
    items: tuple[Tree, ...]
    where: str


@dataclass(frozen=True)
class Mapping:
    entries: dict[str, Tree]
    where: str


Tree = Scalar | List | Mapping


@dataclass
class Problems:
    """Everything wrong with a configuration, gathered so that one run shows it all."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, key: str, text: str) -> None:
        line = f"{where}: {key}: {text}" if key else f"{where}: {text}"
        if line not in self.lines:  # a base that two stages extend would say everything twice
            self.lines.append(line)

    def raise_if_any(self) -> None:
        if self.lines:
            raise ConfigError("\n".join(self.lines))


def read_tree(path: Path, problems: Problems) -> Mapping:
    """The mapping in `path` with every `extends` replaced by what it names.

    Raises ConfigError when a file cannot be read: what is missing would only make more, misleading problems.
    """
    tree = _Reader(problems).file(path, mentioned_at="", chain=())
    problems.raise_if_any()
    return tree


def merge(base: Tree, over: Tree) -> Tree:
    """`over` wins; mappings are merged key by key, in the order of `base`, everything else is replaced."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    entries = dict(base.entries)
    for key, value in over.entries.items():
        entries[key] = merge(entries[key], value) if key in entries else value
    return Mapping(entries, over.where)


def override_tree(override: str, problems: Problems) -> Mapping | None:
    """The tree of one `a.b.c=value`. Lists, mappings and quoted text are YAML; anything else is taken as it stands."""
    dotted, equals, text = override.partition("=")
    where = f"--set {dotted}"
    path = dotted.strip().split(".")
    if not equals or not all(path):
        problems.add(f"--set {override}", "", "expected key=value with a dotted key, such as model.hidden=128")
        return None
    value: Tree = Scalar(text, plain=text != "", where=where)
    if text[:1] in ("[", "{", '"', "'"):
        try:
            value = _relocate(_convert(_compose(text), "", problems, lambda _: where), where)
        except yaml.YAMLError as error:
            problems.add(where, "", f"{text} is not valid YAML: {_reason(error)}")
            return None
    for key in reversed(path):
        value = Mapping({key: value}, where)
    return value if isinstance(value, Mapping) else None


def text_tree(text: str, where: str, problems: Problems) -> Tree:
    """The tree of one YAML (or JSON) text that is not a file; `where` is the place of all of it."""
    try:
        return _relocate(_convert(_compose(text), "", problems, lambda _: where), where)
    except yaml.YAMLError as error:
        problems.add(where, "", f"not valid YAML: {_reason(error)}")
        return Scalar(text, plain=True, where=where)


class _Reader:
    """Reads a file and the files it extends, counting them."""

    def __init__(self, problems: Problems) -> None:
        self.problems = problems
        self.files = 0

    def file(self, path: Path, mentioned_at: str, chain: tuple[Path, ...]) -> Mapping:
        """chain: the files that are being read because each extends the next, outermost first."""
        name = os.path.normpath(path)
        identity = path.resolve()
        empty = Mapping({}, f"{name}:1")
        if identity in chain:
            circle = " -> ".join(p.name for p in (*chain[chain.index(identity) :], identity))
            self.problems.add(mentioned_at, "extends", f"files extend each other in a circle: {circle}")
            return empty
        self.files += 1
        if self.files > MAX_FILES:
            self.problems.add(mentioned_at, "extends", f"more than {MAX_FILES} files are read: expected fewer")
            return empty
        tree = self._parse(path, name, mentioned_at)
        return empty if tree is None else self._extend(tree, path.parent, (*chain, identity))

    def _parse(self, path: Path, name: str, mentioned_at: str) -> Mapping | None:
        text = self._text(path, name, mentioned_at)
        if text is None:
            return None
        try:
            node = _compose(text)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            self.problems.add(f"{name}:{line}", "", f"not valid YAML: {_reason(error)}")
            return None
        except yaml.YAMLError as error:
            self.problems.add(f"{name}:1", "", f"not valid YAML: {_reason(error)}")
            return None
        if node is None:
            return Mapping({}, f"{name}:1")
        tree = _convert(node, "", self.problems, lambda n: f"{name}:{n.start_mark.line + 1}")
        if not isinstance(tree, Mapping):
            self.problems.add(tree.where, "", "expected a mapping (key: value lines) at the top of the file")
            return None
        return tree

    def _text(self, path: Path, name: str, mentioned_at: str) -> str | None:
        where = mentioned_at or name
        key = "extends" if mentioned_at else ""
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            self.problems.add(where, key, f"cannot read {name}: {(error.strerror or str(error)).lower()}")
            return None
        if len(data) > MAX_BYTES:
            self.problems.add(
                where, key, f"{name} is larger than {MAX_BYTES // 1024} KiB: expected a configuration file"
            )
            return None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.problems.add(where, key, f"{name} is not UTF-8 text (byte {error.start})")
            return None

    def _extend(self, tree: Tree, folder: Path, chain: tuple[Path, ...]) -> Mapping:
        assert isinstance(tree, Mapping)
        own = Mapping(
            {
                key: self._extend(value, folder, chain) if isinstance(value, Mapping) else value
                for key, value in tree.entries.items()
                if key != "extends"
            },
            tree.where,
        )
        merged: Tree = Mapping({}, tree.where)
        for base in self._bases(tree):
            merged = merge(merged, self.file(folder / base.text, base.where, chain))
        merged = merge(merged, own)
        assert isinstance(merged, Mapping)
        return merged

    def _bases(self, tree: Mapping) -> list[Scalar]:
        value = tree.entries.get("extends")
        if value is None:
            return []
        items = value.items if isinstance(value, List) else (value,)
        bases = [item for item in items if isinstance(item, Scalar) and item.text]
        if len(bases) != len(items):
            self.problems.add(value.where, "extends", "expected the path of a YAML file or a list of paths")
        return bases


class _Loader(yaml.SafeLoader):
    """Composes nodes only, and refuses what a configuration does not need and an attacker likes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()
        mark = cast(yaml.Mark, event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are refused, use extends", mark)
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, f"tags ({event.tag}) are refused", mark)
        if self.depth >= MAX_DEPTH:
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        self.depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


def _reason(error: yaml.YAMLError) -> str:
    """One line of what PyYAML says in several."""
    if isinstance(error, yaml.MarkedYAMLError):
        return (error.problem or error.context or "syntax error").replace("\n", " ")
    return str(error).splitlines()[0]


def _convert(
    node: yaml.Node | None, key: str, problems: Problems, locate: Callable[[yaml.Node], str], where: str = ""
) -> Tree:
    """A tree from YAML nodes. where: place of the key that holds this node (a block value starts a line later)."""
    if node is None:
        return Scalar("", plain=True, where=where)
    where = where or locate(node)
    if isinstance(node, yaml.SequenceNode):
        return List(tuple(_convert(item, key, problems, locate) for item in node.value), where)
    if isinstance(node, yaml.ScalarNode):
        return Scalar(node.value, plain=node.style is None, where=where)
    entries: dict[str, Tree] = {}
    for key_node, value_node in node.value:  # a MappingNode: YAML has no fourth kind
        key_where = locate(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.add(key_where, key, "a key is a list or a mapping: expected a word")
            continue
        name = key_node.value
        full = f"{key}.{name}" if key else name
        if name in entries:
            problems.add(key_where, full, f"given twice, first at {entries[name].where}")
        entries[name] = _convert(value_node, full, problems, locate, key_where)
    return Mapping(entries, where)


def _relocate(tree: Tree, where: str) -> Tree:
    """The same tree with one place for all of it (values of `--set` have no lines)."""
    if isinstance(tree, Scalar):
        return replace(tree, where=where)
    if isinstance(tree, List):
        return List(tuple(_relocate(item, where) for item in tree.items), where)
    return Mapping({key: _relocate(value, where) for key, value in tree.entries.items()}, where)
