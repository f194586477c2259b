"""safetensors itself reads files of our writer, whose bytes do not depend on the order of the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.policies.storage.safetensors_writer import DTYPE_NAMES, SafetensorsWriter

TENSORS = {
    "z.packed": torch.arange(7, dtype=torch.uint8),
    "a.scale": torch.randn(3, 1).half(),
    "b.scale": torch.randn(5),
    "codes": torch.tensor([[-127, 127, 0]], dtype=torch.int8),
    "count": torch.tensor(3),
    "flags": torch.tensor([True, False]),
    "half": torch.randn(2, 3).bfloat16(),
    "nothing": torch.zeros(0, 4),
    "wide": torch.randn(2).double(),
    "strided": torch.arange(6, dtype=torch.int32).reshape(2, 3).t(),
    'name with a "quote" and an ü': torch.ones(1, dtype=torch.int16),
}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with SafetensorsWriter(path, specs(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def header(path: Path) -> tuple[int, dict[str, dict[str, list[int]]]]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def test_safetensors_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    found = load_file(write(tmp_path / "file", TENSORS))
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def test_the_bytes_do_not_depend_on_any_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a", TENSORS).read_bytes()
    assert write(tmp_path / "b", dict(reversed(TENSORS.items()))).read_bytes() == first


def test_the_only_metadata_is_the_format(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "file", TENSORS), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_and_no_byte_is_left_over(tmp_path: Path) -> None:
    path = write(tmp_path / "file", TENSORS)
    length, entries = header(path)
    assert length % 8 == 0
    del entries["__metadata__"]
    for name, entry in entries.items():
        assert entry["data_offsets"][0] % TENSORS[name].element_size() == 0, name
    sizes = {name: end - start for name, (start, end) in ((n, e["data_offsets"]) for n, e in entries.items())}
    assert sizes == {name: tensor.numel() * tensor.element_size() for name, tensor in TENSORS.items()}
    assert path.stat().st_size == 8 + length + sum(sizes.values())


def test_a_tensor_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "file", specs(TENSORS))
    for name in TENSORS.keys() - {"count"}:
        writer.write(name, TENSORS[name])
    with pytest.raises(ValueError, match=r"1 tensors were not written, e\.g\. count$"), writer:
        pass


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2)], ids=str)
def test_a_tensor_that_does_not_match_its_spec_is_an_error(tmp_path: Path, tensor: torch.Tensor) -> None:
    writer = SafetensorsWriter(tmp_path / "file", {"a": TensorSpec(torch.float32, (4,))})
    with pytest.raises(ValueError, match=r"a: got .*needed torch.float32 \(4,\)"), writer:
        writer.write("a", tensor)


def test_an_error_inside_is_not_hidden_by_missing_tensors(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "file", specs(TENSORS))
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt


def test_the_bytes_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    every = {f"a.{dtype}".removeprefix("torch."): torch.zeros(3, 2).to(dtype) for dtype in DTYPE_NAMES}
    tensors = {name: tensor.contiguous() for name, tensor in (TENSORS | every).items()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert write(tmp_path / "ours", tensors).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_dtype_that_safetensors_writes_can_be_written() -> None:
    """Except float4: two numbers are one element in torch and two in safetensors."""
    assert set(safetensors.torch._SIZE) - {torch.float4_e2m1fn_x2} == set(DTYPE_NAMES)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_the_bits_of_every_dtype_are_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every byte, or every exponent and sign, including NaN and denormals; a scalar, and empty axes."""
    values = torch.arange(256, dtype=torch.uint8).repeat_interleave(dtype.itemsize)
    values = (values % 2 if dtype == torch.bool else values).view(dtype)
    tensors = {"scalar": values[77], "all": values.reshape(2, 16, 8), "": values[:5], "none": values[:0].reshape(3, 0)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    ours = write(tmp_path / "ours", tensors)
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(ours, "pt") as file:
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (dtype, tensor.shape), name
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
        assert file.get_slice("all")[:, 3:5].shape == (2, 2, 8)


@pytest.mark.parametrize("name", ["", "a", "ab" * 40, "日本 😀", 'q"\\/\t\n\x00\x7f', "\u2028 é"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_header_is_padded_and_escaped_as_safetensors_does_it(tmp_path: Path, name: str, count: int) -> None:
    """One tensor after the other makes the header longer by a few bytes, past every remainder of 8; and a file may hold
    no tensor at all."""
    for more in range(8):
        tensors = {f"{name}{'x' * (more + i)}": torch.arange(3, dtype=torch.int16) for i in range(count)}
        save_file(tensors, tmp_path / "theirs", {"format": "pt"})
        ours = write(tmp_path / "ours", tensors)
        assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
        assert int.from_bytes(ours.read_bytes()[:8], "little") % 8 == 0


def test_more_metadata_is_sorted_so_that_the_bytes_stay_the_same(tmp_path: Path) -> None:
    first, second = {"zeta": "1", "_layers": '{"a": 2}'}, {"_layers": '{"a": 2}', "zeta": "1"}
    for name, metadata in (("a", first), ("b", second)):
        with SafetensorsWriter(tmp_path / name, specs(TENSORS), metadata) as writer:
            for tensor in TENSORS:
                writer.write(tensor, TENSORS[tensor])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", **first}
