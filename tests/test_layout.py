"""The shape of the project: who imports whom, what a wheel holds, and what no file may do.

Each check is a function of a tree that returns its complaints, so that the tests below can also hand it a tree that is
wrong and see it complain.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "policies", "sensitivity", "search")  # each may import from itself and from those before it
FOLDERS = (*LAYERS, "bitpolicy")
UNPACKAGED = ("scripts", "tests")


# The tree


@dataclass(frozen=True)
class Module:
    """One source file under the name it is imported by."""

    name: str
    path: Path

    @property
    def layer(self) -> int:
        """Its place in `FOLDERS`; the public API and the CLI are the last."""
        return FOLDERS.index(layer_folder(self.name))

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), str(self.path))


def layer_folder(name: str) -> str:
    """`bitpolicy.kernels.int4` lies in `kernels`, `bitpolicy.cli.main` in `bitpolicy`."""
    second = name.split(".")[1] if "." in name else ""
    return second if second in LAYERS else "bitpolicy"


def modules(root: Path) -> dict[str, Module]:
    """Every module of the package, by name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(parts if folder == "bitpolicy" else ("bitpolicy", *parts))
            found[name] = Module(name, path)
    return found


def source_files(root: Path) -> list[Path]:
    """What a clone would hold, relative to `root`: git's answer in a checkout, elsewhere all but what builds leave."""
    if (root / ".git").exists() and shutil.which("git"):
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(listing, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
        return [Path(name) for name in names if name and (root / name).is_file()]
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return [path for path in found if not any(map(_left_behind, path.parts)) and path.parts[0] not in ("build", "dist")]


def _left_behind(part: str) -> bool:
    return part.startswith(".") or part in ("__pycache__", "venv") or part.endswith((".egg-info", ".pyc"))


# The imports


def imported(module: Module, known: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Line and target of each import of our own code, wherever it stands, `import_module("...")` included."""
    for node in ast.walk(module.tree()):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module and _ours(node.module):
            below = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((node.lineno, name if name in known else node.module) for name in below)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from ((node.lineno, name) for name in constants if _ours(name))


def _ours(name: str) -> bool:
    return name.split(".")[0] in (*FOLDERS, *UNPACKAGED)


def misspelt_imports(root: Path) -> list[str]:
    """Imports of our own code that are not written `from bitpolicy.kernels.int4 import Int4`, and TYPE_CHECKING."""
    complaints = []
    known = modules(root)
    for module in known.values():
        at = module.path.relative_to(root)
        for node in ast.walk(module.tree()):
            if isinstance(node, ast.ImportFrom) and node.level:
                complaints.append(f"{at}:{node.lineno}: relative import; write `from bitpolicy...`")
            elif isinstance(node, ast.Import) and any(_ours(alias.name) for alias in node.names):
                complaints.append(f"{at}:{node.lineno}: `{ast.unparse(node)}`; write `from bitpolicy... import ...`")
            elif "TYPE_CHECKING" in (getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "name", "")):
                line = getattr(node, "lineno", 0)
                complaints.append(f"{at}:{line}: TYPE_CHECKING hides an import; move what both sides need down a layer")
        for line, target in imported(module, known):
            if not target.startswith("bitpolicy"):
                complaints.append(f"{at}:{line}: {target} is no part of the installed package; only `bitpolicy...` is")
            elif target not in known:
                complaints.append(f"{at}:{line}: there is no module {target}")
    return sorted(set(complaints))


def upward_imports(root: Path) -> list[str]:
    """Imports from a layer above one's own."""
    known = modules(root)
    return [
        f"{module.path.relative_to(root)}:{line}: {module.name} -> {target}, "
        f"but {layer_folder(module.name)} may import only from {', '.join(FOLDERS[: module.layer + 1])}"
        for module in known.values()
        for line, target in imported(module, known)
        if target in known and known[target].layer > module.layer
    ]


def import_cycles(root: Path) -> list[str]:
    """One cycle among the modules, as a chain, if there is any."""
    known = modules(root)
    graph = {name: sorted({target for _, target in imported(module, known)}) for name, module in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


# What no file may do: run code that a data file brings along

UNSAFE = {
    *(f"{name}.{call}" for name in ("pickle", "cloudpickle", "dill") for call in ("load", "loads", "Unpickler")),
    *("marshal.load", "marshal.loads", "joblib.load", "shelve.open", "pandas.read_pickle"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
}
SAFE_WHEN = {  # call -> what the keyword arguments, as source, have to say
    "torch.load": lambda given: given.get("weights_only") == "True",
    "torch.serialization.load": lambda given: given.get("weights_only") == "True",
    "yaml.load": lambda given: given.get("Loader", "").endswith("SafeLoader"),
    "yaml.load_all": lambda given: given.get("Loader", "").endswith("SafeLoader"),
    "numpy.load": lambda given: given.get("allow_pickle", "False") == "False",
}


def unsafe_loads(root: Path) -> list[str]:
    """Uses of what can run a data file's code, whatever name it was imported under; to pass one on is to use it."""
    complaints = []
    for module in modules(root).values():
        tree = module.tree()
        names = dict(_import_names(tree))
        safe = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_safe(node, names)}
        for node in ast.walk(tree):
            used = _full_name(node, names)
            if (used in UNSAFE or used in SAFE_WHEN) and id(node) not in safe:
                at = f"{module.path.relative_to(root)}:{node.lineno}"
                complaints.append(f"{at}: {used} can run code from the file; use safetensors, JSON or yaml.safe_load")
    return complaints


def _import_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The name an import binds, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.asname, a.name) if a.asname else (a.name.split(".")[0],) * 2 for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((a.asname or a.name, f"{node.module}.{a.name}") for a in node.names)


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := _full_name(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def _is_safe(call: ast.Call, names: dict[str, str]) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
    return SAFE_WHEN.get(_full_name(call.func, names), lambda _: False)(given)


# The wheel


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of `tree` with the setuptools at hand, so without the network."""
    call = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    built = subprocess.run([sys.executable, "-c", call, str(out)], cwd=tree, capture_output=True, text=True)
    assert built.returncode == 0, f"the {kind} does not build:\n{built.stdout[-2000:]}\n{built.stderr[-4000:]}"
    return out / built.stdout.splitlines()[-1]


def copy_tree(root: Path, to: Path) -> Path:
    for name in source_files(root):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, to / name)
    return to


def packaged(tree: Path) -> set[str]:
    """The names that the files of the five folders have in a wheel: every file, not only the sources."""
    names = (name for name in source_files(tree) if name.parts[0] in FOLDERS)
    return {(name if name.parts[0] == "bitpolicy" else "bitpolicy" / name).as_posix() for name in names}


def wheel_complaints(tree: Path, wheel: Path) -> list[str]:
    shipped = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name and not name.endswith("/")}
    expected = packaged(tree)
    return [
        *(f"{name} is not in the wheel; name its package or pattern in pyproject.toml" for name in expected - shipped),
        *(f"{name} is in the wheel, but not in the tree" for name in shipped - expected),
    ]


# The tests of this tree


def test_imports_point_down_the_layers() -> None:
    assert upward_imports(ROOT) == []


def test_modules_do_not_import_in_a_circle() -> None:
    assert import_cycles(ROOT) == []


def test_imports_of_our_own_code_are_absolute_and_in_the_open() -> None:
    assert misspelt_imports(ROOT) == []


def test_no_file_loads_what_can_run_code() -> None:
    assert unsafe_loads(ROOT) == []


@pytest.mark.parametrize(
    "folder", [*FOLDERS, "bitpolicy/cli", "bitpolicy/report", "policies/exporters", "sensitivity/calls"]
)
def test_every_folder_has_sources(folder: str) -> None:
    assert list((ROOT / folder).glob("*.py")), f"{folder}/ holds no module"


def test_every_configured_folder_exists() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    folders = {*tools["pytest"]["ini_options"]["testpaths"], *tools["setuptools"]["package-dir"].values()}
    assert [folder for folder in sorted(folders | set(UNPACKAGED)) if not (ROOT / folder).is_dir()] == []


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_not_a_regular_package(layer: str) -> None:
    """With the root on sys.path, a `kernels/__init__.py` here would be taken for Hugging Face's `kernels`."""
    assert not (ROOT / layer / "__init__.py").exists()


def test_a_wheel_holds_the_whole_tree_and_nothing_else(tmp_path: Path) -> None:
    tree = copy_tree(ROOT, tmp_path / "tree")
    expected = packaged(tree)  # before building, which leaves a build/ behind
    assert expected
    assert wheel_complaints(tree, build("wheel", tree, tmp_path / "dist")) == []
    assert packaged(tree) == expected


# The tests of the checks: a small tree, right but for one thing


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A tree in our layout, with a module in each folder, that passes every check."""
    root = tmp_path / "small"
    above = "bitpolicy.kernels.formats.format"
    for layer in LAYERS:
        write(root, f"{layer}/first.py", f"from {above} import name\n")
        above = f"bitpolicy.{layer}.first"
    write(root, "kernels/formats/format.py", "name = 1\n")
    write(root, "bitpolicy/__init__.py", "from bitpolicy.search.first import name\n")
    write(root, "bitpolicy/py.typed", "")
    write(root, "bitpolicy/models/emoji/unet/config.json", "{}")
    write(root, "bitpolicy/cli/main.py", "import yaml\n\nyaml.safe_load('1')\n")
    write(root, "bitpolicy/report/page.py", "")
    write(root, "policies/exporters/comfy.py", "")
    write(root, "sensitivity/calls/form.py", "")
    write(root, "README.md", "")
    shutil.copyfile(ROOT / "pyproject.toml", root / "pyproject.toml")
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def all_complaints(root: Path) -> list[str]:
    return [*upward_imports(root), *import_cycles(root), *misspelt_imports(root), *unsafe_loads(root)]


def test_a_tree_that_keeps_the_rules_passes(small: Path) -> None:
    assert all_complaints(small) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        (
            "kernels/bad.py",
            "from bitpolicy.policies.first import name",
            "bitpolicy.kernels.bad -> bitpolicy.policies.first",
        ),
        (
            "search/bad.py",
            "from bitpolicy import name",
            "bitpolicy.search.bad -> bitpolicy, but search may import only",
        ),
        (
            "policies/bad.py",
            "def f():\n    from bitpolicy.search import first",
            "policies/bad.py:2: bitpolicy.policies.bad",
        ),
        ("kernels/bad.py", "f = import_module('bitpolicy.search.first')", "-> bitpolicy.search.first"),
        ("kernels/bad.py", "from .first import name", "kernels/bad.py:1: relative import"),
        ("kernels/bad.py", "import bitpolicy.kernels.first", "write `from bitpolicy... import"),
        ("kernels/bad.py", "from kernels.first import name", "kernels.first is no part of the installed package"),
        ("search/bad.py", "from scripts.train import name", "scripts.train is no part of the installed package"),
        ("search/bad.py", "from bitpolicy.policies.gone import name", "there is no module bitpolicy.policies.gone"),
        ("search/bad.py", "from typing import TYPE_CHECKING", "TYPE_CHECKING hides an import"),
        ("search/bad.py", "import typing\nif typing.TYPE_CHECKING:\n    pass", "search/bad.py:2: TYPE_CHECKING"),
        ("search/bad.py", "import pickle\npickle.load(open('a'))", "search/bad.py:2: pickle.load can run code"),
        ("search/bad.py", "from pickle import loads as read\nread(b'')", "pickle.loads can run code"),
        ("search/bad.py", "import torch as t\nt.load('a')", "torch.load can run code"),
        ("search/bad.py", "import torch\ntorch.load('a', weights_only=False)", "torch.load can run code"),
        ("search/bad.py", "import torch\nread = torch.load", "torch.load can run code"),
        ("search/bad.py", "import yaml\nyaml.load('1', Loader=yaml.Loader)", "yaml.load can run code"),
        ("search/bad.py", "import yaml\nyaml.unsafe_load('1')", "yaml.unsafe_load can run code"),
        ("search/bad.py", "import numpy as np\nnp.load('a', allow_pickle=True)", "numpy.load can run code"),
    ],
)
def test_a_broken_rule_is_named(small: Path, name: str, text: str, complaint: str) -> None:
    write(small, name, f"{text}\n")
    assert any(complaint in found for found in all_complaints(small)), all_complaints(small)


def test_a_circle_is_named_in_the_order_of_its_imports(small: Path) -> None:
    write(small, "kernels/formats/format.py", "from bitpolicy.kernels import packing\n")
    write(small, "kernels/formats/packing.py", "def f():\n    from bitpolicy.kernels.first import name\n")
    (circle,) = import_cycles(small)
    names = [name.removeprefix("bitpolicy.kernels.") for name in circle.split(" -> ")]
    assert " ".join(names + names[1:]).count("first format packing first") == 1


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "import yaml\nyaml.load('1', Loader=yaml.CSafeLoader)",
        "import numpy as np\nnp.load('a')",
        "import json\njson.load(open('a'))",
    ],
)
def test_a_safe_load_is_let_through(small: Path, text: str) -> None:
    write(small, "search/fine.py", f"{text}\n")
    assert all_complaints(small) == []


def test_a_wheel_of_a_right_tree_has_no_complaints_even_by_way_of_an_sdist(small: Path, tmp_path: Path) -> None:
    sdist = build("sdist", small, tmp_path / "dist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked" / sdist.name.removesuffix(".tar.gz")
    assert packaged(unpacked) == packaged(small)
    assert wheel_complaints(small, build("wheel", unpacked, tmp_path / "dist")) == []


def test_a_package_or_a_data_file_that_no_list_names_is_missed_in_the_wheel(small: Path, tmp_path: Path) -> None:
    write(small, "search/solvers/exact.py", "")
    write(small, "bitpolicy/tables/sizes.csv", "")
    missing = wheel_complaints(small, build("wheel", small, tmp_path / "dist"))
    assert sorted(missing) == [
        "bitpolicy/search/solvers/exact.py is not in the wheel; name its package or pattern in pyproject.toml",
        "bitpolicy/tables/sizes.csv is not in the wheel; name its package or pattern in pyproject.toml",
    ]
