"""Language models that serve as text encoders, two layers each, with tokenizers and processors: a byte a token."""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from toy_parts import WIDTH
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

VISION_TOKENS = {  # of the models that read pictures: name in the config -> text
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}


def chat_tokenizer(*more: str) -> Qwen2Tokenizer:
    """Qwen's tokenizer with its special tokens, `more` of them, and a template for chats."""
    special = ["<|im_start|>", "<|im_end|>", *VISION_TOKENS.values(), *more]
    words = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), *special]
    vocab = {word: i for i, word in enumerate(words)}
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special, chat_template=_CHAT)


def qwen_vl_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """It makes four tokens of a small picture."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=_CHAT,
    )


def language_sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the configs of language models have in common. Output (B, tokens, WIDTH)."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def gemma2_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Gemma2Model:
    return Gemma2Model(Gemma2Config(query_pre_attn_scalar=8, **language_sizes(tokenizer)))


def qwen3_sizes(tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    return Qwen3Config(**language_sizes(tokenizer))


def qwen_vl_text_encoder(tokenizer: PreTrainedTokenizerBase) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen 2.5 VL, which also reads pictures."""
    text = {**language_sizes(tokenizer), **_THREE_AXES}
    del text["head_dim"]
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.2,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_vision_ids(tokenizer))
    )


def qwen3_vl_sizes(tokenizer: PreTrainedTokenizerBase, layers: int = 2) -> Qwen3VLConfig:
    """Of Qwen 3 VL, which also reads pictures."""
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**language_sizes(tokenizer), **_THREE_AXES, "num_hidden_layers": layers}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **_vision_ids(tokenizer))


def qwen3_vl_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """It makes one token of a small picture."""
    size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def _vision_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(list(VISION_TOKENS.values())), strict=True))
