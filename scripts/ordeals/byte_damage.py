"""Damage to files of any kind, and to the header of a safetensors file. Equal `random.Random` states damage equally."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Damage = Callable[[bytes, Random], bytes]


def flipped(data: bytes, draw: Random) -> bytes:
    """Flip one or eight bits, anywhere or in the header."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 8))):
        end = draw.choice((len(found), len(found), min(len(found), 200)))
        found[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(found)


def zeroed(data: bytes, draw: Random) -> bytes:
    """Zero a run of bytes, as a disk does with a block that it lost."""
    at, length = draw.randrange(len(data)), draw.choice((1, 8, 512, 4096))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


def truncated(data: bytes, draw: Random) -> bytes:
    return data[: draw.choice((draw.randrange(len(data)), len(data) - 1, min(len(data), draw.randrange(1, 20))))]


def emptied(data: bytes, draw: Random) -> bytes:
    return b""


def doubled(data: bytes, draw: Random) -> bytes:
    return data + data


def inserted(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.choice((1, 4, 100))) + data[at:]


def removed(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 4, 100)) :]


def swapped(data: bytes, draw: Random) -> bytes:
    """Swap two chunks of equal length."""
    length = draw.choice((1, 2, 16, 256))
    if len(data) < 2 * length:
        return data[::-1]
    a, b = sorted((draw.randrange(len(data) - length), draw.randrange(len(data) - length)))
    b = max(b, min(a + length, len(data) - length))
    return data[:a] + data[b : b + length] + data[a + length : b] + data[a : a + length] + data[b + length :]


def noise(data: bytes, draw: Random) -> bytes:
    return draw.randbytes(draw.choice((1, 8, 9, len(data))))


BYTES: tuple[Damage, ...] = (flipped, flipped, zeroed, truncated, emptied, doubled, inserted, removed, swapped, noise)

_HUGE = (2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -1, 0, 1)
_DTYPES = ("F16", "F32", "F64", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "nonsense", "", 1, None)


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors_of(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def header_damaged(data: bytes, draw: Random) -> bytes:
    """Change a length, offset, dtype, shape, name or the nesting in the header of a safetensors file."""
    return draw.choice(_HEADERS)(data, draw)


def _wrong_length(data: bytes, draw: Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    other = draw.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63 - 1, 2**64 - 1))
    return struct.pack("<Q", other) + data[8:]


def _wrong_entry(data: bytes, draw: Random) -> bytes:
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry, other = header[name], header[draw.choice(names)]
    match draw.randrange(8):
        case 0:
            entry["data_offsets"][draw.randrange(2)] = draw.choice(_HUGE)
        case 1:
            entry["data_offsets"] = draw.choice(
                (other["data_offsets"], [], None, "x", [0], entry["data_offsets"][::-1])
            )
        case 2:
            entry["dtype"] = draw.choice(_DTYPES)
        case 3:
            entry["shape"] = draw.choice(
                (entry["shape"][::-1], [], [draw.choice(_HUGE)], None, [-1], "x", [1.5], [[1]])
            )
        case 4:
            entry["shape"] = [*entry["shape"], draw.choice((1, 0, 2**62))]
        case 5:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        case 6:
            del entry[draw.choice(sorted(entry))]
        case _:
            header[name] = draw.choice((None, [], 1, "x", {}))
    return safetensors_of(header, body)


def _wrong_name(data: bytes, draw: Random) -> bytes:
    header, body = header_of(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    match draw.randrange(3):
        case 0:
            header[draw.choice((f"{name}x", "", "../../x", "a" * 10_000, "\ud800", f"{name}\0", "weight"))] = (
                header.pop(name)
            )
        case 1:
            del header[name]
        case _:
            header[f"{name}.more"] = header[name]
    return safetensors_of(header, body)


def _names_exchanged(data: bytes, draw: Random) -> bytes:
    """Swap the names of two tensors of equal shape and dtype, which only a checksum can detect."""
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    a = draw.choice(names)
    alike = [n for n in names if (header[n]["shape"], header[n]["dtype"]) == (header[a]["shape"], header[a]["dtype"])]
    b = draw.choice(alike)
    header[a], header[b] = header[b], header[a]
    return safetensors_of(header, body)


def _wrong_metadata(data: bytes, draw: Random) -> bytes:
    header, body = header_of(data)
    held = header.get("__metadata__", {})
    if held and draw.random() < 0.5:
        key = draw.choice(sorted(held))
        held = {**held, key: draw.choice(("", "x", "null", "[" * 100_000, held[key][:-1], "{}", 1))}
    else:
        held = draw.choice((None, [], {}, {"format": "tf"}, {"format": 1}, "x"))
    return safetensors_of({**header, "__metadata__": held}, body)


def _twice(data: bytes, draw: Random) -> bytes:
    """Repeat a key."""
    header, body = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    a, b = draw.choice(names), draw.choice(names)
    text = json.dumps(header)
    return safetensors_of(f"{text[:-1]}, {json.dumps(a)}: {json.dumps(header[b])}}}", body)


def _deep(data: bytes, draw: Random) -> bytes:
    deep = draw.choice((100, 10_000, 1_000_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    whole = draw.random() < 0.5
    return safetensors_of(opening * deep + ("1" + closing * deep if whole else ""), header_of(data)[1])


def _body_changed(data: bytes, draw: Random) -> bytes:
    """Keep the header and change the data: shorter, longer, or of the same length."""
    header, body = header_of(data)
    return safetensors_of(header, draw.choice((body[:-1], body + b"\0", bytes(len(body)), body[::-1], b"")))


_HEADERS = (
    *(_wrong_length, _wrong_entry, _wrong_entry, _wrong_entry, _wrong_name, _names_exchanged),
    *(_wrong_metadata, _twice, _deep, _body_changed),
)
