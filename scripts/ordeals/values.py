"""The values of a loaded pipeline: every tensor, every setting, the tokens, and the picture that it draws."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ordeals.judge import Values

TEXT = "A cat!"
WORDS = [TEXT, "dog & pizza (1/2) ~ {z}", "".join(map(chr, range(33, 127)))]
_UNIMPORTANT = ("dtype", "torch_dtype", "transformers_version", "architectures")  # entries of a model's config


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tensors_digest(tensors: dict[str, Any]) -> str:
    import torch

    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
        if tensor.is_meta:  # never loaded
            continue
        sha.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def pipeline_values(pipe: Any) -> Values:
    """Every component's class, tensors and settings; the tokenizer's tokens; the drawn picture."""
    import torch

    found: dict[str, str] = {"class": type(pipe).__name__}
    for name, part in pipe.components.items():
        found[f"{name} class"] = type(part).__name__
        if isinstance(part, torch.nn.Module):
            found[f"{name} tensors"] = tensors_digest({**part.state_dict(), **dict(part.named_buffers())})
        if hasattr(part, "config"):
            found[f"{name} config"] = _config(part.config)
    tokenizer = pipe.components.get("tokenizer")
    if tokenizer is not None:
        found["tokens"] = _or_error(
            lambda: [tokenizer(w, padding="max_length", truncation=True).input_ids for w in WORDS]
        )
        found["token settings"] = _or_error(
            lambda: [tokenizer.model_max_length, sorted(map(str, tokenizer.special_tokens_map.items()))]
        )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
    found["picture"] = _or_error(lambda: digest(pipe(TEXT, **call).images.tobytes()))
    return found


def _config(config: Any) -> str:
    held = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = {k: v for k, v in held.items() if not k.startswith("_") and k not in _UNIMPORTANT}
    known.pop("quantization_config", None)
    return json.dumps(known, sort_keys=True, default=str)


def _or_error(value: Any) -> str:
    """The value as text, or the error: a failure of a pipeline that loaded without complaint is also a value."""
    try:
        return str(value())
    except Exception as error:  # noqa: BLE001
        return f"raises {type(error).__name__}: {error}"[:200]


def loaded(folder: Path) -> Values:
    import bitpolicy

    return pipeline_values(bitpolicy.load_pipeline(folder))


def loaded_by_diffusers(folder: Path) -> Values:
    from diffusers import DiffusionPipeline

    import bitpolicy  # noqa: F401 - registers the quantizer

    return pipeline_values(DiffusionPipeline.from_pretrained(str(folder), local_files_only=True))
