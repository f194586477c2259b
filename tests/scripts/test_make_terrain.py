"""Reading the terrain model's ONNX file without the onnx package, and the places of its weights in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel


@pytest.fixture(scope="module")
def script(scripts_importable: None) -> Any:
    import make_terrain

    return make_terrain


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """One field of a protobuf message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def node(op: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(field(1, name.encode()) for name in inputs)
    return field(1, names + field(2, output.encode()) + field(4, op.encode()))


def constant(name: str, value: np.ndarray, packed: bool = False) -> bytes:
    shape = field(1, b"".join(map(varint, value.shape))) if packed else b"".join(field(1, n) for n in value.shape)
    kind = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}[value.dtype]
    return field(5, shape + field(2, kind) + field(8, name.encode()) + field(9, value.tobytes()))


def test_operators_and_float_constants_are_read(script: Any) -> None:
    weight, odd = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 200, 1), np.float32)
    other = constant("indices", np.arange(3))
    graph = node("Conv", ["x", "network.w"], "y") + constant("network.w", weight) + constant("odd", odd, True) + other
    found = script.read_graph(field(1, 8) + varint(9 << 3 | 5) + bytes(4) + field(7, graph))
    assert {name: (one.op, one.inputs) for name, one in found.nodes.items()} == {"y": ("Conv", ("x", "network.w"))}
    assert set(found.constants) == {"network.w", "odd"}
    assert np.array_equal(found.constants["network.w"], weight)
    assert found.constants["odd"].shape == (1, 200, 1)


def test_a_norm_is_found_behind_other_operators(script: Any) -> None:
    """x * scale + bias, then an activation, then the convolution that gives the norm its name."""
    scale, bias = np.array([[[2.0]], [[3.0]]], np.float32), np.array([[[4.0]], [[5.0]]], np.float32)
    weight = np.zeros((2, 2, 3, 3), np.float32)
    graph = node("Mul", ["x", "s"], "a") + node("Add", ["a", "b"], "c") + node("Sigmoid", ["c"], "d")
    graph += node("Mul", ["c", "d"], "e") + node("Conv", ["e", "network.in.0.in_layers.2.weight"], "y")
    graph += constant("s", scale) + constant("b", bias) + constant("network.in.0.in_layers.2.weight", weight)
    found = script.original_weights(script.read_graph(field(7, graph)))
    assert found["in.0.in_layers.0.weight"].tolist() == [2, 3]
    assert found["in.0.in_layers.0.bias"].tolist() == [4, 5]
    assert found["in.0.in_layers.2.weight"].shape == weight.shape


class AnyWeight(dict[str, np.ndarray]):
    """Has every requested weight, with three rows, and records the names."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def pop(self, name: str, *_: Any) -> np.ndarray:
        self.taken.append(name)
        return np.zeros((1, 1) if "label_emb" in name else 3, np.float32)


def test_every_weight_has_one_place_in_the_network(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AnyWeight()
    monkeypatch.setattr(script.Renaming, "__init__", lambda self, _: vars(self).update(_left=original, _named={}))
    found = script.diffusers_weights({})
    with torch.device("meta"):
        names = set(UNet2DModel(**script.CONFIG).state_dict())
    assert len(original.taken) == len(set(original.taken))
    assert set(found) <= names
    assert all("conv_shortcut" in name for name in names - set(found))  # only where the original has one


def test_a_weight_without_a_place_is_reported(script: Any) -> None:
    with pytest.raises(ValueError, match=r"without a place: a\.weight"):
        script.Renaming({"a.weight": np.zeros(1)}).finished()


def test_the_onnx_file_is_found_in_a_wheel_in_a_folder_and_on_its_own(script: Any, tmp_path: Path) -> None:
    wheel = tmp_path / "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(f"adaptive_terrain/models/{script.ONNX}", b"network")
    assert script.onnx_bytes(wheel) == script.onnx_bytes(tmp_path) == b"network"
    unpacked = tmp_path / "unpacked" / script.ONNX
    unpacked.parent.mkdir()
    unpacked.write_bytes(b"another")
    assert script.onnx_bytes(unpacked) == script.onnx_bytes(unpacked.parent) == b"another"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="contains neither"):
        script.onnx_bytes(tmp_path / "empty")


def test_heights_agree_with_the_package(script: Any) -> None:
    """0 is the ground and 1 the greatest height: asinh(h / 0.1), scaled to 1 at 22.17 metres."""
    found = script.heights(np.array([0.0, 0.5, 1.0, 2.0]))
    assert found[0] == 0
    assert found[2] == found[3] == pytest.approx(22.16864)
    assert np.arcsinh(found[1] / 0.1) * 2 == pytest.approx(np.arcsinh(found[2] / 0.1))
