"""`bitpolicy export --target` and `bitpolicy formats`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from bitpolicy.policies.exporters.names import NAMES
from bitpolicy.policies.exporters.targets import EXPORTERS


@pytest.fixture
def export(command: Any, finished: Any, toy: Path, here: Path) -> Any:
    """`export(*arguments)` of the finished search: half of FP16 in int4, int8 and fp16."""
    policy = finished.folder / "policy.yaml"
    return lambda *more: command("export", "--policy", policy, "--model", toy, "--output-dir", "out", *more)


@pytest.mark.parametrize("target", NAMES)
def test_a_requantized_policy_exports_to_every_program(export: Any, here: Path, target: str) -> None:
    outcome = export("--target", target, "--requantize")
    assert (outcome.code, outcome.err) == (0, "")
    assert (here / "out" / "policy.yaml").is_file()
    first, *rest = outcome.out.splitlines()
    assert first.startswith("out: ")
    if target in ("comfy", "modelopt"):  # convolutions; zero points
        assert "layers were rounded again" in rest[0]
        assert any(" int4 -> " in line for line in rest)


def test_an_unsupported_policy_is_refused_in_one_line_with_remedies(export: Any, here: Path) -> None:
    outcome = export("--target", "comfy")
    outcome.assert_refused("bitpolicy", "ComfyUI cannot hold", "Conv2d", "--requantize", "bitpolicy formats --target")
    assert not (here / "out").exists()


def test_sdnq_accepts_the_policy_unchanged(export: Any, finished: Any, here: Path) -> None:
    outcome = export("--target", "sdnq")
    assert (outcome.code, outcome.err) == (0, "")
    assert "bytes of weights" in outcome.out
    assert (here / "out" / "policy.yaml").read_bytes() == (finished.folder / "policy.yaml").read_bytes()
    config = json.loads((here / "out" / "unet" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sdnq"
    assert config["_class_name"] == "UNet2DConditionModel"


def test_a_comfy_file_records_its_origin(export: Any, finished: Any, here: Path) -> None:
    assert export("--target", "comfy", "--requantize").code == 0
    with safe_open(here / "out" / "unet.safetensors", "pt") as file:
        origin = json.loads(file.metadata()["bitpolicy"])
    assert origin["class"] == "UNet2DConditionModel"
    assert len(origin["policy_sha256"]) == len(origin["model_sha256"]) == 64


def test_an_unknown_program_is_refused_before_the_model_is_loaded(export: Any) -> None:
    export("--target", "onnx").assert_refused("bitpolicy", "unknown target 'onnx'", "comfy, comfy-int8, sdnq, torchao")


def test_requantize_without_a_target_is_refused(export: Any) -> None:
    export("--requantize").assert_refused("bitpolicy", "--requantize", "add --target")


def test_a_folder_is_replaced_only_with_overwrite(export: Any, here: Path) -> None:
    assert export("--target", "sdnq").code == 0
    export("--target", "sdnq").assert_refused("bitpolicy", "out already exists", "--overwrite")
    assert export("--target", "torchao", "--requantize", "--overwrite").code == 0
    assert sorted(path.name for path in (here / "out").iterdir()) == ["policy.yaml", "unet.torchao.json"]


@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda exporter: exporter.name)
def test_formats_lists_what_a_program_can_hold(command: Any, exporter: Any) -> None:
    outcome = command("formats", "--target", exporter.name)
    linear, conv, suggested = (line.partition(": ")[2] for line in outcome.out.splitlines())
    assert "int8" in linear.split(",")
    assert "fp16" in conv.split(",")
    assert ("int8" in conv.split(",")) == (exporter.title not in ("ComfyUI", "GGUF"))
    names = suggested.rpartition(" ")[2].split(",")
    assert set(names) <= set(linear.split(","))
    assert tuple(names) == exporter.suggested


def test_formats_without_a_program_lists_them_all(command: Any) -> None:
    names = command("formats").out.strip().split(",")
    assert {"int4", "int8", "fp16", "nf4", "int8-convrot", "nvfp4"} < set(names)
    assert len(names) == len(set(names)) == 109
