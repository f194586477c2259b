"""PixArt: alpha, which embeds the size of the image, and sigma with perturbed attention."""

from __future__ import annotations

from toy_recipe import toy_of
from toy_transformer_pipelines import EXACT, READ, SMALL, pixart_parts

_CALL = {**SMALL, **READ, **EXACT, "clean_caption": False}
_SIZED = {"use_additional_conditions": True, "sample_size": 128, "num_attention_heads": 3, "cross_attention_dim": 24}
TOYS = [
    toy_of("PixArtAlphaPipeline", lambda: pixart_parts(**_SIZED), _CALL),
    toy_of("PixArtSigmaPAGPipeline", pixart_parts, _CALL),
]
