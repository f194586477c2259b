"""Roles of layers outside the sampling loop: in text and image encoders, and in autoencoders.

These models vary less in their naming than denoisers. Attention projections are named by letters (`q_proj`, T5's
`SelfAttention.q`, BERT's `attention.self.query`). The two or three layers of a feed-forward network are called `fc`,
`wi`, `wo` or `gate_proj`. In an autoencoder, the stem leads from pixels or latents into the trunk, and the head leads
out of it.
"""

from __future__ import annotations

import re

from torch import nn

from bitpolicy.sensitivity.roles import is_attention

_OUTPUT_PROJECTION = re.compile(r"o|o_proj|out_proj|to_out|proj|proj_attn|proj_out|attention_output")
_CONVOLUTIONAL = (  # for layers outside attention; the first pattern found in the layer's path decides
    ("shortcut", r"shortcut|skip|residual"),
    ("resample", r"samplers?\b|resampl|time_conv\b|(up|down)_blocks\.\d+\.\d+\.conv$"),
    ("input_stem", r"(^|\.)conv_in(\.|$)"),
    ("output_head", r"^(encoder|decoder|head)\.(time_)?conv_out(\.|$)|^decoder\.layers\.\d+$"),
    ("projection", r"quant_conv|^quant"),
    ("timestep_embedding", r"time_emb"),
)


def conditioner_role(model: nn.Module, name: str) -> str:
    """The role of a layer in one of transformers' text or image encoders: attention, feed-forward, input or output."""
    if attention := _attention_role(model, name):
        return attention
    if re.search(r"patch_embed|conv_stem|embeddings\.", name):
        return "input_stem"
    if re.search(r"mlp|fc\d|feed_forward|DenseReluDense|ffn|intermediate|(gate|up|down)_proj|output\.dense", name):
        return "feed_forward"
    return "projection" if re.search(r"proj|pooler|dense|lm_head|merger|connector", name) else "other"


def autoencoder_role(model: nn.Module, name: str) -> str:
    """The role of a layer in an autoencoder: attention, feed-forward, or the purpose of the convolution."""
    if attention := _attention_role(model, name):
        return attention
    found = next((role for role, pattern in _CONVOLUTIONAL if re.search(pattern, name)), None)
    return found or ("feed_forward" if isinstance(model.get_submodule(name), nn.Linear) else "conv")


def _attention_role(model: nn.Module, name: str) -> str | None:
    """The role if a module around the layer projects queries, else None.

    BERT's output projection is outside that module, so its path is checked first.
    """
    path = name.split(".")
    if path[-3:] == ["attention", "output", "dense"]:
        return "attention_out"
    for depth in range(len(path) - 1, 0, -1):
        around = model.get_submodule(".".join(path[:depth]))
        if is_attention(around):
            word = next(part for part in reversed(path) if not part.isdigit())
            return "attention_out" if _OUTPUT_PROJECTION.fullmatch(word) else "attention_qkv"
    return None
