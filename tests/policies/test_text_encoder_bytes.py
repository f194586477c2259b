"""Bytes of a text encoder or VAE, as its own library writes it and packed; weights with two names count once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_parts import clip_text_encoder, image_vae, t5_text_encoder, umt5_text_encoder
from toy_tokenizers import clip_tokenizer
from transformers import CLIPTextModelWithProjection, Qwen2Config, Qwen2ForCausalLM

from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target


def language_model() -> Any:
    """A model whose head is its embedding."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=True, **sizes))


MODELS = {
    "CLIP": lambda: clip_text_encoder(clip_tokenizer()),
    "CLIP with projection": lambda: clip_text_encoder(clip_tokenizer(), CLIPTextModelWithProjection),
    "T5": lambda: t5_text_encoder(clip_tokenizer()),
    "UMT5": lambda: umt5_text_encoder(clip_tokenizer()),
    "Qwen2": language_model,
    "AutoencoderKL": image_vae,
}


@pytest.fixture(params=MODELS)
def model(request: Any) -> Any:
    return MODELS[request.param]().eval()


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for path in folder.glob("*.safetensors") for tensor in load_file(path).values())


def test_an_unquantized_model_has_the_bytes_that_its_own_library_writes(model: Any, tmp_path: Path) -> None:
    account = ByteAccount.of(Target({"unet": model}), torch.float16)
    nn.Module.to(model, torch.float16)
    model.save_pretrained(tmp_path)
    assert account.reference == tensor_bytes(tmp_path)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_packed_model_has_the_bytes_that_are_written(model: Any, name: str, tmp_path: Path) -> None:
    layers = {layer: format_named(name) for layer, _ in quantizable_layers(model)}
    account = ByteAccount.of(Target({"unet": model}), torch.float16)
    choices = {layer: Choice(format) for layer, format in layers.items()}
    written = export_component(model, choices, tmp_path, quantization=Quantization())
    assert account.total(layers) == written == tensor_bytes(tmp_path)
    assert account.total(layers) < account.reference


def test_the_bytes_of_several_models_add_up() -> None:
    models = {name: MODELS[name]() for name in ("T5", "AutoencoderKL")}
    together = ByteAccount.of(Target(models), torch.float16)
    apart = [ByteAccount.of(Target({"unet": model}), torch.float16) for model in models.values()]
    assert together.reference == sum(account.reference for account in apart)
    assert together.fixed == sum(account.fixed for account in apart)


def test_a_layer_that_shares_its_weight_is_not_quantized() -> None:
    tied = language_model()
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    names = [name for name, _ in quantizable_layers(tied)]
    assert "lm_head" not in names
    assert "model.layers.0.mlp.up_proj" in names
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert "lm_head" in [name for name, _ in quantizable_layers(tied)]
