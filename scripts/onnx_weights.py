"""Read the operators and the float constants of an ONNX file, without the onnx package.

A file is one protobuf message: a sequence of pairs of a varint key, field number << 3 | wire type, and a value. This
module reads ModelProto.graph (7), its NodeProtos (1: inputs 1, outputs 2, op_type 4) and its TensorProtos (5: dims 1,
data_type 2, name 8, raw_data 9). The field numbers are those of onnx.proto, ONNX 1.16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_FLOAT = 1  # TensorProto.DataType
_FIXED = {1: 8, 5: 4}  # wire type -> bytes


@dataclass(frozen=True)
class Node:
    """One operator: its type and the names of its inputs."""

    op: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A network.

    Attributes:
        nodes: each operator, by the name of its output.
        constants: float32 arrays by name, including weights.
    """

    nodes: dict[str, Node]
    constants: dict[str, np.ndarray]


def read_graph(data: bytes) -> Graph:
    """The graph of an ONNX file that contains its weights."""
    nodes: dict[str, Node] = {}
    constants: dict[str, np.ndarray] = {}
    graph = next(value for field, value in _fields(memoryview(data)) if field == 7)
    for field, value in _fields(graph):
        if field == 1:
            _add_node(nodes, value)
        elif field == 5:
            _add_constant(constants, value)
    return Graph(nodes, constants)


def _add_node(nodes: dict[str, Node], message: memoryview) -> None:
    texts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for field, value in _fields(message):
        if field in texts:
            texts[field].append(bytes(value).decode())
    for output in texts[2]:
        nodes[output] = Node(texts[4][0], tuple(texts[1]))


def _add_constant(constants: dict[str, np.ndarray], message: memoryview) -> None:
    found: dict[int, Any] = {}
    shape: list[int] = []
    for field, value in _fields(message):
        if field == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        else:
            found[field] = value
    if found.get(2) == _FLOAT:
        name = bytes(found[8]).decode()
        constants[name] = np.frombuffer(found[9], "<f4").reshape(shape).copy()


def _fields(buffer: memoryview) -> Iterator[tuple[int, Any]]:
    """Field number and value of each pair: an int for a varint, otherwise bytes."""
    at = 0
    while at < len(buffer):
        key, at = _varint(buffer, at)
        if key & 7 == 0:
            value, at = _varint(buffer, at)
            yield key >> 3, value
            continue
        size = _FIXED.get(key & 7)
        if size is None:
            size, at = _varint(buffer, at)
        yield key >> 3, buffer[at : at + size]
        at += size


def _varints(buffer: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(buffer):
        value, at = _varint(buffer, at)
        found.append(value)
    return found


def _varint(buffer: memoryview, at: int) -> tuple[int, int]:
    """The number that starts at `at` (seven bits per byte, low bits first), and the position after it."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
