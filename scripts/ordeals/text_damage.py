"""Damage that leaves JSON and YAML valid, or nearly so. Equal `random.Random` states damage equally."""

from __future__ import annotations

import json
from random import Random
from typing import Any

_STRINGS = (
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "int4",
    "float32",
    "x" * 5000,
    "\u0000",
    "null",
    "os.system",
    "a/b",
    "é",
)
_NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**12, 1e308, 0.5, -0.0, float("nan"), float("inf"))
_OTHERS = (None, True, False, [], {}, [1], [[]], {"a": 1}, [None, None], ["diffusers", "UNet2DConditionModel"])
_CLASSES = (
    *(
        "UNet2DModel",
        "AutoencoderKL",
        "FluxTransformer2DModel",
        "CLIPTextModel",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
    ),
    *(
        "StableDiffusionXLPipeline",
        "FlaxUNet2DConditionModel",
        "OnnxRuntimeModel",
        "Popen",
        "LlamaModel",
        "NoSuchClass",
    ),
)
_LIBRARIES = ("diffusers", "transformers", "os", "subprocess", "builtins", "torch", "bitpolicy", "no_such_library", "")


def json_damaged(data: bytes, draw: Random) -> bytes:
    """A JSON file with a changed key or value, or one that is no longer JSON."""
    kind = draw.random()
    if kind < 0.1:
        return draw.choice(_ODD_DOCUMENTS)
    text = data.decode()
    if kind < 0.2:
        return _key_twice(text, draw).encode()
    return json.dumps(changed(json.loads(text), draw), indent=draw.choice((None, 2))).encode()


_ODD_DOCUMENTS = (
    *(b"null", b"[]", b"{}", b"1", b'"x"', b"NaN", b"{", b"", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}", b"true"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 900 + b"]" * 900, b"1" * 10_000, b"1e999999", b"-", b"\0" * 64),
)


def _key_twice(text: str, draw: Random) -> str:
    """An object in which one key is repeated with another value."""
    value = json.loads(text)
    if not isinstance(value, dict) or not value:
        return text * 2
    key = draw.choice(sorted(value))
    whole = json.dumps(value)
    return f"{whole[:-1]}, {json.dumps(key)}: {json.dumps(_replacement(value[key], draw))}}}"


def changed(value: Any, draw: Random) -> Any:
    """The value with one part of it removed, renamed, repeated or replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.93:
        key = draw.choice(sorted(value))
        match draw.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                other = draw.choice((f"{key}x", key.upper(), "", "../x", "_class_name", draw.choice(sorted(value))))
                return {(other if k == key else k): v for k, v in value.items()}
            case 2:
                return {**value, draw.choice((*_STRINGS, "quantization_config", "auto_map")): draw.choice(_OTHERS)}
            case _:
                return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        match draw.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], changed(value[at], draw), *value[at + 1 :]]
    return _replacement(value, draw)


def _replacement(value: Any, draw: Random) -> Any:
    """Another value: nearly equal, of the same kind, or of another kind."""
    kind = draw.random()
    if kind < 0.4:
        match value:
            case bool():
                return not value
            case int():
                return draw.choice((value + 1, value - 1, -value, value * 1000, float(value), str(value), value << 20))
            case float():
                return draw.choice((value * 1.001, -value, 1 / value if value else 1.0, str(value), int(value)))
            case str() if value:
                at = draw.randrange(len(value))
                return draw.choice((value[:at] + value[at + 1 :], value.upper(), value + "x", draw.choice(_CLASSES)))
    choices: tuple[Any, ...] = draw.choice((_STRINGS, _NUMBERS, _OTHERS, _CLASSES, _LIBRARIES))
    found = draw.choice(choices)
    if draw.random() < 0.05:
        for _ in range(draw.choice((30, 300))):
            found = draw.choice(([found], {"a": found}))
    return found


def yaml_damaged(data: bytes, draw: Random) -> bytes:
    """A YAML file with a line removed, repeated, indented or given another value; or a different document."""
    if draw.random() < 0.15:
        return draw.choice(_ODD_YAML)
    lines = data.decode().splitlines()
    for _ in range(draw.choice((1, 1, 3))):
        at = draw.randrange(len(lines))
        match draw.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(draw.randrange(len(lines)), lines[at])
            case 2:
                lines[at] = draw.choice(("  ", "\t", "- ")) + lines[at]
            case 3:
                lines[at] = _other_word(lines[at], draw)
            case 4:
                other = draw.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case _:
                lines[at] = f"{lines[at].split(':')[0]}: {draw.choice(_YAML_VALUES)}"
    return ("\n".join(lines) + "\n").encode()


_WORDS = (
    "int4",
    "int8",
    "fp16",
    "nf4",
    "int99",
    "gptq",
    "rtn",
    "true",
    "false",
    "float16",
    "bfloat16",
    "unet",
    "vae",
    "null",
)
_YAML_VALUES = (
    *(
        "[]",
        "{}",
        "null",
        "~",
        "1e999",
        "-1",
        "2147483648",
        "9223372036854775808",
        ".nan",
        ".inf",
        "&a b",
        "*a",
        "!!binary x",
    ),
    *(
        "!!python/name:os.system x",
        "!!python/object/apply:os.system ['true']",
        "!!float 1",
        "'",
        '"',
        "int99",
        "../../x",
    ),
    *(
        "<<: *a",
        "!!set {a, b}",
        "2026-01-01",
        "0o17",
        "1:2:3",
        "yes",
        "{format: int4, format: int8}",
        "[[[[[[]]]]]]",
        "|",
    ),
)
_ODD_YAML = (
    *(
        b"",
        b"---\n...\n",
        b"[]",
        b"- a\n- b\n",
        b"bitpolicy: 1\n",
        b"a: b: c",
        b"\0",
        b"\xff\xfea\0",
        b"%YAML 9.9\n---\n",
    ),
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    *(b"[" * 50_000, b"{a: " * 50_000, b"? " * 20_000, b"- " * 20_000, b"a: " + b"9" * 200_000, b"--- a\n--- b\n"),
)


def _other_word(line: str, draw: Random) -> str:
    """The line with one word of a policy replaced by another."""
    held = [word for word in _WORDS if word in line]
    if not held:
        return line.swapcase()
    return line.replace(draw.choice(held), draw.choice(_WORDS))
