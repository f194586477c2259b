"""Type-checks the package in its installed layout.

The folders `kernels/`, `policies/`, `sensitivity/` and `search/` become subpackages of `bitpolicy` only when installed,
which mypy cannot know. This script lays out `build/typing/bitpolicy/` as symlinks to the real files and runs mypy
there. It prints mypy's findings with the real paths and exits with mypy's exit code.

    python scripts/check_types.py [mypy options]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "typing"
LAYERS = ("kernels", "policies", "sensitivity", "search")


def lay_out(tree: Path = TREE) -> None:
    """Rebuild `tree/bitpolicy/` from the entries of `bitpolicy/` and the layer folders."""
    shutil.rmtree(tree, ignore_errors=True)
    package = tree / "bitpolicy"
    package.mkdir(parents=True)
    for source in [*(ROOT / "bitpolicy").iterdir(), *(ROOT / layer for layer in LAYERS)]:
        (package / source.name).symlink_to(source, target_is_directory=source.is_dir())


def real_paths(report: str) -> str:
    """mypy's report with the symlinks replaced by the files that they point to."""
    linked = tuple(f"bitpolicy/{layer}/" for layer in LAYERS)
    lines = report.splitlines(keepends=True)
    return "".join(line.removeprefix("bitpolicy/") if line.startswith(linked) else line for line in lines)


def main(options: list[str]) -> int:
    lay_out()
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    # From inside the tree: mypy searches the working directory first, and the root holds a bitpolicy/ without layers.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *config, *options, "-p", "bitpolicy"],
        cwd=TREE,
        env={**os.environ, "MYPYPATH": str(TREE)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(real_paths(checked.stdout), end="")
    return checked.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
