"""Roles and stages of layers in text encoders and autoencoders, against hand labels, and groups that share a format."""

from __future__ import annotations

from typing import Any

import pytest
from toy_pipelines import TOYS

from bitpolicy.policies.target import Target
from bitpolicy.search.constraints import shared_qkv
from bitpolicy.sensitivity.inventory import Layer, inventory

EXPECTED = {
    "StableDiffusionXLPipeline": {
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": "attention_qkv",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": "attention_out",
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc2": "feed_forward",
        "text_encoder_2.text_projection": "projection",
        "vae.encoder.conv_in": "input_stem",
        "vae.encoder.conv_out": "output_head",
        "vae.quant_conv": "projection",
        "vae.post_quant_conv": "projection",
        "vae.decoder.conv_in": "input_stem",
        "vae.decoder.mid_block.attentions.0.to_q": "attention_qkv",
        "vae.decoder.mid_block.attentions.0.to_out.0": "attention_out",
        "vae.decoder.up_blocks.0.resnets.0.conv1": "conv",
        "vae.decoder.up_blocks.0.upsamplers.0.conv": "resample",
        "vae.decoder.up_blocks.1.resnets.0.conv_shortcut": "shortcut",
        "vae.decoder.conv_out": "output_head",
        "unet.conv_in": "input_stem",
    },
    "PixArtSigmaPipeline": {
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q": "attention_qkv",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.o": "attention_out",
        "text_encoder.encoder.block.1.layer.1.DenseReluDense.wi_1": "feed_forward",
        "text_encoder.encoder.block.1.layer.1.DenseReluDense.wo": "feed_forward",
    },
    "HunyuanDiTPipeline": {
        "text_encoder.encoder.layer.0.attention.self.query": "attention_qkv",
        "text_encoder.encoder.layer.0.attention.output.dense": "attention_out",
        "text_encoder.encoder.layer.0.intermediate.dense": "feed_forward",
        "text_encoder.encoder.layer.0.output.dense": "feed_forward",
        "text_encoder.pooler.dense": "projection",
    },
    "SanaPipeline": {
        "text_encoder.layers.0.self_attn.o_proj": "attention_out",
        "text_encoder.layers.0.mlp.gate_proj": "feed_forward",
        "vae.decoder.up_blocks.0.0.conv": "resample",
        "vae.decoder.up_blocks.0.1.conv1": "conv",
    },
    "StableVideoDiffusionPipeline": {
        "image_encoder.vision_model.embeddings.patch_embedding": "input_stem",
        "image_encoder.visual_projection": "projection",
        "vae.decoder.time_conv_out": "output_head",
    },
}


@pytest.fixture(scope="module", params=EXPECTED)
def layers(request: Any) -> tuple[str, dict[str, Layer]]:
    pipe = TOYS[request.param].new()
    found = inventory(Target.chosen(pipe, ["all"]))
    return request.param, {layer.name: layer for layer in found}


def test_roles_agree_with_hand_labels(layers: tuple[str, dict[str, Layer]]) -> None:
    name, found = layers
    assert {layer: found[layer].role for layer in EXPECTED[name]} == EXPECTED[name]


def test_every_layer_has_a_role_and_each_component_has_one_stage(layers: tuple[str, dict[str, Layer]]) -> None:
    _, found = layers
    for name, layer in found.items():
        component = name.split(".")[0]
        stage = {"vae": "autoencoder", "unet": None, "transformer": None}.get(component, "conditioning")
        assert layer.role != "other", name
        assert (layer.stage == stage) if stage else (layer.stage not in ("autoencoder", "conditioning"))


def test_projections_of_one_attention_share_a_format_whatever_their_names() -> None:
    pipe = TOYS["HunyuanDiTPipeline"].new()
    groups = shared_qkv(inventory(Target.of(pipe, ["text_encoder", "text_encoder_2"])))
    bert, t5 = ("text_encoder.encoder.layer.0.attention.self", "text_encoder_2.encoder.block.0.layer.0.SelfAttention")
    assert [f"{bert}.{leaf}" for leaf in ("query", "key", "value")] in groups
    assert [f"{t5}.{leaf}" for leaf in ("q", "k", "v")] in groups
