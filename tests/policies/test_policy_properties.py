"""Any policy is the same after writing and reading, with the same meaning, and its bytes add up."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_formats import KINDS

from bitpolicy import Policy
from bitpolicy.kernels.formats.grid import GridFormat
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.checkpoints.checkpoint import write_packed
from bitpolicy.policies.loading.packed_config import BitPolicyConfig
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.source import ModuleSource
from bitpolicy.policies.storage.stored_tensors import stored_tensors
from bitpolicy.policies.target import Target

SOON = settings(max_examples=40, deadline=None, derandomize=True, database=None)
MODEL = nn.ModuleDict(
    {
        "conv_in": nn.Conv2d(3, 8, 3),
        "blocks": nn.ModuleList([nn.Linear(64, 6), nn.Linear(67, 5, bias=False), nn.Conv1d(6, 4, 3)]),
        "norm": nn.GroupNorm(2, 8),
    }
)
NAMES = [name for name, _ in quantizable_layers(MODEL)]


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Choice]:
    found = {}
    for name, layer in quantizable_layers(MODEL):
        format = draw(st.sampled_from([format for format in KINDS if format.fits(layer.weight.shape)]))
        quantizer = draw(st.sampled_from(["rtn", "mse", "hqq"])) if isinstance(format, GridFormat) else "rtn"
        found[name] = Choice(format, format.packed and draw(st.booleans()), quantizer)
    return found


printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3),
    max_leaves=8,
)


@SOON
@given(wanted=choices(), id=printable, provenance=st.dictionaries(printable, plain, max_size=3))
def test_a_policy_survives_writing_and_reading(
    wanted: dict[str, Choice], id: str, provenance: dict[str, object]
) -> None:
    about = ModelReference(id=id, component="unet", class_name="Toy", sha256="0" * 64)
    policy = Policy.of(wanted, model=about, provenance=provenance)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.yaml"
        policy.save(path)
        again = Policy.load(path)
    assert again == policy
    assert again.resolve(NAMES) == wanted
    assert again.to_yaml() == policy.to_yaml()


@SOON
@given(wanted=choices())
def test_a_config_survives_writing_and_reading(wanted: dict[str, Choice]) -> None:
    config = BitPolicyConfig.of(wanted, torch.bfloat16)
    again = BitPolicyConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    packed = {name: choice.format for name, choice in wanted.items() if choice.format.packed}
    assert {name: again.format_of(name) for name in again.layers} == packed


@SOON
@given(wanted=choices(), storage=st.sampled_from([torch.float16, torch.bfloat16]))
def test_the_bytes_of_the_file_are_those_that_were_counted(wanted: dict[str, Choice], storage: torch.dtype) -> None:
    wanted = {name: Choice(choice.format, False, choice.quantizer) for name, choice in wanted.items()}
    with tempfile.TemporaryDirectory() as folder:
        write_packed(
            MODEL, ModuleSource(MODEL), wanted, Path(folder), "model", quantization=Quantization(storage=storage)
        )
        found = stored_tensors(Path(folder).glob("*.safetensors"))
    counted = ByteAccount.of(Target({"unet": MODEL}), storage).total(
        {name: choice.format for name, choice in wanted.items()}
    )
    assert sum(stored.spec.nbytes for stored in found.values()) == counted
