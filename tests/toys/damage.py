"""Random damage to files, the same for the same `random.Random`."""

from __future__ import annotations

import random
from typing import Any


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, taken out, put in or repeated; often where the header is."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        header = min(len(changed), 8 + int.from_bytes(data[:8], "little"))
        at = draw.randrange(draw.choice((9, header, len(changed))) or 1) % max(len(changed), 1)
        length = draw.choice((1, 1, 4, 100))
        match draw.randrange(5):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = draw.randbytes(length)
            case 3:
                changed[at : at + length] = changed[: len(changed[at : at + length])]
            case _:
                del changed[at:]
        if not changed:
            break
    return bytes(changed)


VALUES: list[Any] = [None, 0, -1, 2, True, "", "int4", "float32", "..", "a/b", [], {}, [1], {"a": 1}, 1e308, "x" * 1000]


def mutated_json(value: Any, draw: random.Random) -> Any:
    """One entry somewhere in it taken out, renamed or replaced."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        match draw.randrange(4):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(f"{k}{draw.choice('x./')}" if k == key else k): v for k, v in value.items()}
            case _:
                return {k: (mutated_json(v, draw) if k == key else v) for k, v in value.items()}
    return draw.choice(VALUES)
