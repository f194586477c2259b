"""An output is complete or missing, and the file that it replaces stays until then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitpolicy.policies.storage.atomic import folder_written_aside, write_text, written_aside


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "a").write_text(text)
    (folder / "deep").mkdir()
    (folder / "deep" / "b").write_text(text)


def stop_half_way(path: Path, write: Callable[[Path], object], error: type[BaseException] = RuntimeError) -> None:
    with written_aside(path) as aside:
        write(aside)
        raise error


@pytest.mark.parametrize("before", ["nothing", "file"])
def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path, before: str) -> None:
    path = tmp_path / "out" / "file"
    if before == "file":
        write_text(path, "old")
    with written_aside(path) as aside:
        aside.write_text("new")
        assert not path.exists() or path.read_text() == "old"
    assert tree(tmp_path) == {"out/file": "new"}


@pytest.mark.parametrize("before", ["nothing", "empty folder", "full folder"])
def test_a_folder_takes_its_place_when_it_is_complete(tmp_path: Path, before: str) -> None:
    path = tmp_path / "folder"
    if before == "empty folder":
        path.mkdir()
    if before == "full folder":
        fill(path, "old")
        (path / "only here before").write_text("old")
    with written_aside(path) as aside:
        fill(aside, "new")
    assert tree(tmp_path) == {"folder/a": "new", "folder/deep/b": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        stop_half_way(path, lambda aside: aside.write_text("half"), error)
    assert tree(tmp_path) == {"file": "old"}


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(RuntimeError):
        stop_half_way(tmp_path / "folder", lambda aside: fill(aside, "half"))
    assert tree(tmp_path) == {"folder/a": "old", "folder/deep/b": "old"}


def test_a_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        stop_half_way(tmp_path / "folder", lambda aside: fill(aside, "half"))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    fill(tmp_path / ".folder.bitpolicy-partial", "half")
    fill(tmp_path / ".folder.bitpolicy-old", "older")
    fill(tmp_path / "folder", "old")
    with written_aside(tmp_path / "folder") as aside:
        assert not aside.exists()
        fill(aside, "new")
    assert tree(tmp_path) == {"folder/a": "new", "folder/deep/b": "new"}


def test_a_folder_that_was_moved_out_of_the_way_comes_back(tmp_path: Path) -> None:
    """A process was killed between moving the old folder away and moving the new one in."""
    fill(tmp_path / ".folder.bitpolicy-old", "old")
    fill(tmp_path / ".folder.bitpolicy-partial", "new")
    with pytest.raises(RuntimeError):
        stop_half_way(tmp_path / "folder", lambda aside: fill(aside, "half"))
    assert tree(tmp_path) == {"folder/a": "old", "folder/deep/b": "old"}


@pytest.mark.parametrize("where", ["a file", "a folder", "/", "nowhere", "itself"])
def test_a_link_in_place_of_a_file_is_replaced_and_its_target_is_left_alone(tmp_path: Path, where: str) -> None:
    (tmp_path / "a file").write_text("of somebody else")
    (tmp_path / "a folder").mkdir()
    path = tmp_path / "result.json"
    path.symlink_to(path.name if where == "itself" else tmp_path / where)
    write_text(path, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert (tmp_path / "a file").read_text() == "of somebody else"
    assert {entry.name for entry in tmp_path.iterdir()} == {"a file", "a folder", "result.json"}


def test_a_folder_behind_a_link_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    with folder_written_aside(tmp_path / "link") as aside:
        fill(aside, "new")
    assert (tmp_path / "link" / "a").read_text() == "new"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_working_directory_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with written_aside(Path()) as aside:
        fill(aside, "new")
    assert tree(tmp_path) == {"here/a": "new", "here/deep/b": "new"}


def test_a_folder_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with written_aside(tmp_path / "out") as aside:
        fill(aside, "new")
    assert tree(tmp_path) == {"out/a": "new", "out/deep/b": "new"}


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "Größe ≤ 3 GB")
    assert (tmp_path / "file").read_bytes() == "Größe ≤ 3 GB".encode()


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with written_aside(tmp_path / "tensors") as aside:
        save_file({"a": torch.zeros(2)}, aside)
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
