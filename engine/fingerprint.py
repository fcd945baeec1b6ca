"""Which code and settings decide a result.

A room either decides results or carries them about: what stands in CARRIERS is no part of any
fingerprint. Names are followed through each room's own import lines. Docstrings, comments, type
hints, what is raised and functions that only refuse do not count, so that a better sentence makes
nothing again.
"""
from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {f"engine.{path.stem}": path for path in sorted((ROOT / "engine").glob("[!_]*.py"))}
ROOMS["helpers"] = ROOT / "helpers.py"
CARRIERS = ("engine.checkpoints", "engine.files", "engine.fingerprint", "engine.keys",
            "engine.looks", "engine.processes", "engine.progress", "engine.runs",
            "engine.stages", "engine.tensors")
REFUSE = ("check_", "refuse_")  # so begin the names of functions that raise or do nothing
NO_CONSTANTS = ("PROFILES", "STAGES", "FROZEN_STAGES", "TYPES", "LIMITS", "ROOT")
# The text of each room as it was imported: an edit under an open kernel changes the file, not what
# runs.
SOURCES = {room: path.read_text(encoding="utf-8") for room, path in ROOMS.items()}
DIGESTS: dict[str, Callable] = {}
OF_STAGE: set[Callable] = set()


def content(digest: Callable, of_stage: bool = False) -> Callable:
    """Mark a function of this study by the contents that it gives: `digest(run)`, a text, or
    `digest(run, stage)` where they are not the same for all stages.

    A stage that calls it depends on that digest, and neither on the function's code nor on the
    settings that it reads. So what chooses rows may change while the chosen rows stay the same.
    """
    def mark(function: Callable) -> Callable:
        for known in (function, digest):
            DIGESTS[known.__name__] = digest
        OF_STAGE.update({digest} if of_stage else ())
        return function

    return mark


@dataclass(frozen=True)
class Code:
    """The hash of some code, the settings that it reads, and the functions of `content` it calls.

    A setting is seen where it is written as `profile.<name>`; `run.split` and `run.seed` too.
    """
    hash: str
    settings: tuple[str, ...]
    contents: tuple[str, ...]


class CodeChanged(RuntimeError):
    """What runs is not what is written."""


def refuse_changed_code() -> None:
    """CodeChanged if a file is no longer the one that this process has imported."""
    for room, path in ROOMS.items():
        if not path.exists() or path.read_text(encoding="utf-8") != SOURCES[room]:
            raise CodeChanged(f"{path.name} has changed since it was imported: restart the "
                              "kernel, so that what runs is what is written")


def code_of(function: Callable) -> Code:
    """The fingerprint of a function of this study and of all that it calls."""
    return code_of_words(function.__module__, (function.__qualname__,))


def code_of_words(room: str, words: tuple[str, ...]) -> Code:
    """The fingerprint of what these words mean in a room; it follows SOURCES."""
    return _code(room, words, tuple(SOURCES.items()))


@cache
def _code(room: str, words: tuple[str, ...], sources: tuple[tuple[str, str], ...]) -> Code:
    rooms = {other: _room(other, text) for other, text in sources}
    todo, seen, parts = [(room, word) for word in words], set(), set()
    settings, contents = set(), set()
    while todo:
        place, word = todo.pop()
        target, origin = _resolve(rooms, place, word), rooms[place].imports.get(word)
        if origin and (target is None or not origin.endswith(f".{word}")):  # a library's, or as ...
            parts.add(f"{word} is {origin}")
        if target is None:
            continue
        if target[1] in DIGESTS:
            contents.add(target[1])
        elif target not in seen and _decides(rooms, *target):
            seen.add(target)
            definition = rooms[target[0]].definitions[target[1]]
            parts.add(ast.unparse(definition))  # not dump, which Python's versions vary
            settings |= set(_settings(definition))
            todo += [(target[0], other) for other in _words(definition)]
    text = "\n".join(sorted(parts))
    code = hashlib.sha256(text.encode()).hexdigest()
    return Code(code, tuple(sorted(settings)), tuple(sorted(contents)))


@dataclass(frozen=True)
class Room:
    """A module's top-level definitions, and where each name that it imports comes from."""
    definitions: dict[str, ast.AST]
    imports: dict[str, str]


@cache
def _room(name: str, source: str) -> Room:
    """The definitions and imports of a module's text."""
    definitions, imports = {}, {}
    for node in _statements(_bare(ast.parse(source)).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                imports[alias.asname or alias.name] = origin + alias.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                words = (word.id for word in ast.walk(target) if isinstance(word, ast.Name))
                definitions.update(dict.fromkeys(words, node))
        elif hasattr(node, "name"):
            definitions[node.name] = node
    return Room(definitions, imports)


def _statements(body: list[ast.AST]) -> Iterator[ast.AST]:
    """The statements of a module, those in a `with` included."""
    for node in body:
        yield from _statements(node.body) if isinstance(node, ast.With) else [node]


class _Strip(ast.NodeTransformer):
    """Take away what decides nothing: docstrings, type hints, what is raised, marks of stages."""

    def __init__(self):
        self.fields: set[ast.AST] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.fields |= {*node.body}  # where a hint makes a field
        return self._without_docstring(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(exc=None, cause=None)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Pass()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        if node in self.fields or node.value is None:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def _without_docstring(self, node: ast.AST) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        marks = ("content", "makes", "fusion")
        node.decorator_list = [mark for mark in node.decorator_list
                               if getattr(getattr(mark, "func", None), "id", None) not in marks]
        return self.generic_visit(node)


def _bare(tree: ast.Module) -> ast.Module:
    return _Strip().visit(tree)


def _words(node: ast.AST) -> set[str]:
    """The names that code mentions, those after the dot of a module of ours included."""
    words = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
            words.add(f"{child.value.id}.{child.attr}")
    return words


def _settings(node: ast.AST) -> Iterator[str]:
    """The settings that code reads."""
    for child in ast.walk(node):
        if not isinstance(child, ast.Attribute):
            continue
        owner = getattr(child.value, "id", getattr(child.value, "attr", ""))
        of_run = owner == "run" and child.attr in ("split", "seed")
        if of_run or owner == "profile":
            yield child.attr


def _resolve(rooms: dict[str, Room], room: str, word: str) -> tuple[str, str] | None:
    """(room, name) where a word of `room` is defined; None if it is not of this study."""
    first, _, rest = word.partition(".")
    while first not in rooms[room].definitions:
        origin = rooms[room].imports.get(first, "")
        if origin in rooms:  # a whole room: the name stands after the dot
            return _resolve(rooms, origin, rest)
        room, _, first = origin.rpartition(".")
        if room not in rooms:
            return None
    return (room, first)


def _decides(rooms: dict[str, Room], room: str, name: str) -> bool:
    """Whether a definition can decide a result."""
    if room in CARRIERS or name in NO_CONSTANTS or name.startswith(REFUSE):
        return False
    constant = isinstance(rooms[room].definitions[name], ast.Assign | ast.AnnAssign)
    return constant or room != "engine.settings"
