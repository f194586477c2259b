"""A checkpoint in one file, in its authors' layout, is searched and exported like the folder of the same model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitpolicy
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.pipelines.loading import load_source, open_parts
from bitpolicy.pipelines.single_file import SingleFile
from bitpolicy.policies.storage.source import ModuleSource
from bitpolicy.policies.storage.source_converted import _Replayed

UNET = "unet/diffusion_pytorch_model.safetensors"
LDM = "model.diffusion_model."
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def as_ldm(name: str) -> str:
    """The name that a tensor of the toy U-Net has in a checkpoint of latent diffusion, written by hand."""
    start = max((top for top in TOP if name.startswith(f"{top}.")), key=len)
    rest = name.removeprefix(f"{start}.")
    if ".resnets." in f".{start}.":
        layer, _, leaf = rest.partition(".")
        rest = f"{RESNET[layer]}.{leaf}"
    return f"{LDM}{TOP[start]}.{rest}"


@pytest.fixture(scope="module")
def single(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The U-Net alone, as for many fine-tuned models, and an EMA counter that belongs to no layer."""
    tensors = {as_ldm(name): tensor for name, tensor in load_file(toy / UNET).items()}
    assert len(tensors) == len(load_file(toy / UNET))
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({**tensors, "model_ema.num_updates": torch.tensor(7)}, path)
    return path


def test_it_loads_like_its_folder(single: Path, toy: Path) -> None:
    one, other = load_source(str(single), config=str(toy), device="cpu"), load_source(str(toy), device="cpu")
    assert (one.sha256, one.storage, one.components) == (other.sha256, other.storage, other.components)
    assert one.everything_sha256 == other.everything_sha256
    assert one.id == str(single)


def test_it_exports_like_its_folder(finished: Any, single: Path, toy: Path, tmp_path: Path) -> None:
    policy = finished.folder / "policy.yaml"
    for model, config, out in ((toy, None, "folder"), (single, str(toy), "single")):
        bitpolicy.export(model, policy, tmp_path / out, config=config)
    names = [path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert len(names) > 10
    differing = {
        str(n) for n in names if (tmp_path / "folder" / n).read_bytes() != (tmp_path / "single" / n).read_bytes()
    }
    # loaded and saved again, a tokenizer notes that it was loaded, and forgets the padding of its last call
    assert differing <= {"tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "bitpolicy.json"}


def test_its_denoiser_is_never_loaded(single: Path, toy: Path) -> None:
    parts = open_parts(str(single), None, torch.float16, config=str(toy))
    assert {tensor.device.type for tensor in parts.target.state_dict().values()} == {"meta"}
    assert isinstance(parts.sources["unet"]._source, _Replayed)  # type: ignore[attr-defined]
    expected = load_file(toy / UNET)
    assert parts.sources["unet"].specs.keys() == expected.keys()
    assert [n for n, t in expected.items() if not torch.equal(parts.sources["unet"].read(n), t)] == []


def test_the_commands_accept_it(command: Any, small: tuple[str, ...], single: Path, toy: Path, here: Path) -> None:
    model = ("--model", single, "--config", toy)
    searched = command("--budget", "50%", *small[2:], *model, "--trials", "0", "--output-dir", "out", "--json")
    assert (searched.code, searched.err) == (0, "")
    assert command("export", "--policy", "out/policy.yaml", *model, "--output-dir", "again").code == 0
    assert (here / "again" / UNET).read_bytes() == (here / "out" / "checkpoint" / UNET).read_bytes()


def test_a_file_in_the_layout_of_diffusers_is_read_too(toy: Path, tmp_path: Path) -> None:
    shutil.copy(toy / UNET, tmp_path / "unet.safetensors")
    source = SingleFile.of(tmp_path / "unet.safetensors", str(toy)).denoiser()[1]
    assert [n for n, t in load_file(toy / UNET).items() if not torch.equal(source.read(n), t)] == []


@pytest.fixture
def fused(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """The state dict of a toy Stable Cascade, and its folder with a file where q, k and v are one matrix."""
    blocks = (("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2
    pairs = ("num_attention_heads", "down_num_layers_per_block", "up_num_layers_per_block")
    sizes: dict[str, Any] = dict.fromkeys((*pairs, "down_blocks_repeat_mappers", "up_blocks_repeat_mappers"), (1, 1))
    sizes |= dict.fromkeys(("clip_text_in_channels", "clip_text_pooled_in_channels", "clip_image_in_channels"), 8)
    sizes |= {"in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 16)}
    model = diffusers.StableCascadeUNet(timestep_ratio_embedding_dim=8, block_types_per_layer=blocks, **sizes)
    model.save_config(tmp_path / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "StableCascadeUNet"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    tensors = {name.replace(".to_out.0.", ".attn.out_proj."): t for name, t in model.state_dict().items()}
    for name in [name for name in tensors if ".to_q." in name]:
        parts = [tensors.pop(name.replace(".to_q.", f".to_{which}.")) for which in "qkv"]
        tensors[name.replace(".to_q.", ".attn.in_proj_")] = torch.cat(parts)
    save_file(tensors, tmp_path / "cascade.safetensors")
    return dict(model.state_dict()), tmp_path


def test_a_fused_checkpoint_is_split(fused: tuple[dict[str, torch.Tensor], Path]) -> None:
    expected, folder = fused
    found = SingleFile.of(folder / "cascade.safetensors", str(folder)).denoiser()[1]
    assert isinstance(found._source, _Replayed)  # type: ignore[attr-defined]
    assert found.specs.keys() == expected.keys() - {"x"}
    assert sum(".to_k.weight" in name for name in expected) == 4
    assert [name for name, tensor in expected.items() if not torch.equal(found.read(name), tensor)] == []


def test_a_file_of_another_kind_is_refused(
    single: Path, fused: tuple[dict[str, torch.Tensor], Path], toy: Path
) -> None:
    with pytest.raises(BitPolicyError, match=r"lacks .* StableCascadeUNet.* config that"):
        SingleFile.of(single, str(fused[1])).denoiser()
    with pytest.raises(BitPolicyError, match=r"UNet2DConditionModel.*config that belongs to it"):
        SingleFile.of(fused[1] / "cascade.safetensors", str(toy)).denoiser()


def without_weights(toy: Path, folder: Path) -> Path:
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def other_width(toy: Path, folder: Path) -> Path:
    shutil.copytree(toy, folder)
    path = folder / "unet" / "config.json"
    path.write_text(re.sub(r'"cross_attention_dim": 24', '"cross_attention_dim": 32', path.read_text()))
    return folder


def test_configs_that_lack_what_the_file_lacks_are_refused(single: Path, toy: Path, tmp_path: Path) -> None:
    config = str(without_weights(toy, tmp_path / "configs"))
    with pytest.raises(
        BitPolicyError, match=r"has no (text_encoder|vae), and .*configs has no weights of one; .*--config"
    ):
        load_source(str(single), config=config, device="cpu")


def test_configs_of_another_model_are_refused(single: Path, toy: Path, tmp_path: Path) -> None:
    config = str(other_width(toy, tmp_path / "configs"))
    with pytest.raises(BitPolicyError, match=r"has shape \(16, 24\), .* \(16, 32\)"):
        open_parts(str(single), ["unet"], torch.float16, config=config)


@pytest.mark.parametrize(
    ("model", "config", "needles"),
    [
        ("model.ckpt", "toy", ["not a safetensors file", "convert it to safetensors"]),
        ("model.safetensors", "nowhere", ["--config nowhere: ", "no diffusers pipeline"]),
        ("model.safetensors", None, ["looks like stable-diffusion-v1-5", "HF_HUB_OFFLINE", "--config"]),
        ("toy", "toy", ["--config is for a single file"]),
    ],
    ids=["a pickle", "no such configs", "no configs", "a folder with configs"],
)
def test_unreadable_models_are_refused(
    single: Path, toy: Path, tmp_path: Path, model: str, config: str | None, needles: list[str]
) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    places = {"model.ckpt": tmp_path / "model.ckpt", "model.safetensors": single, "toy": toy}
    with pytest.raises(BitPolicyError) as raised:
        load_source(str(places[model]), config=str(toy) if config == "toy" else config, device="cpu")
    assert [needle for needle in needles if needle not in str(raised.value)] == []


def test_a_source_of_a_module_reads_without_gradients() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not ModuleSource(layer).read("weight").requires_grad
