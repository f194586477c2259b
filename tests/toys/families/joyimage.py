"""JoyImage: edits of one picture, and of several.

The pipelines change every size to one of a megapixel. That would take a toy minutes, so here they know 32 x 32 pixels.
"""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.joyimage import image_processor
from toy_chats import VISION_TOKENS, chat_tokenizer, language_sizes
from toy_parts import WIDTH
from toy_recipe import picture, toy_of
from toy_schedulers import FLOW_SCHEDULERS
from toy_transformer_pipelines import GUIDED, LAYERS

for _base in image_processor.BUCKETS:
    image_processor.BUCKETS[_base] = [(32, 32)]
_CALL = {**GUIDED, "height": 32, "width": 32}


def _parts(transformer: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS.values())), strict=True))
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    config = transformers.Qwen3VLConfig(
        text_config={
            **language_sizes(tokenizer),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **ids,
    )
    return {
        "scheduler": FLOW_SCHEDULERS["flow Euler"](),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "text_encoder": transformers.Qwen3VLForConditionalGeneration(config),
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
        "processor": transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(size=size, patch_size=16),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen3VLVideoProcessor(),
            chat_template=tokenizer.chat_template,
        ),
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
