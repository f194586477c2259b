"""The calibration file belongs to one policy, which records its hash."""

from __future__ import annotations

import gc
import hashlib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import ModelReference
from bitpolicy.policies.storage.calibration_file import calibration_of, load_calibration, save_calibration

MEANS = {"conv_in": torch.randn(4, 3, 3), "attn.to_q": torch.randn(16)}
MEASURED = Calibration(MEANS)


def test_a_saved_calibration_is_read_back(tmp_path: Path) -> None:
    save_calibration(MEASURED, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors", MEASURED.sha256)
    assert set(found.input_means) == set(MEANS)
    assert all(torch.equal(found.input_means[name], MEANS[name]) for name in MEANS)
    assert not found.rounded


def test_tensors_that_were_read_are_not_kept(tmp_path: Path) -> None:
    """A file with rounded weights is as large as the checkpoint."""
    save_calibration(MEASURED, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors").input_means
    assert list(found) == sorted(MEANS)
    assert "attn.to_k" not in found
    with pytest.raises(KeyError):
        found["attn.to_k"]
    held = weakref.ref(found["conv_in"])
    gc.collect()
    assert held() is None


def test_two_files_of_the_same_means_are_the_same_bytes(tmp_path: Path) -> None:
    save_calibration(MEASURED, tmp_path / "a")
    save_calibration(Calibration(dict(reversed(MEANS.items()))), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strided_means_are_saved_as_they_read(tmp_path: Path) -> None:
    strided = torch.arange(6.0).reshape(2, 3).t()
    save_calibration(Calibration({"a": strided}), tmp_path / "a")
    assert torch.equal(load_calibration(tmp_path / "a").input_means["a"], strided)


@pytest.mark.parametrize(
    "other",
    [
        {"conv_in": MEANS["conv_in"]},
        {**MEANS, "conv_in": MEANS["conv_in"] + 1e-6},
        {"conv_in": MEANS["conv_in"], "attn.to_k": MEANS["attn.to_q"]},
        {**MEANS, "conv_in": MEANS["conv_in"].reshape(4, 9)},
    ],
    ids=["fewer", "another value", "another name", "another shape"],
)
def test_another_calibration_has_another_hash_and_is_refused(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    save_calibration(Calibration(other), tmp_path / "calibration.safetensors")
    with pytest.raises(BitPolicyError, match=r"has hash sha256:.*the policy was made with sha256:.*; use the file"):
        load_calibration(tmp_path / "calibration.safetensors", MEASURED.sha256)


@pytest.mark.parametrize(
    "content", [None, b"", b"no safetensors", b"\xff" * 64], ids=["missing", "empty", "text", "junk"]
)
def test_an_unreadable_file_is_an_error_with_the_remedy(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BitPolicyError, match="keep the two together, or set bias_correction: false") as found:
        load_calibration(path)
    assert "git-lfs" not in str(found.value)
    assert ("is missing; the policy needs the calibration" in str(found.value)) == (content is None)


INT4, INT8, FP8 = (format_named(name) for name in ("int4", "int8", "fp8"))


def rounded(*choices: tuple[str, Choice]) -> dict[RoundedKey, torch.Tensor]:
    """Tensors as quantizers make them, of 2 x 64 weights."""
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    return {
        RoundedKey.of(layer, choice, suffix): tensor
        for layer, choice in choices
        for suffix, tensor in choice.format.quantize(weight).items()
    }


def test_an_export_needs_every_mean_and_only_the_rounded_weights_that_were_chosen() -> None:
    made = rounded(
        ("conv_in", Choice(INT4, quantizer="gptq")),
        ("conv_in", Choice(INT4, quantizer="mse")),
        ("conv_in", Choice(INT8, quantizer="gptq")),
        ("conv_in_2", Choice(INT4, quantizer="gptq")),
        ("attn.to_q", Choice(INT4, quantizer="gptq")),
        ("attn.to_k", Choice(INT4, quantizer="gptq-trajectory")),
    )
    chosen = {
        "conv_in": Choice(INT4, True, "gptq"),
        "conv_in_2": Choice(FP16),
        "attn.to_q": Choice(INT4),  # rounded to nearest
        "attn.to_k": Choice(INT4, False, "gptq-trajectory"),
    }
    kept = Calibration(MEANS, made).needed_for(chosen)
    suffixes = ("weight_packed", "weight_scale", "weight_zero")
    assert kept.input_means == MEANS
    assert set(kept.rounded) == {
        *(RoundedKey("conv_in", "int4", "gptq", suffix) for suffix in suffixes),
        *(RoundedKey("attn.to_k", "int4", "gptq-trajectory", suffix) for suffix in suffixes),
    }
    assert all(torch.equal(tensor, made[key]) for key, tensor in kept.rounded.items())


def test_several_policies_need_what_any_of_them_needs() -> None:
    one, other = (Choice(INT4, quantizer=quantizer) for quantizer in ("gptq", "mse"))
    made = rounded(("conv_in", one), ("conv_in", other), ("conv_in", Choice(INT8, quantizer="gptq")))
    kept = Calibration(MEANS, made).needed_for({"conv_in": one}, {"conv_in": other})
    assert {key[1:3] for key in kept.rounded} == {("int4", "gptq"), ("int4", "mse")}


def test_the_names_of_both_parts_in_the_file_do_not_change(tmp_path: Path) -> None:
    made = rounded(("conv_in", Choice(INT8, quantizer="gptq")))
    save_calibration(Calibration(MEANS, made, "a" * 64), tmp_path / "calibration.safetensors")
    assert load_file(tmp_path / "calibration.safetensors").keys() == {
        *("attn.to_q", "conv_in", "made from"),
        *("conv_in/int8/gptq/weight_packed", "conv_in/int8/gptq/weight_scale"),
    }


def test_the_tensors_of_a_file_make_the_same_calibration() -> None:
    made = Calibration(MEANS, rounded(("conv_in", Choice(INT4, quantizer="gptq"))), "a" * 64)
    again = Calibration.of(dict(made.tensors()))
    assert again.sha256 == made.sha256
    assert again.nbytes == made.nbytes == sum(tensor.nbytes for tensor in made.tensors().values())
    assert (set(again.input_means), set(again.rounded)) == (set(made.input_means), set(made.rounded))
    assert again.made_from == "a" * 64


@pytest.mark.parametrize("name", ["a/b", "a/int4/gptq", "a/int4/gptq/weight_packed/b", "/"])
def test_a_tensor_with_another_kind_of_name_is_ignored(name: str) -> None:
    found = Calibration.of({**MEANS, name: torch.ones(1)})
    assert set(found.tensors()) == set(MEANS)


def test_each_of_several_components_has_its_own_entries() -> None:
    means = {"unet.conv_in": torch.ones(3), "vae.conv_in": torch.zeros(3)}
    made = rounded(*((name, Choice(INT4, quantizer="gptq")) for name in means))
    whole = Calibration(means, made, "a,b")
    one = whole.of_component("vae", ["unet", "vae"])
    assert one.input_means.keys() == {"conv_in"}
    assert torch.equal(one.input_means["conv_in"], torch.zeros(3))
    assert {key.layer for key in one.rounded} == {"conv_in"}
    assert len(one.rounded) == 3
    assert whole.of_component("unet", ["unet"]) is whole


def test_packed_tensors_of_every_dtype_are_saved_and_read_back(tmp_path: Path) -> None:
    whole = Calibration(MEANS, rounded(*((f.name, Choice(f, quantizer="gptq")) for f in (INT4, INT8, FP8))))
    save_calibration(whole, tmp_path / "calibration.safetensors")
    made = whole.tensors()
    found = load_calibration(tmp_path / "calibration.safetensors", whole.sha256).tensors()
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: tensor.dtype for key, tensor in made.items()}
    assert all(torch.equal(found[key].view(torch.uint8), made[key].view(torch.uint8)) for key in made)


def test_another_code_is_another_calibration() -> None:
    made = rounded(("conv_in", Choice(INT4, quantizer="gptq")))
    other = {key: tensor.clone() for key, tensor in made.items()}
    other[RoundedKey("conv_in", "int4", "gptq", "weight_packed")][0, 0] ^= 1
    assert Calibration(rounded=other).sha256 != Calibration(rounded=made).sha256


def test_the_order_of_the_layers_does_not_change_the_hash() -> None:
    assert MEASURED.sha256 == Calibration(dict(reversed(MEANS.items()))).sha256


def test_the_same_bytes_under_another_dtype_are_another_calibration(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    save_calibration(MEASURED, path)
    save_file({name: tensor.view(torch.int32) for name, tensor in MEANS.items()}, path)
    with pytest.raises(BitPolicyError, match="the policy was made with"):
        load_calibration(path, MEASURED.sha256)


def test_hashes_of_older_policies_leave_out_dtypes(tmp_path: Path) -> None:
    save_calibration(MEASURED, tmp_path / "calibration.safetensors")
    old = hashlib.sha256()
    for name, tensor in sorted(MEANS.items()):
        old.update(f"{name}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    load_calibration(tmp_path / "calibration.safetensors", f"sha256:{old.hexdigest()}")


# Which weights it is of


def a_policy(weights: str, calibration: Calibration) -> Policy:
    model = ModelReference(id="owner/toy", component="unet", class_name="UNet2DConditionModel", sha256=weights)
    return Policy(model=model, provenance={"calibration": calibration.sha256})


@pytest.mark.parametrize(
    "kept",
    [MEASURED, Calibration(rounded=rounded(("conv_in", Choice(INT4, quantizer="gptq"))))],
    ids=["means", "codes"],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_calibration_records_its_weights_and_is_refused_for_others(
    tmp_path: Path, kept: Calibration, in_memory: bool
) -> None:
    made = kept.stamped("a" * 64)
    choices = [Choice(INT4, True)]
    save_calibration(made, tmp_path / "calibration.safetensors")
    own, other = a_policy("a" * 64, made), a_policy("b" * 64, made)
    if in_memory:
        own, other = own.with_calibration(made), other.with_calibration(made)
    found = calibration_of(own, tmp_path / "policy.yaml", choices)
    assert found.made_from == "a" * 64
    assert found.tensors().keys() - kept.tensors().keys() == {"made from"}
    needles = r"made from weights with sha256 a{12}\.\.\., .*policy is for owner/toy .*b{12}\.\.\., .*run search"
    with pytest.raises(BitPolicyError, match=needles):
        calibration_of(other, tmp_path / "policy.yaml", choices)


def test_a_calibration_of_an_older_version_records_no_weights_and_is_accepted(tmp_path: Path) -> None:
    save_calibration(MEASURED, tmp_path / "calibration.safetensors")
    found = calibration_of(a_policy("b" * 64, MEASURED), tmp_path / "policy.yaml", [Choice(INT4, True)])
    assert found.made_from is None
    assert found.tensors().keys() == MEANS.keys()


def test_the_hash_of_a_calibration_covers_the_hash_of_the_weights() -> None:
    hashes = {MEASURED.sha256, *(MEASURED.stamped(weights).sha256 for weights in ("a", "b", "a,b"))}
    assert len(hashes) == 4
    assert Calibration().stamped("a").made_from is None
    assert not Calibration().stamped("a")


def test_a_calibration_records_the_weights_of_all_components(tmp_path: Path) -> None:
    save_calibration(MEASURED.stamped("a" * 64 + "," + "b" * 64), tmp_path / "calibration.safetensors")
    assert load_calibration(tmp_path / "calibration.safetensors").made_from == "a" * 64 + "," + "b" * 64
