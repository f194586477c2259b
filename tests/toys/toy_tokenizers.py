"""Tokenizers of the real classes, made in memory: they know printable ASCII, about a letter a token."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

_ASCII = [chr(code) for code in range(33, 127)]
_BYTES = sorted(ByteLevel.alphabet())
LENGTH = 16  # tokens of a prompt


def clip_tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    """CLIP's byte-pair encoding with no merges: a letter is a token, the last one of a word another."""
    words = [*_ASCII, *(f"{letter}</w>" for letter in _ASCII), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=length)


def t5_tokenizer(length: int = LENGTH) -> T5Tokenizer:
    """T5's Unigram model, where every piece is a letter; UMT5's tokenizer is of this class too."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in _ASCII)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def xlm_tokenizer(length: int = LENGTH) -> XLMRobertaTokenizer:
    """XLM-RoBERTa's Unigram model, where every piece is a letter."""
    pieces = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = [*pieces, ("▁", -2.0), *((letter, -4.0) for letter in _ASCII), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=length)


def gemma_tokenizer(length: int = LENGTH) -> GemmaTokenizer:
    """Gemma's byte-pair encoding with no merges; it puts <bos> first."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_ASCII]
    vocab = {word: i for i, word in enumerate(words)}
    return GemmaTokenizer(vocab=vocab, merges=[], model_max_length=length, add_bos_token=True)


def llama_tokenizer(length: int = LENGTH) -> LlamaTokenizer:
    """Llama's byte-pair encoding with no merges, a letter a token."""
    vocab = _numbered("<unk>", "<s>", "</s>", "<pad>", "<image>", "▁", *_ASCII)
    return LlamaTokenizer(vocab=vocab, merges=[], model_max_length=length, pad_token="<pad>")


def bert_tokenizer(length: int = LENGTH) -> BertTokenizer:
    """BERT's WordPiece, a letter a piece, without upper case."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_ASCII, *(f"##{letter}" for letter in _ASCII)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=length)


def _numbered(*words: str) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def roberta_tokenizer(length: int = LENGTH) -> RobertaTokenizer:
    """RoBERTa's byte-pair encoding with no merges: a byte is a token."""
    vocab = _numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", *_BYTES)
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=length)


def qwen_tokenizer(length: int = LENGTH) -> Qwen2Tokenizer:
    """Qwen's byte-pair encoding with no merges: a byte is a token."""
    return Qwen2Tokenizer(vocab=_numbered("<|endoftext|>", *_BYTES), merges=[], model_max_length=length)
