"""The calibration file belongs to one policy, and says so by its hash."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.calibration import (
    calibration_hash,
    calibration_of,
    is_rounded,
    load_calibration,
    made_from,
    needed_for,
    rounded_key,
    save_calibration,
    stamped,
)
from bitpolicy.policies.policy import Choice, ModelReference, Policy

MEANS = {"conv_in": torch.randn(4, 3, 3), "attn.to_q": torch.randn(16)}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    save_calibration(MEANS, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors", calibration_hash(MEANS))
    assert set(found) == set(MEANS)
    assert all(torch.equal(found[name], MEANS[name]) for name in MEANS)


def test_what_is_read_is_held_by_nobody(tmp_path: Path) -> None:
    """With rounded weights in it the file is as large as the checkpoint."""
    save_calibration(MEANS, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors")
    assert list(found) == sorted(MEANS)
    assert "attn.to_k" not in found
    with pytest.raises(KeyError):
        found["attn.to_k"]
    held = weakref.ref(found["conv_in"])
    gc.collect()
    assert held() is None


def test_two_files_of_the_same_means_are_the_same_bytes(tmp_path: Path) -> None:
    save_calibration(MEANS, tmp_path / "a")
    save_calibration(dict(reversed(MEANS.items())), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_strided_means_are_saved_as_they_read(tmp_path: Path) -> None:
    strided = torch.arange(6.0).reshape(2, 3).t()
    save_calibration({"a": strided}, tmp_path / "a")
    assert torch.equal(load_calibration(tmp_path / "a")["a"], strided)


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
    save_calibration(other, tmp_path / "calibration.safetensors")
    with pytest.raises(BitPolicyError, match=r"has hash sha256:.*, the policy was made with sha256:.*; use the file"):
        load_calibration(tmp_path / "calibration.safetensors", calibration_hash(MEANS))


@pytest.mark.parametrize(
    "content", [None, b"", b"no safetensors", b"\xff" * 64], ids=["missing", "empty", "text", "junk"]
)
def test_a_file_that_cannot_be_read_is_told_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "calibration.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BitPolicyError, match="keep the two together, or set bias_correction: false") as found:
        load_calibration(path)
    assert "git-lfs" not in str(found.value)
    assert ("is missing; the policy needs the calibration" in str(found.value)) == (content is None)


INT4, INT8, FP8 = (format_named(name) for name in ("int4", "int8", "fp8"))


def rounded(*choices: tuple[str, Choice]) -> dict[str, torch.Tensor]:
    """Tensors as quantizers make them, of 2 x 64 weights."""
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    return {
        rounded_key(layer, choice, suffix): tensor
        for layer, choice in choices
        for suffix, tensor in choice.format.quantize(weight).items()
    }


def test_every_mean_is_needed_and_of_what_was_rounded_just_what_was_chosen() -> None:
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
    kept = needed_for(chosen, {**MEANS, **made})
    suffixes = ("weight_packed", "weight_scale", "weight_zero")
    assert set(kept) == {
        *MEANS,
        *(f"conv_in/int4/gptq/{suffix}" for suffix in suffixes),
        *(f"attn.to_k/int4/gptq-trajectory/{suffix}" for suffix in suffixes),
    }
    assert all(torch.equal(kept[key], made[key]) for key in kept if key not in MEANS)


def test_a_calibration_is_rounded_when_it_holds_packed_tensors() -> None:
    assert not is_rounded(MEANS)
    assert not is_rounded({})
    assert is_rounded({**MEANS, **rounded(("conv_in", Choice(INT4, quantizer="mse")))})


def test_packed_tensors_of_every_dtype_are_saved_and_read_back(tmp_path: Path) -> None:
    made = {**MEANS, **rounded(*((f.name, Choice(f, quantizer="gptq")) for f in (INT4, INT8, FP8)))}
    save_calibration(made, tmp_path / "calibration.safetensors")
    found = load_calibration(tmp_path / "calibration.safetensors", calibration_hash(made))
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: tensor.dtype for key, tensor in made.items()}
    assert all(torch.equal(found[key].view(torch.uint8), made[key].view(torch.uint8)) for key in made)


def test_another_code_is_another_calibration() -> None:
    made = rounded(("conv_in", Choice(INT4, quantizer="gptq")))
    other = {key: tensor.clone() for key, tensor in made.items()}
    other["conv_in/int4/gptq/weight_packed"][0, 0] ^= 1
    assert calibration_hash(other) != calibration_hash(made)


def test_the_order_of_the_layers_does_not_change_the_hash() -> None:
    assert calibration_hash(MEANS) == calibration_hash(dict(reversed(MEANS.items())))


# Which weights it is of


def a_policy(weights: str, calibration: dict[str, torch.Tensor]) -> Policy:
    model = ModelReference(id="owner/toy", component="unet", class_name="UNet2DConditionModel", sha256=weights)
    return Policy(model=model, provenance={"calibration": calibration_hash(calibration)})


@pytest.mark.parametrize("kept", [MEANS, rounded(("conv_in", Choice(INT4, quantizer="gptq")))], ids=["means", "codes"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_it_says_which_weights_it_is_of_and_is_refused_for_others(
    tmp_path: Path, kept: dict[str, torch.Tensor], in_memory: bool
) -> None:
    made = stamped(kept, "a" * 64)
    choices = [Choice(INT4, True)]
    save_calibration(made, tmp_path / "calibration.safetensors")
    own, other = a_policy("a" * 64, made), a_policy("b" * 64, made)
    if in_memory:
        own, other = own.with_calibration(made), other.with_calibration(made)
    found = calibration_of(own, tmp_path / "policy.yaml", choices)
    assert made_from(found) == "a" * 64
    assert found.keys() - kept.keys() == {"made from"}
    needles = r"made from weights with sha256 a{12}\.\.\., the policy is for owner/toy with b{12}\.\.\.: .*run search"
    with pytest.raises(BitPolicyError, match=needles):
        calibration_of(other, tmp_path / "policy.yaml", choices)


def test_one_of_an_older_version_does_not_say_and_is_taken(tmp_path: Path) -> None:
    save_calibration(MEANS, tmp_path / "calibration.safetensors")
    found = calibration_of(a_policy("b" * 64, MEANS), tmp_path / "policy.yaml", [Choice(INT4, True)])
    assert made_from(found) is None
    assert found.keys() == MEANS.keys()


def test_its_hash_is_of_the_weights_too() -> None:
    hashes = {calibration_hash(MEANS), *(calibration_hash(stamped(MEANS, weights)) for weights in ("a", "b", "a,b"))}
    assert len(hashes) == 4
    assert is_rounded(stamped(MEANS, "a")) is False
    assert stamped({}, "a") == {}


def test_the_weights_of_several_components_are_all_said(tmp_path: Path) -> None:
    save_calibration(stamped(MEANS, "a" * 64 + "," + "b" * 64), tmp_path / "calibration.safetensors")
    assert made_from(load_calibration(tmp_path / "calibration.safetensors")) == "a" * 64 + "," + "b" * 64
