"""Where a pipeline comes from, and in which dtype it is stored and computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import load_source, source_of, storage_dtype


@pytest.fixture(scope="module")
def saved_as(
    half_pipeline: Callable[[], Any], toy: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[torch.dtype], Path]:
    """The folder of the toy pipeline with its U-Net in a dtype."""

    def save(dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "toy"
        shutil.copytree(toy, folder)
        torch.nn.Module.to(unet := half_pipeline().unet, dtype).save_pretrained(folder / "unet")
        assert unet.dtype == dtype
        return folder

    return save


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
def test_the_storage_dtype_is_that_of_the_file_and_float16_for_float32(
    saved_as: Any, stored: torch.dtype, expected: torch.dtype
) -> None:
    folder = saved_as(stored)
    assert storage_dtype(folder) == expected
    assert load_source(str(folder), device="cpu").storage == expected


def test_on_the_cpu_it_computes_in_float32_with_the_stored_values(toy: Path) -> None:
    source = load_source(str(toy), device="cpu")
    assert (source.components, source.id, source.revision) == (["unet"], str(toy), None)
    assert {p.dtype for p in source.target.parameters()} == {torch.float32}
    assert all(torch.equal(p, p.half().float()) for p in source.target.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_computes_in_the_requested_dtype(toy: Path, dtype: str) -> None:
    source = load_source(str(toy), dtype=dtype, device="cpu")
    assert source.target.dtype == getattr(torch, dtype)
    assert source.storage == torch.float16


def test_a_hub_model_is_downloaded_and_keeps_its_id(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(model: str, **arguments: Any) -> str:
        asked.append((model, arguments))
        return str(toy)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    source = load_source("owner/name", revision="v1", device="cpu")
    assert asked == [("owner/name", {"revision": "v1", "variant": None})]
    assert (source.id, source.revision) == ("owner/name", "v1")


def test_a_folder_takes_precedence_over_a_hub_id_of_the_same_name(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy, tmp_path / "owner" / "name")
    assert load_source("owner/name", device="cpu").id == "owner/name"


def test_a_pipeline_in_memory_is_rounded_to_its_storage_dtype(new_toy_pipeline: Callable[[], Any]) -> None:
    pipe = new_toy_pipeline()
    source = source_of(pipe)
    assert source.storage == torch.float16
    assert source.pipe is pipe
    assert all(torch.equal(p, p.half().float()) for p in pipe.unet.parameters())


def test_a_value_that_float16_cannot_hold_is_refused(new_toy_pipeline: Callable[[], Any]) -> None:
    pipe = new_toy_pipeline()
    pipe.unet.conv_out.bias.data[0] = 1e6
    with pytest.raises(BitPolicyError, match=r"conv_out\.bias has values that .*float16 cannot hold.* bfloat16"):
        source_of(pipe)
