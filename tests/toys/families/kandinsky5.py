"""Kandinsky 5: images from text, and edits of an image.

The pipelines change every size to one of a megapixel. That would take a toy minutes, so here they know 64 x 64 pixels.
"""

from __future__ import annotations

from typing import Any

import diffusers
from toy_chats import chat_tokenizer, qwen_vl_processor, qwen_vl_text_encoder
from toy_parts import WIDTH, clip_text_encoder, image_vae
from toy_recipe import picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_tokenizers import clip_tokenizer
from toy_transformer_pipelines import GUIDED

for _kind in (diffusers.Kandinsky5T2IPipeline, diffusers.Kandinsky5I2IPipeline):
    _kind.resolutions = property(lambda _pipe: [(64, 64)], lambda _pipe, _usual: None)
_CALL = {**GUIDED, "height": 64, "width": 64}


def _parts(**options: Any) -> dict[str, Any]:
    tokenizer, clip = chat_tokenizer(), clip_tokenizer(77)
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": image_vae((4, 4, 8, 8)),
        "text_encoder": qwen_vl_text_encoder(tokenizer),
        "tokenizer": qwen_vl_processor(tokenizer),
        "text_encoder_2": clip_text_encoder(clip, length=77),
        "tokenizer_2": clip,
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=WIDTH,
            in_text_dim2=WIDTH,
            time_dim=16,
            model_dim=16,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=3,
            axes_dims=(2, 2, 4),
            **options,
        ),
    }


TOYS = [
    toy_of("Kandinsky5T2IPipeline", _parts, _CALL),
    toy_of("Kandinsky5I2IPipeline", lambda: _parts(visual_cond=True), _CALL, extra={"image": picture(64)}),
]
