"""The compiled library: where it is stored, when it is rebuilt, and what happens if it cannot be built."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bitpolicy.kernels import dispatch
from bitpolicy.kernels.compute.int8 import int8_product
from bitpolicy.kernels.cpu import extension as cpu_extension
from bitpolicy.kernels.cpu.extension import Unavailable, build, find_compiler
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.kernel import Compute, PackedWeight

ROOT = Path(__file__).resolve().parents[2]


def _has_compiler() -> bool:
    try:
        find_compiler()
    except Unavailable:
        return False
    return True


needs_compiler = pytest.mark.skipif(not _has_compiler(), reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, with no library loaded yet."""
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path / "cache"))
    cpu_extension._loaded.cache_clear()
    yield tmp_path / "cache"
    cpu_extension._loaded.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources that compile quickly and define the expected names."""
    functions = tuple(cpu_extension._SIGNATURES)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "small.cpp").write_text("".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in functions))
    monkeypatch.setattr(cpu_extension, "SOURCES", folder)
    return folder


def compiler(folder: Path, script: str) -> str:
    """A compiler command that runs `script`."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("kernels-*.so"))


@needs_compiler
def test_it_is_compiled_only_once(fresh: Path, small: Path) -> None:
    build()
    (path,) = libraries(fresh)
    written = path.stat().st_mtime_ns
    build()
    assert [p.stat().st_mtime_ns for p in libraries(fresh)] == [written]
    assert list(fresh.iterdir()) == [path]  # the build leaves nothing else behind


@needs_compiler
def test_changed_sources_give_another_library(fresh: Path, small: Path) -> None:
    build()
    with open(small / "small.cpp", "a") as source:
        source.write("// changed\n")
    build()
    assert len(libraries(fresh)) == 2


@needs_compiler
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda _: b"", lambda c: c[:-1] + b"x"])
def test_a_damaged_library_in_the_cache_is_built_again(
    fresh: Path, small: Path, damage: Callable[[bytes], bytes]
) -> None:
    build()
    (path,) = libraries(fresh)
    sound = path.read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(damage(sound))
    assert Path(build()._name).read_bytes() == sound


@needs_compiler
def test_a_library_writable_by_others_is_not_loaded(fresh: Path, small: Path) -> None:
    build()
    (path,) = libraries(fresh)
    path.chmod(0o666)
    assert not cpu_extension._is_sound(path)
    build()
    assert path.stat().st_mode & 0o022 == 0


@needs_compiler
def test_two_processes_may_build_it_at_once(
    fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = " ".join(find_compiler())
    together = f'touch {tmp_path}/$PPID; while [ $(ls {tmp_path} | grep -c "^[0-9]") -lt 2 ]; do sleep 0.1; done'
    monkeypatch.setenv("CXX", compiler(tmp_path, f'{together}\nexec {real} "$@"'))
    code = (
        "import sys, pathlib; from bitpolicy.kernels.cpu import extension as e; e.SOURCES = pathlib.Path(sys.argv[1]);"
    )
    command = [sys.executable, "-c", f"{code} sys.exit(e.main())", str(small)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].strip() for process in both]
    (path,) = libraries(fresh)
    assert [process.returncode for process in both] == [0, 0]
    assert said == [str(path)] * 2
    assert list(fresh.iterdir()) == [path]


@needs_compiler
def test_a_compiler_without_openmp_is_sufficient(
    fresh: Path, small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = " ".join(find_compiler())
    script = f'case " $* " in *" -fopenmp "*) echo "error: no OpenMP" >&2; exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    assert cpu_extension.library() is not None


def test_a_missing_compiler_is_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert cpu_extension.library() is None
    assert "no C++ compiler: found none of c++, g++, clang++" in str(cpu_extension.why_unavailable())
    assert cpu_extension.main() == 1


def test_a_failing_compilers_message_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, 'echo "cc1plus: error: out of luck" >&2; exit 1'))
    assert cpu_extension.library() is None
    assert "cc1plus: error: out of luck" in str(cpu_extension.why_unavailable())


@needs_compiler
def test_an_unwritable_cache_is_named(fresh: Path, small: Path) -> None:
    fresh.write_text("a file where the folder should be")
    assert cpu_extension.library() is None
    assert f"cannot write to the cache folder {fresh}" in str(cpu_extension.why_unavailable())


def test_without_the_library_other_kernels_compute_the_same(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    torch.manual_seed(0)
    x, bias = torch.randn(5, 70), torch.randn(9)
    for name in ("int4", "int8"):
        format = format_named(name)
        weight = PackedWeight(format, (9, 70), format.quantize(torch.randn(9, 70)))
        for compute in (Compute.EXACT, Compute.INT8):
            able = [row.kernel.name for row in dispatch.kernels(compute) if row.refuses(x, weight) is None]
            assert able
            assert not {"cpu-dequantize", "cpu-int8"} & set(able)
        y = dispatch.run(dispatch.choose(x, weight, bias, Compute.INT8), x, weight, bias)
        torch.testing.assert_close(y, int8_product(x, weight, bias), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_openmp_is_the_library_that_torch_loaded() -> None:
    """With two OpenMP libraries, idle threads would spin against each other."""
    build()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/libgomp" in line}
    assert len(loaded) <= 1, loaded


def test_the_processor_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_extension, "_run", lambda command: "one version")
    key = cpu_extension._key(["c++"], [])
    monkeypatch.setattr(cpu_extension, "_processor", lambda: "another")
    assert cpu_extension._key(["c++"], []) != key
