"""JoyImage: edits of one picture, and of several.

The pipelines change every size to one of a megapixel. That would take a toy minutes, so here they know 32 x 32 pixels.
"""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.joyimage import image_processor
from toy_chats import chat_tokenizer, qwen3_vl_processor, qwen3_vl_sizes
from toy_parts import WIDTH
from toy_recipe import picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_transformer_pipelines import GUIDED, LAYERS

for _base in image_processor.BUCKETS:
    image_processor.BUCKETS[_base] = [(32, 32)]
_CALL = {**GUIDED, "height": 32, "width": 32}


def _parts(transformer: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(qwen3_vl_sizes(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer(
            patch_size=[1, 2, 2],
            in_channels=16,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=WIDTH,
            num_layers=LAYERS,
            rope_dim_list=[4, 6, 6],
        ),
        "processor": qwen3_vl_processor(tokenizer),
    }


TOYS = [
    toy_of(
        "JoyImageEditPipeline",
        lambda: _parts(diffusers.JoyImageEditTransformer3DModel),
        _CALL,
        extra={"image": picture(32)},
    ),
    toy_of(
        "JoyImageEditPlusPipeline",
        lambda: _parts(diffusers.JoyImageEditPlusTransformer3DModel),
        _CALL,
        extra={"images": [[picture(32), picture(32)]]},
    ),
]
