"""Draw docs/layers.svg: the layers of the code, which imports which, and the number of lines in each.

Blank lines, comments and docstrings do not count. Prints the same numbers as a table.

    python scripts/draw_layers.py
    python scripts/draw_layers.py elsewhere.svg
"""

from __future__ import annotations

import argparse
import ast
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    "kernels": "formats, packing, packed layers",
    "policies": "policy file, bytes, checkpoints, diffusers",
    "sensitivity": "inventory, trajectories, probes",
    "search": "budget, exact solver, study, quality",
    "bitpolicy": "Python API and command line",
}
ASIDE = ("tests", "scripts")
_BOX_WIDTH, _BOX_HEIGHT, _STEP, _LEFT = 380, 52, 84, 150


@dataclass
class Counted:
    """One folder: number of files, lines of code, and the imports of other layers (layer -> import statements)."""

    files: int = 0
    lines: int = 0
    imports: dict[str, int] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "target",
        type=Path,
        nargs="?",
        default=ROOT / "docs" / "layers.svg",
        help="picture to write; default: docs/layers.svg",
    )
    target: Path = parser.parse_args().target
    counted = {name: count(ROOT / name) for name in (*LAYERS, *ASIDE)}
    for name, folder in counted.items():
        uses = ", ".join(f"{layer} ({n})" for layer, n in sorted(folder.imports.items()))
        print(f"{name:<12} {folder.files:>3} files {folder.lines:>6} lines   imports {uses or 'nothing of ours'}")
    files, lines = (sum(getattr(counted[name], what) for name in LAYERS) for what in ("files", "lines"))
    print(f"{'package':<12} {files:>3} files {lines:>6} lines")
    target.write_text(draw(counted))


def count(folder: Path) -> Counted:
    """Count the Python files below `folder`, their lines and their imports."""
    result = Counted()
    for path in sorted(folder.rglob("*.py")):
        result.files += 1
        tree = ast.parse(path.read_text())
        result.lines += len(_code_lines(path) - _docstring_lines(tree))
        for node in ast.walk(tree):
            layer = _layer(node.module) if isinstance(node, ast.ImportFrom) and node.module else None
            if layer and layer != folder.name:
                result.imports[layer] = result.imports.get(layer, 0) + 1
    return result


def _layer(module: str) -> str | None:
    root, *rest = module.split(".")
    if root != "bitpolicy":
        return None
    return rest[0] if rest and rest[0] in LAYERS else "bitpolicy"


def _code_lines(path: Path) -> set[int]:
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as file:
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in silent and t.type != tokenize.ENCODING]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def draw(counted: dict[str, Counted]) -> str:
    """The picture as SVG: one box per layer, the lowest layer at the bottom, and arrows to the imported layers."""
    names = list(reversed(LAYERS))
    y = {name: 20 + _STEP * i for i, name in enumerate(names)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="{_STEP * len(names) + 10}" '
        'font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#57606a"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for name in names:
        for other in counted[name].imports:
            parts.append(_arrow(y[name], y[other], names.index(other) - names.index(name)))
    for name in names:
        parts.append(_box(name, LAYERS[name], counted[name], y[name]))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(start: float, end: float, distance: int) -> str:
    if distance == 1:
        x = _LEFT + _BOX_WIDTH / 2
        path = f"M{x} {start + _BOX_HEIGHT} L{x} {end - 1}"
    else:
        x, bend = _LEFT, _LEFT - 28 * distance
        path = f"M{x} {start + 30} C{bend} {start + 30} {bend} {end + 22} {x - 1} {end + 22}"
    return f'<path d="{path}" fill="none" stroke="#57606a" stroke-width="1.3" marker-end="url(#head)"/>'


def _box(name: str, about: str, folder: Counted, y: float) -> str:
    return (
        f'<rect x="{_LEFT}" y="{y}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="6" '
        'fill="#f6f8fa" stroke="#57606a"/>'
        f'<text x="{_LEFT + 14}" y="{y + 22}" font-size="15" font-weight="bold">{name}/</text>'
        f'<text x="{_LEFT + 14}" y="{y + 41}" font-size="12" fill="#57606a">{about}</text>'
        f'<text x="{_LEFT + _BOX_WIDTH - 14}" y="{y + 22}" font-size="12" text-anchor="end">{folder.lines} lines</text>'
    )


if __name__ == "__main__":
    main()
