"""An example of a request: the arguments that a pipeline's call needs beside those that are known, with made-up values.

An argument is needed if it has no default; if it is None by default and the pipeline's error names it, or the line of
code that raised the error; or if it takes pictures. Of the last, arguments for embeddings, latents and IP-Adapters are
left out: they replace or add to the others.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Collection
from typing import Any

from bitpolicy.sensitivity.calls.hints import fits
from bitpolicy.sensitivity.calls.signature import Signature, is_set_by_samples
from bitpolicy.sensitivity.input_files import takes_pictures

_INSTEAD = re.compile(r"embed|latents|inpaint|^ip_adapter|^masked_")
_NEVER = ("height", "width", "callback", "timesteps", "sigmas")  # what an error may speak of, and that has a default
_PLAIN = ("a", 1, 0.5, ["a"], [1], [0.5], [[0.1, 0.2, 0.6, 0.7]])  # values to try for other arguments


def example_line(signature: Signature, known: Collection[str], error: Exception) -> str:
    """One line of JSON for --prompts FILE.jsonl; one with dots if nothing seems to be missing.

    Args:
        known: names of the arguments that every call has.
        error: of the pipeline without them.
    """
    said = f"{error}\n{_raising_line(error, signature)}"
    named = set(re.findall(r"\w+", said))
    needed = [name for name in signature.hints if name not in known and _is_needed(signature, name, named)]
    request = {name: _example(name, signature.hints[name], said) for name in needed}
    if not request:
        return '{"prompt": ..., "image": ...}'
    prompt = {"prompt": "a cat"} if signature.takes_text else {}
    return json.dumps({**prompt, **request})


def _is_needed(signature: Signature, name: str, named: set[str]) -> bool:
    if is_set_by_samples(name):
        return False
    if name not in signature.defaults:
        return True
    if signature.defaults[name] is not None:
        return False
    takes_pictures = _takes_pictures(name, signature.hints[name]) and not _INSTEAD.search(name)
    return takes_pictures or (name in named and "embed" not in name and name not in _NEVER)


def _raising_line(error: Exception, signature: Signature) -> str:
    """The innermost line of the pipeline's own file that led to the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.line or "" for frame in reversed(frames) if frame.filename == signature.file), "")


def _takes_pictures(name: str, hint: Any) -> bool:
    takes_files = any(fits(value, hint) for value in ("a.png", ["a.png"], [["a.png"]]))
    return takes_files and (takes_pictures(name) or "PIL." in str(hint))


def _example(name: str, hint: Any, said: str) -> Any:
    if _takes_pictures(name, hint) and not _INSTEAD.search(name):
        listed = re.search(rf"\b{name}\b[^.,;]*\blists?\b", said)
        several = "video" in name or "frames" in name or listed or not fits("a.png", hint)
        return [f"{name}-1.png", f"{name}-2.png"] if several else f"{name}.png"
    if "Tensor" in str(hint):
        return f"{name}.safetensors"
    return next((value for value in _PLAIN if fits(value, hint)), "...")
