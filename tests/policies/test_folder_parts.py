"""A pipeline that is exported from its folder is written as it is from memory, without being loaded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_pipelines import TOYS

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies import folder_parts, linking
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.checkpoint import checkpoint_bytes, export_denoiser
from bitpolicy.policies.denoiser_files import skeleton
from bitpolicy.policies.export import export_parts, export_pipeline
from bitpolicy.policies.folder_parts import FolderParts, is_streamable
from bitpolicy.policies.parts import MemoryParts, Parts
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.source import ModuleSource, source_hash

F16, F32 = torch.float16, torch.float32
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def differing(one: Path, other: Path) -> list[str]:
    first, second = files(one), files(other)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@pytest.fixture(scope="module")
def saved(new_toy_pipeline: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved(dtype, **arguments)`: what save_pretrained writes of the pipeline that `exported` was made from."""

    def save(dtype: torch.dtype, **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp("saved") / "pipeline"
        pipe = new_toy_pipeline()
        for model in (pipe.unet, pipe.vae, pipe.text_encoder):
            torch.nn.Module.to(model, F16).to(dtype)
        pipe.tokenizer.backend_tokenizer.no_padding()  # of the last call of whatever test came before
        pipe.tokenizer.backend_tokenizer.no_truncation()
        pipe.save_pretrained(folder, **arguments)
        return folder

    return save


@pytest.fixture(scope="module")
def half(saved: Callable[..., Path]) -> Path:
    return saved(F16)


def export(exported: Any, folder: Path, out: Path, variant: str | None = None, **more: Any) -> int:
    parts = FolderParts(folder, "unet", variant)
    return export_parts(parts, exported.policy, exported.calibration, out, **more)


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
def test_both_roads_write_the_same_files(
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


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Of the other models."""
    paths = [path for name in ("vae", "text_encoder") for path in (folder / name).glob("*.safetensors")]
    return {f"{path.parent.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def test_two_exports_are_the_same_files(exported: Any, half: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(exported, half, tmp_path / name, max_shard_size=50_000)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert len(list((tmp_path / "a" / "unet").glob("*.safetensors"))) > 2


def test_a_pipeline_that_was_loaded_from_a_folder_does_not_tell_which(
    exported: Any, half: Path, tmp_path: Path
) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(half)
    export_pipeline(pipe, "unet", exported.policy, exported.calibration, tmp_path / "out")
    tokenizer = "tokenizer/tokenizer_config.json"  # transformers notes whether it was loaded from a folder
    assert differing(tmp_path / "out", exported.folder) in ([], [tokenizer])
    assert [name for name, content in files(tmp_path / "out").items() if str(half).encode() in content] == []


def test_nothing_but_the_pipeline_is_taken_along(exported: Any, half: Path, tmp_path: Path) -> None:
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


# Other components go along as they are


def test_weights_of_the_wanted_dtype_are_the_same_file_and_text_is_a_copy(
    exported: Any, half: Path, tmp_path: Path
) -> None:
    export(exported, half, tmp_path / "out")
    assert (tmp_path / "out" / VAE).samefile(half / VAE)
    assert (tmp_path / "out" / TEXT).samefile(half / TEXT)
    linked = [name for name in files(half) if (p := tmp_path / "out" / name).is_file() and p.samefile(half / name)]
    assert linked == sorted([TEXT, VAE])


def test_links_of_a_hub_cache_are_followed(exported: Any, half: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(half, blobs)
    for name in files(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, (snapshot / name).parent))
    export(exported, snapshot, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()] == []
    assert (tmp_path / "out" / VAE).samefile(blobs / VAE)
    assert differing(tmp_path / "out", exported.folder) == []


@pytest.mark.parametrize("why", ["an old safetensors", "a file system without links"])
def test_what_cannot_be_linked_is_copied(
    exported: Any, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if why == "an old safetensors":
        monkeypatch.setattr(linking, "version", lambda _: "0.7.0")
    else:
        monkeypatch.setattr(os, "link", refuse)
    export(exported, half, tmp_path / "out")
    assert not (tmp_path / "out" / VAE).samefile(half / VAE)
    assert differing(tmp_path / "out", exported.folder) == []


def test_saving_over_an_export_leaves_its_source_alone(exported: Any, half: Path, tmp_path: Path) -> None:
    """The installed safetensors renames what it wrote; it is why weights are linked."""
    before = (half / VAE).read_bytes()
    export(exported, half, tmp_path / "out")
    save_file({"a": torch.zeros(3)}, tmp_path / "out" / VAE)
    assert (half / VAE).read_bytes() == before


@pytest.mark.parametrize("stored", [F16, F32], ids=str)
@pytest.mark.parametrize("wanted", [F16, torch.bfloat16, F32], ids=str)
def test_the_bytes_of_other_components_are_those_that_were_predicted(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    folder = saved(stored)
    parts = FolderParts(folder, "unet")
    export_parts(parts, exported.policy, exported.calibration, tmp_path / "out", component_dtype=wanted)
    assert parts.others(wanted) == {n: checkpoint_bytes(tmp_path / "out" / n) for n in ("text_encoder", "vae")}
    assert parts.others(wanted) == MemoryParts(exported.pipe, "unet").others(wanted)
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {wanted}
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert loaded.text_encoder.dtype == wanted
    assert parts.to_write(wanted, tmp_path / "out") == (0 if stored == wanted else sum(parts.others(wanted).values()))


# What is refused


def test_pickles_are_refused_with_the_remedy(saved: Callable[..., Path]) -> None:
    for name in ("unet", "vae"):
        folder = saved(F16)
        weights = folder / name / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        assert not is_streamable(folder, "unet")
        with pytest.raises(BitPolicyError, match=rf"{name} has its weights only as .*\.bin, a pickle.*save_pretrained"):
            FolderParts(folder)


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, path, metadata={"format": "pt"})


def test_weights_that_do_not_fit_the_config_are_refused(saved: Callable[..., Path]) -> None:
    folder = saved(F16)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    change(path, conv_out__weight=torch.zeros(3, 3))
    with pytest.raises(BitPolicyError, match=r"conv_out\.weight has shape \(3, 3\), the .* says \(4, 16, 3, 3\)"):
        FolderParts(folder)
    change(path, conv_out__weight=None)
    with pytest.raises(BitPolicyError, match=r"lacks 1 of the \d+ tensors of UNet2DConditionModel, e\.g\. conv_out"):
        FolderParts(folder)


def test_a_missing_shard_is_told(saved: Callable[..., Path]) -> None:
    folder = saved(F16, max_shard_size="100KB")
    gone = sorted((folder / "unet").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(BitPolicyError, match=f"lacks {gone.name}, which .*index.json names; download"):
        FolderParts(folder)


def test_a_variant_that_is_not_there_is_told(half: Path) -> None:
    with pytest.raises(BitPolicyError, match="no weights of the variant 'bf16'; leave --variant out"):
        FolderParts(half, variant="bf16")


def test_a_packed_denoiser_is_refused(exported: Any) -> None:
    with pytest.raises(BitPolicyError, match="unet is quantized already"):
        FolderParts(exported.folder)


@pytest.mark.parametrize("component", ["transformer", "scheduler_2"])
def test_a_component_that_is_not_there_is_told(half: Path, component: str) -> None:
    with pytest.raises(BitPolicyError, match=f"no component '{component}'; it has .*unet.*--component"):
        FolderParts(half, component)


def test_the_disk_needs_room_for_what_is_copied_but_not_for_what_is_linked(
    exported: Any, half: Path, saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "left by a killed run").write_text("x")
    others = sum(FolderParts(half).others(F16).values())
    for folder, needed in ((half, exported.nbytes), (saved(F32), exported.nbytes + others)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed - 1: SimpleNamespace(free=free))
        with pytest.raises(BitPolicyError, match=f"{needed - 1:,} bytes free, .* at least {needed:,}; free some space"):
            export(exported, folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=needed: SimpleNamespace(free=free))
        export(exported, folder, tmp_path / "out")
        shutil.rmtree(tmp_path / "out")


# Old names


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


# Memory


class Counted:
    """A source whose tensors are counted while anyone holds them."""

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
    export_denoiser(empty, choices, {}, F16, tmp_path, source=source)
    largest = max(spec.nbytes for spec in source.specs.values())
    whole = sum(spec.nbytes for spec in source.specs.values())
    assert largest <= source.most <= 2 * largest + 1024 < whole / 2
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}


# Killed


@pytest.mark.parametrize("before", ["nothing", "an older export"])
def test_a_killed_export_leaves_the_old_folder_or_nothing(
    exported: Any, saved: Callable[..., Path], tmp_path: Path, before: str
) -> None:
    source, out, draw = saved(F32), tmp_path / "here" / "out", Random(0)
    export(exported, source, tmp_path / "expected")
    start = time.perf_counter()
    export(exported, source, out)
    takes = time.perf_counter() - start
    if before == "nothing":
        shutil.rmtree(out)
    seen = set()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    export(exported, source, out)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.1, 2.0) * takes)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        names = {path.name for path in out.parent.iterdir()} if out.parent.exists() else set()
        assert names <= {"out", ".out.partial", ".out.old"}
        seen |= names
        if out.exists():
            assert differing(out, tmp_path / "expected") == []
        elif before == "an older export":  # killed between two renames: the old one is there by its other name
            assert differing(out.parent / ".out.old", tmp_path / "expected") == []
    assert ".out.partial" in seen, "no process was killed while it wrote"
    export(exported, source, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert differing(out, tmp_path / "expected") == []


def test_streaming_is_refused_for_a_folder_without_an_index(tmp_path: Path) -> None:
    assert not is_streamable(tmp_path, "unet")
    (tmp_path / "model_index.json").write_text("{")
    assert not is_streamable(tmp_path, "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert is_streamable(tmp_path, "unet")
    with pytest.raises(BitPolicyError, match="no component 'unet' or 'transformer'; it has none"):
        folder_parts.FolderParts(tmp_path)


# Text encoders


def names_of(parts: Parts) -> list[str]:
    return [name for name, _ in quantizable_layers(parts.denoiser)]


@pytest.mark.parametrize("toy", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])  # CLIP; two CLIPs and a T5
@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["names of now", "older names"])
def test_text_encoders_are_streamed_as_they_are_written_from_memory(
    every_format_in_turn: Callable[[Any], dict[str, Choice]],
    policy_of: Callable[..., Policy],
    tmp_path: Path,
    toy: str,
    prefix: str,
) -> None:
    pipe = TOYS[toy].new()
    names = [name for name in ("unet", "transformer", "text_encoder", "text_encoder_3") if hasattr(pipe, name)]
    for name in names:
        to_storage(getattr(pipe, name), F16)
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / TEXT
    stored = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    save_file({f"{prefix}{name}": tensor for name, tensor in stored.items()}, file, metadata={"format": "pt"})
    memory = MemoryParts(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model"), ",".join(names))
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(memory.denoiser).items()}
    policy = policy_of(memory.denoiser, choices)
    assert is_streamable(tmp_path / "model", ",".join(names))
    streamed = FolderParts(tmp_path / "model", ",".join(names))
    assert {parameter.device.type for parameter in streamed.denoiser.parameters()} == {"meta"}
    assert names_of(streamed) == names_of(memory)
    assert source_hash(streamed.sources, F16) == policy.model.sha256
    export_parts(memory, policy, {}, tmp_path / "from memory")
    export_parts(streamed, policy, {}, tmp_path / "streamed")
    differ = [name for name in differing(tmp_path / "from memory", tmp_path / "streamed") if "tokenizer" not in name]
    assert differ == []


def test_tensors_that_transformers_would_convert_are_not_streamed(
    new_toy_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    new_toy_pipeline().save_pretrained(tmp_path)
    found = load_file(tmp_path / TEXT)
    name = next(name for name in found if name.endswith("q_proj.weight"))
    save_file(found | {name.replace("q_proj", "qkv_proj"): found.pop(name)}, tmp_path / TEXT)
    assert not is_streamable(tmp_path, "unet,text_encoder")
    assert is_streamable(tmp_path, "unet")
    with pytest.raises(
        BitPolicyError, match=r"do not hold .*q_proj.weight under one name; download them again, or load"
    ):
        FolderParts(tmp_path, "text_encoder")


def test_a_text_encoder_that_does_not_fit_its_config_is_refused(
    new_toy_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    new_toy_pipeline().save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / TEXT) if name.endswith("fc1.bias"))
    change(tmp_path / TEXT, **{name.replace(".", "__"): torch.zeros(3)})
    with pytest.raises(BitPolicyError, match=r"fc1\.bias has shape \(3,\), the config of CLIPTextModel says \(32,\)"):
        FolderParts(tmp_path, "text_encoder")
