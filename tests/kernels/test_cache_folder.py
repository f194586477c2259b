"""The cache must belong to the user: folders that others own or can write to are not used, nor is a missing home."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitpolicy.kernels import cache_folder as module
from bitpolicy.kernels.cache_folder import cache_folder, is_own, keep

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no owners here")


@pytest.fixture(autouse=True)
def no_warning_printed_yet() -> Iterator[None]:
    module._private.cache_clear()
    yield
    module._private.cache_clear()


def test_the_user_can_choose_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("BITPOLICY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bitpolicy"


def test_a_folder_writable_by_others_is_replaced_by_a_private_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("BITPOLICY_CACHE", str(shared))
    first, second = cache_folder(), cache_folder()
    assert first == second != shared
    assert first.stat().st_mode & 0o077 == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert f"write to {shared}" in line
    assert "BITPOLICY_CACHE" in line


def test_a_missing_folder_is_judged_by_its_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("BITPOLICY_CACHE", str(shared / "new" / "deeper"))
    shared.chmod(0o777)
    assert cache_folder() != shared / "new" / "deeper"
    shared.chmod(0o1777)  # like /tmp: others may make files there, and cannot touch ours
    assert cache_folder() == shared / "new" / "deeper"


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITPOLICY_CACHE", str(tmp_path))
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert is_own(tmp_path) == (owner == 0)  # root may write anywhere
    if owner != 0:
        assert cache_folder() != tmp_path


def test_a_user_without_a_home_directory_gets_a_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BITPOLICY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder().is_dir()
    assert "there is no home directory" in capsys.readouterr().err


def test_files_written_to_the_cache_count_as_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert keep(path, b"content")
    assert path.read_bytes() == b"content"
    assert is_own(path)
    path.chmod(0o606)
    assert not is_own(path)
