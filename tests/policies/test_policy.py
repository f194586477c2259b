"""The policy file: every layer gets what a person wrote, and the error for a mistake says what to write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.policy_records import LayerSettings, PolicyError, Rule

TEXT = """
bitpolicy: 1
model: {id: someone/some-model, revision: main, component: unet, class: UNet2DConditionModel, sha256: 5b0c}
budget: {asked: 0.6GB, bytes: 600000000, scope: weights}
storage_dtype: bfloat16
formats:
  int4: {kind: affine, bits: 4, group: 64, symmetric: false}
  int8: {kind: affine, bits: 8, group: channel, symmetric: true}
defaults: {format: int8, quantizer: rtn, bias_correction: true}
rules:
- {match: '*.attn1.*', format: int4}
- {match: '*.to_v', bias_correction: false}
layers:
  conv_out: {format: fp16}
  block.attn1.to_k: {format: int8}
result: {policy_bytes: 599873412, predicted_error: 0.0031, psnr_db: 34.2}
provenance:
  bitpolicy: 0.1.0
  probe: {method: adjoint, sketches: 32}
"""
NAMES = ["conv_in", "block.attn1.to_q", "block.attn1.to_k", "block.attn1.to_v", "block.attn2.to_v", "conv_out"]
INT4, INT8 = format_named("int4"), format_named("int8")


def read(folder: Path, text: str) -> Policy:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return Policy.load(path)


def changed(**fields: Any) -> str:
    """TEXT with other top-level entries; None removes one."""
    data = yaml.safe_load(TEXT) | fields
    return yaml.safe_dump({name: value for name, value in data.items() if value is not None})


def test_rules_override_the_defaults_and_exact_names_override_the_rules(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT).resolve(NAMES) == {
        "conv_in": Choice(INT8, True),
        "block.attn1.to_q": Choice(INT4, True),
        "block.attn1.to_k": Choice(INT8, True),
        "block.attn1.to_v": Choice(INT4, False),
        "block.attn2.to_v": Choice(INT8, False),
        "conv_out": Choice(FP16, False),
    }


def test_later_rules_win(tmp_path: Path) -> None:
    rules = [
        {"match": "*", "format": "int4"},
        {"match": "conv_*", "format": "int8"},
        {"match": "*out", "format": "fp16"},
    ]
    policy = read(tmp_path, changed(rules=rules, layers={}))
    formats = {name: choice.format.name for name, choice in policy.resolve(NAMES).items()}
    assert formats == dict.fromkeys(NAMES, "int4") | {"conv_in": "int8", "conv_out": "fp16"}


def test_a_layer_without_an_entry_stays_fp16(tmp_path: Path) -> None:
    policy = read(tmp_path, changed(defaults=None, rules=None, layers=None))
    assert set(policy.resolve(NAMES).values()) == {Choice(FP16)}


def test_fp16_layers_have_no_bias_correction(tmp_path: Path) -> None:
    policy = read(tmp_path, changed(defaults={"format": "fp16", "bias_correction": True}, rules=None, layers=None))
    assert not any(choice.bias_correction for choice in policy.resolve(NAMES).values())


def test_the_layers_keep_the_order_of_the_model(tmp_path: Path) -> None:
    assert list(read(tmp_path, TEXT).resolve(NAMES)) == NAMES


def test_reading_and_writing_a_file_keeps_its_content(tmp_path: Path) -> None:
    policy = read(tmp_path, TEXT)
    policy.save(tmp_path / "again.yaml")
    assert Policy.load(tmp_path / "again.yaml") == policy
    assert policy.model.class_name == "UNet2DConditionModel"
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == yaml.safe_load(TEXT)


def test_nothing_is_lost_where_the_provenance_has_an_empty_entry(tmp_path: Path) -> None:
    policy = read(tmp_path, changed(provenance={"search": {"seed": None, "trials": 0}, "prompts": []}))
    policy.save(tmp_path / "again.yaml")
    assert Policy.load(tmp_path / "again.yaml") == policy


@pytest.mark.parametrize("sha256", ["123456", "12e4", "0x1f", "null", "1_000"])
def test_a_hash_stays_text_even_if_it_looks_like_a_number(tmp_path: Path, sha256: str) -> None:
    policy = read(tmp_path, TEXT)
    policy = policy.model_copy(update={"model": policy.model.model_copy(update={"sha256": sha256})})
    policy.save(tmp_path / "again.yaml")
    assert Policy.load(tmp_path / "again.yaml").model.sha256 == sha256


def test_short_entries_are_written_on_one_line(tmp_path: Path) -> None:
    lines = read(tmp_path, TEXT).to_yaml().splitlines()
    assert "  conv_out: {format: fp16}" in lines
    assert "- {format: int4, match: '*.attn1.*'}" in lines or "- {match: '*.attn1.*', format: int4}" in lines


def test_a_policy_made_from_choices_gives_each_layer_its_own(tmp_path: Path) -> None:
    choices = {
        "a": Choice(INT8, True),
        "b": Choice(INT8, True),
        "c": Choice(INT8, False),
        "d": Choice(INT4, True),
        "e": Choice(INT4, False),
        "f": Choice(FP16),
    }
    policy = Policy.of(choices, model=read(tmp_path, TEXT).model)
    assert policy.resolve(choices) == choices
    assert Policy.model_validate(yaml.safe_load(policy.to_yaml())).resolve(choices) == choices
    assert set(policy.layers) == {"c", "d", "e", "f"}, "the commonest choice is the default"
    assert set(policy.formats) == {"int4", "int8", "fp16"}


def test_each_layer_keeps_the_quantizer_it_was_scored_with(tmp_path: Path) -> None:
    choices = {
        "a": Choice(INT4, True, "gptq"),
        "b": Choice(INT4, True, "gptq"),
        "c": Choice(INT4, True, "rtn"),
        "d": Choice(INT8, False, "gptq-trajectory"),
        "e": Choice(format_named("int3-g32-sym-rot"), True, "mse"),
        "f": Choice(format_named("nf4"), True, "hqq"),
        "g": Choice(FP16),
    }
    policy = Policy.of(choices, model=read(tmp_path, TEXT).model)
    policy.save(tmp_path / "again.yaml")
    assert Policy.load(tmp_path / "again.yaml").resolve(choices) == policy.resolve(choices) == choices
    assert policy.defaults == LayerSettings(format="int4", quantizer="gptq", bias_correction=True)
    assert policy.layers["c"] == LayerSettings(quantizer="rtn")
    assert policy.layers["g"] == LayerSettings(format="fp16"), "what is not packed is not rounded"
    assert policy.formats["int3-g32-sym-rot"]["rotation"] == "hadamard"


def test_a_rule_may_name_a_quantizer(tmp_path: Path) -> None:
    text = changed(rules=[{"match": "conv_*", "format": "int4", "quantizer": "mse"}], layers={})
    found = read(tmp_path, text).resolve(NAMES)
    assert {choice.quantizer for name, choice in found.items() if name.startswith("conv_")} == {"mse"}
    assert {choice.quantizer for name, choice in found.items() if not name.startswith("conv_")} == {"rtn"}


def test_a_policy_of_an_older_version_without_quantizers_rounds_to_nearest(tmp_path: Path) -> None:
    text = changed(defaults={"format": "int8"}, rules=[], layers={})
    assert {choice.quantizer for choice in read(tmp_path, text).resolve(NAMES).values()} == {"rtn"}


def test_the_policy_holds_the_calibration_and_its_file_does_not(tmp_path: Path) -> None:
    policy = read(tmp_path, TEXT)
    holding = policy.with_calibration({"conv_in": torch.ones(3)})
    assert policy.calibration is None
    assert holding.calibration is not None
    assert torch.equal(holding.calibration.input_means["conv_in"], torch.ones(3))
    assert holding.to_yaml() == policy.to_yaml()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"bitpolicy": 2}, "bitpolicy: "),
        ({"layer": {}}, "layer: "),
        ({"model": {"id": "x"}}, "model.component: Field required"),
        ({"model": None}, "model: Field required"),
        ({"storage_dtype": "float32"}, "storage_dtype: Input should be 'float16' or 'bfloat16'"),
        ({"defaults": {"formt": "int8"}}, "defaults.formt: "),
        (
            {"defaults": {"quantizer": "magic"}},
            "defaults.quantizer: Value error, unknown quantizer 'magic'; write any of rtn, mse, hqq",
        ),
        ({"defaults": "int8"}, "defaults: "),
        ({"rules": [{"format": "int4"}]}, "rules.0.match: Field required"),
        ({"rules": [{"match": "*"}, {"match": "*", "bits": 4}]}, "rules.1.bits: "),
        ({"rules": {"match": "*"}}, "rules: "),
        ({"layers": ["conv_in"]}, "layers: "),
        ({"layers": {"conv_in": "int8"}}, "layers.conv_in: "),
        ({"layers": {"conv_in": {"format": 8}}}, "layers.conv_in.format: "),
        ({"layers": {"conv_in": {"bias_correction": "perhaps"}}}, "layers.conv_in.bias_correction: "),
        ({"budget": {"asked": "3GB", "bytes": "many"}}, "budget.bytes: "),
        ({"budget": {"asked": "3GB", "bytes": 3, "scope": "world"}}, "budget.scope: "),
        ({"result": {"policy_bytes": 1.5}}, "result.policy_bytes: "),
        ({"formats": {"int4": 4}}, "formats.int4: "),
    ],
    ids=str,
)
def test_the_error_for_a_malformed_entry_names_its_place(
    tmp_path: Path, fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(PolicyError, match=rf"policy\.yaml: {re.escape(complaint)}"):
        read(tmp_path, changed(**fields))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "found NoneType, needed a mapping with 'bitpolicy: 1'"),
        ("- int4", "found list, needed a mapping"),
        ("int4", "found str, needed a mapping"),
        ("model: [", "is not YAML"),
        ("model: \x07", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_another_kind_of_file_is_not_a_policy(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(complaint)) as raised:
        read(tmp_path, text)
    assert "\n" not in str(raised.value)


def test_a_binary_file_is_not_a_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_bytes(b"\xff\xfe\x00\x9d")
    with pytest.raises(PolicyError, match="is not YAML"):
        Policy.load(tmp_path / "policy.yaml")


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_the_error_for_an_unreadable_file_says_which_one_to_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(PolicyError, match=r"cannot read policy .*; give the policy\.yaml that search-policy wrote"):
        Policy.load(tmp_path / name)


def test_a_rule_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    policy = read(tmp_path, changed(rules=[{"match": "*.attn3.*", "format": "int4"}]))
    with pytest.raises(PolicyError, match=r"rule '\*\.attn3\.\*' matches none of the 6 layers; `bitpolicy inspect`"):
        policy.resolve(NAMES)


@pytest.mark.parametrize(
    ("name", "hint"), [("block.attn1.to_z", "did you mean 'block.attn1.to_"), ("zzz", "`bitpolicy inspect` lists")]
)
def test_the_error_for_an_unknown_layer_names_the_nearest_one(tmp_path: Path, name: str, hint: str) -> None:
    policy = read(tmp_path, changed(layers={name: {"format": "int4"}}))
    with pytest.raises(PolicyError, match=rf"layer '{name}', which this model does not have; {re.escape(hint)}"):
        policy.resolve(NAMES)


@pytest.mark.parametrize(
    "fields",
    [
        {"defaults": {"format": "int9"}},
        {"rules": [{"match": "*", "format": "int9"}]},
        {"layers": {"conv_in": {"format": "int9"}}},
        {"formats": {"int9": {"bits": 9}}},
    ],
    ids=str,
)
def test_the_error_for_an_unknown_format_lists_the_known_ones(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(BitPolicyError, match="unknown format 'int9'; write int2 to int8"):
        read(tmp_path, changed(**fields)).resolve(NAMES)


def test_a_format_with_other_parameters_is_refused(tmp_path: Path) -> None:
    formats = {"int4": {"kind": "affine", "bits": 4, "group": 32, "symmetric": False}}
    with pytest.raises(BitPolicyError, match=r"'int4' was written as .*'group': 32.*; use the bitpolicy that wrote it"):
        read(tmp_path, changed(formats=formats)).resolve(NAMES)


def test_a_star_matches_dots_and_case_counts() -> None:
    model = yaml.safe_load(TEXT)["model"]
    policy = Policy(model=model, rules=[Rule(match="a*z", format="int8")], defaults=LayerSettings(format="int4"))
    assert [c.format.name for c in policy.resolve(["a.b.z", "A.z", "az"]).values()] == ["int8", "int4", "int8"]


def test_several_components_have_a_class_and_a_hash_each(tmp_path: Path) -> None:
    several = {"id": "m", "component": "unet,vae", "class": "UNet2DModel,AutoencoderKL", "sha256": "ab,cd"}
    model = read(tmp_path, changed(model=several)).model
    assert model.hashes == {"unet": "ab", "vae": "cd"}
    assert model.components_of("AutoencoderKL") == ["vae"]
    assert model.components_of("UNet3DConditionModel") == []
    with pytest.raises(PolicyError, match=r"model: .*found 2 in component, 2 in class_name, 1 in sha256"):
        read(tmp_path, changed(model=several | {"sha256": "ab"}))


def test_for_one_component_the_entries_of_others_are_ignored(tmp_path: Path) -> None:
    rules = [{"match": "unet.*", "format": "int8"}, {"match": "vae.*", "format": "int4"}]
    policy = read(tmp_path, changed(rules=rules, layers={"vae.conv_in": {"format": "fp16"}}))
    found = policy.resolve(["unet.conv_in"], component="unet")
    assert {name: choice.format.name for name, choice in found.items()} == {"unet.conv_in": "int8"}
    with pytest.raises(PolicyError, match=r"'vae\.conv_in', which this model does not have"):
        policy.resolve(["vae.conv_out"], component="vae")
    with pytest.raises(PolicyError, match=r"rule 'vae\.\*' matches none"):
        policy.resolve(["unet.conv_in"])


def test_a_file_that_was_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    text = read(tmp_path, TEXT).to_yaml()
    whole = text.rstrip("\n")
    assert read(tmp_path, text) == read(tmp_path, whole) == read(tmp_path, TEXT)
    for end in range(len(whole)):
        with pytest.raises(PolicyError):
            read(tmp_path, text[:end])
    with pytest.raises(PolicyError, match=r"cut short: .*remove the ---"):
        read(tmp_path, text[: len(text) // 2])


def test_lines_after_the_end_of_a_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"lines after its end, a line of \.\.\.; move them above"):
        read(tmp_path, read(tmp_path, TEXT).to_yaml() + "share_qkv: true\n")
