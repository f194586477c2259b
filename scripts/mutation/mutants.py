"""Draws mutants: a place in the code at random, then one of the mutations that cosmic-ray's operators know for it.

Every place counts once. A draw over the mutations themselves would mostly give arithmetic operators, because each of
them has ten replacements, where `and`, `True` or a number has one or two.

Left out are places whose mutation no test should notice: annotations, `__all__`, and the text of an error. So are
mutations that do not compile or leave the syntax tree as it was.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

Position = tuple[int, int]
"""A line, counted from 1, and a column in characters, counted from 0."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        number: its place in the draw, from 0.
        file: path relative to the root, with slashes.
        operator: cosmic-ray's name of the operator.
        occurrence: which of the operator's mutations of the file, from 0.
        line: the line of the change, from 1.
        sha256: the hash of the file that was drawn from.
    """

    number: int
    file: str
    operator: str
    occurrence: int
    line: int
    sha256: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is, in whichever draw."""
        return self.file, self.sha256, self.operator, self.occurrence

    def source(self, root: Path) -> str:
        """The mutated file.

        Raises:
            ValueError: the file changed since the draw, or the operator finds nothing to change.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if _hash(text) != self.sha256:
            raise ValueError(f"{self.file} changed since the mutants were drawn; draw again in another --work folder")
        mutated = _mutated(text, self.operator, self.occurrence)
        if mutated is None:
            raise ValueError(f"{self.file} has no mutation {self.occurrence} of {self.operator}; draw again")
        return mutated


def fingerprint(root: Path, file: str) -> str:
    """The hash of a file that `Mutant.sha256` is compared with."""
    return _hash((root / file).read_text(encoding="utf-8"))


def draw(root: Path, files: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants at different places, or fewer if there are fewer places. The same for the same seed and files."""
    random = Random(seed)
    texts = {file: (root / file).read_text(encoding="utf-8") for file in files}
    places = [(file, at, found) for file in files for at, found in sorted(_places(texts[file]).items())]
    random.shuffle(places)
    drawn: list[Mutant] = []
    for file, (start, _), mutations in places:
        if len(drawn) == count:
            break
        random.shuffle(mutations)
        for operator, occurrence in mutations:
            if _changes(texts[file], _mutated(texts[file], operator, occurrence)):
                drawn.append(Mutant(len(drawn), file, operator, occurrence, start[0], _hash(texts[file])))
                break
    return drawn


def _places(text: str) -> dict[tuple[Position, Position], list[tuple[str, int]]]:
    """The mutations, as an operator's name and an occurrence, of each place that may be mutated."""
    from cosmic_ray.ast import ast_nodes, get_ast

    excluded = list(_excluded(text))
    nodes = list(ast_nodes(get_ast(text)))
    found: dict[tuple[Position, Position], list[tuple[str, int]]] = {}
    for name, operator in _operators().items():
        at = (place for node in nodes for place in operator.mutation_positions(node))
        for occurrence, (start, end) in enumerate(at):
            if not any(first <= start and end <= last for first, last in excluded):
                found.setdefault((start, end), []).append((name, occurrence))
    return found


@cache
def _operators() -> dict[str, Any]:
    """cosmic-ray's operators that need no arguments and change something."""
    from cosmic_ray.plugins import get_operator, operator_names

    classes = {name: get_operator(name) for name in sorted(operator_names())}
    return {name: made() for name, made in classes.items() if not made.arguments() and not name.endswith("NoOp")}


def _mutated(text: str, operator: str, occurrence: int) -> str | None:
    from cosmic_ray.mutating import mutate_code

    mutated: str | None = mutate_code(text, _operators()[operator], occurrence)
    return mutated


def _changes(text: str, mutated: str | None) -> bool:
    if mutated is None:
        return False
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def _excluded(text: str) -> Iterator[tuple[Position, Position]]:
    """Start and end of what no test should notice: annotations, `__all__` and the text of errors."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            yield _span(text, node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            yield _span(text, node.returns)
        elif isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            yield _span(text, node)
        elif isinstance(node, ast.Raise):
            yield from (_span(text, part) for part in ast.walk(node) if isinstance(part, ast.JoinedStr))


def _span(text: str, node: ast.expr | ast.stmt) -> tuple[Position, Position]:
    """ast counts columns in bytes."""
    lines = text.splitlines()

    def position(line: int, column: int) -> Position:
        return line, len(lines[line - 1].encode()[:column].decode())

    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return position(node.lineno, node.col_offset), position(node.end_lineno, node.end_col_offset)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
