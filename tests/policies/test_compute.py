"""INT8 compute from the policy to the loaded model, and the same computation in floats on ordinary layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from bitpolicy import BitPolicyConfig, Policy, load_pipeline, set_compute
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP8, FP16, format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import packed_layers, quantizable_layers
from bitpolicy.pipelines.offload import stream_weights
from bitpolicy.policies.apply import pack, quantized, to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.checkpoints.model_card import model_card
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.identity import weights_hash
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.policy_records import LayerSettings, ModelReference, PolicyError, Result, Rule
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

INT4, INT8, NF4 = (format_named(name) for name in ("int4", "int8", "nf4"))
F16 = torch.float16
ABOUT = {"id": "toy", "component": "unet", "class": "UNet2DConditionModel", "sha256": "0"}


def computes(model: nn.Module) -> set[Compute]:
    return {layer.compute for _, layer in packed_layers(model)}


# In floats


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, named: bool = False) -> torch.Tensor:
        return self.layer(input=x) if named else self.layer(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(77, 13), (3, 5, 77)),
    "linear without a bias": (lambda: nn.Linear(64, 9, bias=False), (7, 64)),
    "conv1d": (lambda: nn.Conv1d(12, 7, 3, padding=1), (2, 12, 11)),
    "conv2d": (lambda: nn.Conv2d(5, 9, 3, stride=2, padding=1, dilation=2), (3, 5, 13, 10)),
    "conv2d, one sample": (lambda: nn.Conv2d(5, 9, 3, padding="same"), (5, 8, 9)),
    "conv2d, mirrored": (lambda: nn.Conv2d(5, 9, 3, padding=1, padding_mode="reflect"), (2, 5, 8, 9)),
    "conv2d, 32 channels": (lambda: nn.Conv2d(32, 9, 3, padding=1), (32, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 5, 6)),
}


@pytest.mark.parametrize("format", [INT4, INT8, NF4], ids=lambda format: format.name)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
def test_an_ordinary_layer_gives_what_the_packed_one_gives(kind: str, format: Any, named: bool) -> None:
    torch.manual_seed(0)
    new, shape = LAYERS[kind]
    model = Alone(to_half(new()))
    choices, x = {"layer": Choice(format)}, torch.randn(shape) * torch.linspace(0.1, 10, shape[-1])
    with torch.no_grad():
        with quantized(model, choices, quantization=Quantization()):
            exact = model(x, named)
        with quantized(model, choices, quantization=Quantization(compute=Compute.INT8)):
            found = model(x, named)
        pack(model, choices, quantization=Quantization())
        set_compute(model, "int8")
        expected = model(x, named)
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 3e-6 * largest
    assert (found - exact).abs().max() > 1e-3 * largest


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("compute", "name", "rounds"),
    [
        (Compute.FP8, "fp8", True),
        (Compute.FP8, "fp8-tensor", True),
        (Compute.FP8, "int4", False),
        (Compute.MXFP8, "mxfp4", True),
        (Compute.NVFP4, "nvfp4", True),
        (Compute.NVFP4, "mxfp8", False),
    ],
)
def test_the_same_holds_under_compute_for_certain_formats_and_only_these_round_inputs(
    kind: str, compute: Compute, name: str, rounds: bool
) -> None:
    torch.manual_seed(0)
    new, shape = LAYERS[kind]
    model = Alone(to_half(new()))
    in_blocks = compute is not Compute.FP8
    rounds = rounds and not (in_blocks and model.layer.weight.ndim > 2 and model.layer.weight.shape[1] % 32)
    choices, x = {"layer": Choice(format_named(name))}, torch.randn(shape) * torch.linspace(0.1, 10, shape[-1])
    with torch.no_grad():
        with quantized(model, choices, quantization=Quantization()):
            exact = model(x)
        with quantized(model, choices, quantization=Quantization(compute=compute)):
            found = model(x)
        pack(model, choices, quantization=Quantization())
        assert set_compute(model, compute) == (["layer"] if rounds else [])
        expected = model(x)
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 3e-6 * largest
    assert ((found - exact).abs().max() > 1e-3 * largest) == rounds


def to_half(layer: nn.Module) -> nn.Module:
    to_storage(layer, F16)
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(31, 8), nn.Conv2d(64, 64, 3, groups=2)], ids=["short rows", "groups"])
def test_layers_that_do_not_suit_8_bits_stay_exact(layer: nn.Module) -> None:
    model = Alone(to_half(layer))
    x = torch.randn(4, 31) if isinstance(layer, nn.Linear) else torch.randn(2, 64, 5, 5)
    with torch.no_grad():
        with quantized(model, {"layer": Choice(INT4)}, quantization=Quantization()):
            expected = model(x)
        with quantized(model, {"layer": Choice(INT4)}, quantization=Quantization(compute=Compute.INT8)):
            assert torch.equal(model(x), expected)


def test_fp16_layers_and_layers_without_a_choice_keep_their_inputs(toy_unet: Any, predict: Any) -> None:
    before = predict(toy_unet)
    with quantized(toy_unet, {"conv_out": Choice(FP16)}, quantization=Quantization(compute=Compute.INT8)):
        assert torch.equal(predict(toy_unet), before)


def test_inputs_and_weights_are_as_before_after_the_block(
    toy_unet: Any, every_format_in_turn: Any, calibrate: Any, predict: Any
) -> None:
    before, choices, means = predict(toy_unet), every_format_in_turn(toy_unet), calibrate(toy_unet)
    with quantized(toy_unet, choices, quantization=Quantization(calibration=Calibration(means), compute=Compute.INT8)):
        assert any(layer._forward_pre_hooks for layer in toy_unet.modules())
    with (
        pytest.raises(KeyboardInterrupt),
        quantized(toy_unet, choices, quantization=Quantization(calibration=Calibration(means), compute=Compute.INT8)),
    ):
        raise KeyboardInterrupt
    del means[next(name for name, choice in reversed(choices.items()) if choice.bias_correction)]
    with (
        pytest.raises(BitPolicyError, match="needs its mean input"),
        quantized(toy_unet, choices, quantization=Quantization(calibration=Calibration(means), compute=Compute.INT8)),
    ):
        pass
    assert not any(layer._forward_pre_hooks for layer in toy_unet.modules())
    assert torch.equal(predict(toy_unet), before)


def db(a: torch.Tensor, b: torch.Tensor, range_: float = 1.0) -> float:
    return float(-10 * torch.log10((a - b).square().mean() / range_**2))


def image(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a red heart", num_inference_steps=4, output_type="pt", generator=seed).images


def test_a_pipeline_draws_the_same_as_the_packed_one(exported: Any, tmp_path: Path) -> None:
    """Up to the rounding of float sums, which moves some inputs across a tie. Quantizing has a much larger effect."""
    policy = exported.policy.under(Compute.INT8)
    export_pipeline(exported.pipe, ["unet"], policy, exported.calibration, tmp_path / "c", component_dtype=F16)
    reference = image(exported.pipe)
    with quantized(
        exported.pipe.unet,
        exported.choices,
        quantization=Quantization(calibration=exported.calibration, compute=Compute.INT8),
    ):
        found = image(exported.pipe)
    with quantized(exported.pipe.unet, exported.choices, quantization=Quantization(calibration=exported.calibration)):
        exact = image(exported.pipe)
    packed = image(load_pipeline(tmp_path / "c", torch.float32))
    assert db(found, packed) > 55
    assert db(found, packed) > db(found, reference) + 20
    assert db(found, packed) > db(exact, packed) + 10


def test_streamed_weights_change_nothing(new_toy_pipeline: Any, every_format_in_turn: Any, predict: Any) -> None:
    """An offloading hook replaces the `forward` of layers."""
    pipe = new_toy_pipeline()
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(pipe.unet).items()}
    with quantized(pipe.unet, choices, quantization=Quantization(compute=Compute.INT8)):
        expected = predict(pipe.unet)
    stream_weights(pipe, Target.of(pipe, ["unet"]), torch.device("cpu"))
    with quantized(pipe.unet, choices, quantization=Quantization(compute=Compute.INT8)):
        assert torch.equal(predict(pipe.unet), expected)


# In the policy


@pytest.mark.parametrize("compute", ["int8", "fp8", "nvfp4"])
def test_a_policy_file_records_the_compute_unless_it_is_exact(tmp_path: Path, compute: str) -> None:
    policy = Policy(model=ABOUT)
    assert "compute" not in policy.to_yaml()
    policy.model_copy(update={"compute": compute}).save(tmp_path / "policy.yaml")
    text = (tmp_path / "policy.yaml").read_text()
    assert f"\ncompute: {compute}\n" in text
    assert Policy.load(tmp_path / "policy.yaml").compute == compute
    (tmp_path / "policy.yaml").write_text(text.replace(f"compute: {compute}\n", ""))
    assert Policy.load(tmp_path / "policy.yaml") == policy


@pytest.mark.parametrize("value", ["int2", "float", "8", "[int8]"])
def test_a_policy_with_an_unknown_compute_is_refused_with_a_list_of_the_known_ones(tmp_path: Path, value: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(Policy(model=ABOUT).to_yaml().replace("...\n", f"compute: {value}\n...\n"))
    with pytest.raises(PolicyError, match=r"policy.yaml: compute: .*'exact', 'int8', 'fp8', 'mxfp8' or 'nvfp4'"):
        Policy.load(path)


def test_results_of_one_compute_are_dropped_under_another() -> None:
    policy = Policy(model=ABOUT, result=Result(policy_bytes=7, predicted_error=0.1, psnr_db=40.0))
    policy = policy.with_calibration({"a": torch.ones(1)})
    other = policy.under(Compute.INT8)
    assert (other.compute, other.result) == ("int8", Result(policy_bytes=7))
    assert other.calibration == policy.calibration
    assert policy.under(Compute.EXACT) == policy
    assert other.under(Compute.INT8) == other
    assert other.under(Compute.EXACT).compute == "exact"


@pytest.mark.parametrize(
    "entries",
    [
        {"defaults": LayerSettings(format="fp8")},
        {"rules": [Rule(match="*", format="fp8")]},
        {"layers": {"a": LayerSettings(format="fp8")}},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_fp8_compute_is_for_policies_with_fp8(entries: dict[str, Any]) -> None:
    assert Policy(model=ABOUT, **entries).under(Compute.FP8).compute == "fp8"
    without = Policy(model=ABOUT, defaults=LayerSettings(format="int8"))
    with pytest.raises(PolicyError, match="the policy has none"):
        without.under(Compute.FP8)
    with pytest.raises(PolicyError, match=r"inputs of mxfp8 and mxfp4 layers.* search with mxfp8 among"):
        Policy(model=ABOUT, **entries).under(Compute.MXFP8)


def test_a_model_card_says_how_layers_compute() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for compute, words in (
        ("exact", "dequantized weights (`compute: exact`)"),
        ("int8", "(`compute: int8`)"),
        ("fp8", "(`compute: fp8`)"),
        ("mxfp8", "(`compute: mxfp8`)"),
        ("nvfp4", "(`compute: nvfp4`)"),
    ):
        text = model_card(Policy(model=ABOUT, compute=compute), Target({"unet": model}), {"0": Choice(INT8)})
        (row,) = (line for line in text.splitlines() if line.startswith("| packed layers compute |"))
        assert words in row


# In the checkpoint


def test_a_checkpoint_of_fp8_compute_loads_with_it_and_is_saved_with_it(exported: Any, tmp_path: Path) -> None:
    choices = {name: Choice(FP8) for name in exported.choices}
    export_component(exported.pipe.unet, choices, tmp_path / "packed", quantization=Quantization(compute=Compute.FP8))
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "packed")
    assert computes(unet) == {Compute.FP8}
    assert Compute.FP8 in {layer.effective_compute for _, layer in packed_layers(unet)}
    unet.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again")["compute"] == "fp8"


@pytest.fixture(scope="module")
def folder(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `exported` with INT8 compute."""
    path = tmp_path_factory.mktemp("int8") / "checkpoint"
    policy = exported.policy.under(Compute.INT8)
    export_pipeline(exported.pipe, ["unet"], policy, exported.calibration, path, component_dtype=F16)
    return path


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_two_checkpoints_differ_only_in_their_configs_and_texts(exported: Any, folder: Path) -> None:
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(exported.folder)) for p in exported.folder.rglob("*") if p.is_file()}
    other = {name for name in names if (folder / name).read_bytes() != (exported.folder / name).read_bytes()}
    assert other == {"unet/config.json", "policy.yaml", "README.md", "bitpolicy.json"}
    assert recorded(folder / "unet") == recorded(exported.folder / "unet") | {"compute": "int8"}


def test_a_checkpoint_loads_with_the_compute_that_it_records(exported: Any, folder: Path) -> None:
    assert computes(DiffusionPipeline.from_pretrained(folder).unet) == {Compute.INT8}
    assert computes(load_pipeline(folder, torch.float32).unet) == {Compute.INT8}
    assert computes(UNet2DConditionModel.from_pretrained(exported.folder / "unet")) == {Compute.EXACT}


def test_a_model_that_is_saved_again_keeps_its_compute(folder: Path, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert computes(again) == {Compute.INT8}
    again.save_pretrained(tmp_path / "twice")
    assert recorded(tmp_path / "twice")["compute"] == "int8"


@pytest.mark.parametrize("value", ["int2", "float", 8, None])
def test_a_checkpoint_with_an_unknown_compute_is_refused(folder: Path, tmp_path: Path, value: Any) -> None:
    config = recorded(folder / "unet") | {"compute": value}
    with pytest.raises(BitPolicyError, match="compute"):
        BitPolicyConfig.from_dict(config)
    if value == "int2":
        with pytest.raises(
            BitPolicyError,
            match=r"'int2'.*write any of exact, int8, fp8, mxfp8, nvfp4.*or install the bitpolicy that wrote",
        ):
            BitPolicyConfig.from_dict(config)


def test_a_policy_that_is_applied_while_reading_sets_the_compute(exported: Any, tmp_path: Path) -> None:
    exported.pipe.save_pretrained(tmp_path / "full")
    policy = exported.policy.under(Compute.INT8).with_calibration(exported.calibration)
    for config in (
        BitPolicyConfig(policy=policy),
        PipelineQuantizationConfig(quant_mapping={"unet": BitPolicyConfig(policy=policy)}),
    ):
        if isinstance(config, BitPolicyConfig):
            unet = UNet2DConditionModel.from_pretrained(tmp_path / "full", subfolder="unet", quantization_config=config)
        else:
            unet = DiffusionPipeline.from_pretrained(tmp_path / "full", quantization_config=config).unet
        assert computes(unet) == {Compute.INT8}
        unet.save_pretrained(tmp_path / "packed")
        assert recorded(tmp_path / "packed")["compute"] == "int8"


def test_a_compute_in_addition_to_a_policy_is_refused(exported: Any) -> None:
    with pytest.raises(BitPolicyError, match="omit compute"):
        BitPolicyConfig(policy=exported.policy, compute="int8")


def test_a_text_encoder_loads_with_its_compute_through_transformers(new_toy_pipeline: Any, tmp_path: Path) -> None:
    model = new_toy_pipeline().text_encoder
    to_storage(model, F16)
    choices = {name: Choice(INT8) for name, _ in quantizable_layers(model)}
    model.save_pretrained(tmp_path / "full")
    export_component(model, choices, tmp_path / "packed", quantization=Quantization(compute=Compute.INT8))
    found = CLIPTextModel.from_pretrained(tmp_path / "packed")
    assert computes(found) == {Compute.INT8}
    found.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again")["compute"] == "int8"
    assert computes(CLIPTextModel.from_pretrained(tmp_path / "again")) == {Compute.INT8}
    about = ModelReference(
        id="toy", component="text_encoder", class_name="CLIPTextModel", sha256=weights_hash(model, F16)
    )
    policy = Policy.of(choices, model=about, compute="int8")
    while_read = CLIPTextModel.from_pretrained(tmp_path / "full", quantization_config=BitPolicyConfig(policy=policy))
    assert computes(while_read) == {Compute.INT8}


def test_copies_and_casts_keep_the_compute(folder: Path) -> None:
    import copy

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert computes(copy.deepcopy(unet)) == computes(unet.to(torch.float32)) == {Compute.INT8}
