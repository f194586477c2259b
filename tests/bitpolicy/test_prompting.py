"""Prompts are read as people write them, and split so that no part sees another part's samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.prompting import Split, default_requests, load_requests, split

SIZES = {"calibration": 16, "search": 16, "confirm": 8, "held_out": 12}


def parts(found: Split) -> dict[str, set[tuple[str, int]]]:
    return {name: {(s.prompt, s.seed) for s in getattr(found, name)} for name in SIZES}


def prompts_of(found: Split, name: str) -> set[str]:
    return {sample.prompt for sample in getattr(found, name)}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 11, 32, 100])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_no_two_parts_share_a_sample(count: int, seed: int) -> None:
    found = split([f"prompt {i}" for i in range(count)], seed, **SIZES)
    together = parts(found)
    assert {name: len(samples) for name, samples in together.items()} == SIZES  # and none twice in a part
    assert len(set.union(*together.values())) == sum(SIZES.values())
    seeds = [sample.seed for name in SIZES for sample in getattr(found, name)]
    assert len(seeds) == len(set(seeds))


@pytest.mark.parametrize("count", [8, 9, 10, 11, 32, 100])
def test_with_eight_or_more_prompts_each_part_has_its_own(count: int) -> None:
    found = split([f"prompt {i}" for i in range(count)], 0, **dict.fromkeys(SIZES, 200))
    assert found.by_prompt
    calibration, search, held_out = (prompts_of(found, name) for name in ("calibration", "search", "held_out"))
    assert calibration | search | held_out == {f"prompt {i}" for i in range(count)}
    assert len(calibration) + len(search) + len(held_out) == count
    assert len(search) == len(held_out) == count // 4
    assert prompts_of(found, "confirm") == calibration


@pytest.mark.parametrize("count", [1, 7])
def test_with_fewer_than_eight_prompts_the_parts_share_them(count: int) -> None:
    every = {f"prompt {i}" for i in range(count)}
    found = split(sorted(every), 0, **SIZES)
    assert not found.by_prompt
    assert all(prompts_of(found, name) == every for name in SIZES)


def test_the_seed_determines_the_split() -> None:
    prompts = [f"prompt {i}" for i in range(32)]
    assert split(prompts, 3, **SIZES) == split(prompts, 3, **SIZES)
    assert prompts_of(split(prompts, 3, **SIZES), "held_out") != prompts_of(split(prompts, 4, **SIZES), "held_out")
    seeds = [{s.seed for s in split(prompts, seed, **SIZES).calibration} for seed in (3, 4)]
    assert seeds[0].isdisjoint(seeds[1])


def test_a_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("  red heart \r\n\n pizza\ncafé ☕\npizza\n".encode())
    assert load_requests(tmp_path / "prompts.txt") == ["red heart", "pizza", "café ☕"]


@pytest.mark.parametrize("bundled", [True, False])
def test_the_built_in_lists_have_enough_prompts_for_parts(toy_pipeline: Any, bundled: bool) -> None:
    prompts = default_requests(toy_pipeline, bundled)
    assert len(prompts) >= 16
    assert len(set(prompts)) == len(prompts)
    assert split(prompts, 0, **SIZES).by_prompt


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(BitPolicyError, match=r"--prompts .*prompts\.txt.* one.* line"):
        load_requests(tmp_path / "prompts.txt")
