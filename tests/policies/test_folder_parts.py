"""A pipeline is exported from its folder, without being loaded, to the same files as from memory."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipeline_folders import differing, export, files, tensors
from safetensors.torch import load_file, save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.checkpoints.checkpoint import export_diffusers_model
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.loading.diffusers_files import skeleton
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.source import ModuleSource

F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "arguments"),
    [
        (F16, {}),
        (F32, {}),
        (F16, {"max_shard_size": "100KB"}),
        (F16, {"variant": "fp16"}),
        (F16, {"variant": "fp16", "max_shard_size": "100KB"}),
    ],
    ids=["one file", "float32", "shards", "a variant", "shards of a variant"],
)
def test_exports_from_the_folder_and_from_memory_are_the_same_files(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    folder = saved(dtype, **arguments)
    nbytes = export(exported, folder, tmp_path / "out", arguments.get("variant"))
    assert nbytes == exported.nbytes
    # what is a shard stays one, and only there the index differs from a file in memory
    sharded = [name for name in differing(tmp_path / "out", exported.folder) if "unet" not in name]
    assert all("max_shard_size" in arguments and name.split("/")[0] in ("vae", "text_encoder") for name in sharded)
    assert [name for name in differing(tmp_path / "out", exported.folder) if name.startswith("unet")] == []
    assert {n: t.sum() for n, t in tensors(tmp_path / "out").items()} == {
        n: t.sum() for n, t in tensors(exported.folder).items()
    }
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert loaded.vae.dtype == loaded.text_encoder.dtype == F16


def test_two_exports_are_the_same_files(exported: Any, half: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(exported, half, tmp_path / name, max_shard_size=50_000)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert len(list((tmp_path / "a" / "unet").glob("*.safetensors"))) > 2


def test_an_export_does_not_record_the_folder_that_the_pipeline_was_loaded_from(
    exported: Any, half: Path, tmp_path: Path
) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(half)
    export_pipeline(pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out")
    tokenizer = "tokenizer/tokenizer_config.json"  # transformers notes whether it was loaded from a folder
    assert differing(tmp_path / "out", exported.folder) in ([], ["bitpolicy.json", tokenizer])
    assert [name for name, content in files(tmp_path / "out").items() if str(half).encode() in content] == []


def test_only_files_of_the_pipeline_are_exported(exported: Any, half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(half, folder)
    for name in (
        "README.md",
        "model.ckpt",
        "vae/diffusion_pytorch_model.bin",
        "vae/x.msgpack",
        ".hidden",
        "vae/.hidden",
    ):
        (folder / name).write_text("not wanted")
    export(exported, folder, tmp_path / "out")
    assert differing(tmp_path / "out", exported.folder) == []


def test_a_link_out_of_the_folder_is_not_followed(exported: Any, half: Path, tmp_path: Path) -> None:
    folder, secret = tmp_path / "source", tmp_path / "secret.json"
    shutil.copytree(half, folder)
    secret.write_text("{}")
    (folder / "tokenizer" / "leak.json").symlink_to(secret)
    with pytest.raises(BitPolicyError, match=r"leak\.json is a link to .*secret\.json, outside .*remove the link"):
        export(exported, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_cache_are_followed_to_their_files(exported: Any, half: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    for i, path in enumerate(sorted(path for path in half.rglob("*") if path.is_file())):
        shutil.copyfile(path, blobs / str(i))
        link = folder / path.relative_to(half)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / str(i))
    export(exported, folder, tmp_path / "out")
    assert differing(tmp_path / "out", exported.folder) == []


def test_a_denoiser_with_old_names_of_attentions_is_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    model = diffusers.UNet2DModel(**config, **blocks)
    pipe = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert renamed.keys() != model.state_dict().keys()
    save_file(renamed, path, metadata={"format": "pt"})
    source = FolderParts(tmp_path).sources["unet"]
    assert source.specs.keys() == model.state_dict().keys()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(source.read(name), tensor)] == []


class Counted:
    """A source that counts its tensors in use."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._source = ModuleSource(model)
        self.held = self.most = 0

    @property
    def specs(self) -> Any:
        return self._source.specs

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name).clone()
        self.held += tensor.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(tensor.untyped_storage(), self._release, tensor.nbytes)
        return tensor

    def _release(self, nbytes: int) -> None:
        self.held -= nbytes


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_at_most_two_layers_are_held_at_once(new_toy_unet: Callable[[], Any], tmp_path: Path, name: str) -> None:
    unet = new_toy_unet().half()
    source = Counted(unet)
    choices = {layer: Choice(format_named(name) if name != "fp16" else FP16) for layer, _ in quantizable_layers(unet)}
    empty = skeleton("UNet2DConditionModel", dict(unet.config))
    export_diffusers_model(empty, choices, tmp_path, source=source, quantization=Quantization())
    largest = max(spec.nbytes for spec in source.specs.values())
    whole = sum(spec.nbytes for spec in source.specs.values())
    assert largest <= source.most <= 2 * largest + 1024 < whole / 2
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
