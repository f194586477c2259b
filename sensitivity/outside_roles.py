"""Roles of layers outside the sampling loop: in text and image encoders, and in autoencoders.

Their makers name things in fewer ways than those of denoisers: the projections of attention by letters (`q_proj`, T5's
`SelfAttention.q`, BERT's `attention.self.query`), the two or three layers of a feed-forward network by `fc`, `wi`, `wo`
or `gate_proj`. What leads from pixels or latents into an autoencoder's trunk is its stem, what leads out its head.
"""

from __future__ import annotations

import re

from torch import nn

from bitpolicy.sensitivity.roles import is_attention

_WAY_OUT = re.compile(r"o|o_proj|out_proj|to_out|proj|proj_attn|proj_out|attention_output")
_CONVOLUTIONAL = (  # the first that is found in a layer's path below its attention tells
    ("shortcut", r"shortcut|skip|residual"),
    ("resample", r"samplers?\b|resampl|time_conv\b|(up|down)_blocks\.\d+\.\d+\.conv$"),
    ("input_stem", r"(^|\.)conv_in(\.|$)"),
    ("output_head", r"^(encoder|decoder|head)\.(time_)?conv_out(\.|$)|^decoder\.layers\.\d+$"),
    ("projection", r"quant_conv|^quant"),
    ("timestep_embedding", r"time_emb"),
)


def conditioner_role(model: nn.Module, name: str) -> str:
    """Of a layer in a text or image encoder of transformers: attention, feed-forward, or what leads in and out."""
    if attention := _attention_role(model, name):
        return attention
    if re.search(r"patch_embed|conv_stem|embeddings\.", name):
        return "input_stem"
    if re.search(r"mlp|fc\d|feed_forward|DenseReluDense|ffn|intermediate|(gate|up|down)_proj|output\.dense", name):
        return "feed_forward"
    return "projection" if re.search(r"proj|pooler|dense|lm_head|merger|connector", name) else "other"


def autoencoder_role(model: nn.Module, name: str) -> str:
    """Of a layer in an autoencoder: attention, or what a convolution is for."""
    if attention := _attention_role(model, name):
        return attention
    found = next((role for role, pattern in _CONVOLUTIONAL if re.search(pattern, name)), None)
    return found or ("feed_forward" if isinstance(model.get_submodule(name), nn.Linear) else "conv")


def _attention_role(model: nn.Module, name: str) -> str | None:
    """Whether a module around the layer projects queries; BERT's way out stands beside that module."""
    path = name.split(".")
    if path[-3:] == ["attention", "output", "dense"]:
        return "attention_out"
    for depth in range(len(path) - 1, 0, -1):
        around = model.get_submodule(".".join(path[:depth]))
        if is_attention(around):
            word = next(part for part in reversed(path) if not part.isdigit())
            return "attention_out" if _WAY_OUT.fullmatch(word) else "attention_qkv"
    return None
