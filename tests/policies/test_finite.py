"""No exported file contains NaN or Inf, except those of the model itself, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpolicy.kernels.errors import BitPolicyError, BitPolicyWarning
from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import pack, quantize_layer, quantized, to_storage
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.checkpoints.parts import MemoryParts
from bitpolicy.policies.checkpoints.pipeline import export_parts, export_pipeline
from bitpolicy.policies.exporters.export import export_to
from bitpolicy.policies.exporters.exporter import Layer, Source
from bitpolicy.policies.exporters.translation import write_translated
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import save_calibration

INT4, INT8 = format_named("int4"), format_named("int8")
WILD = "mid_block.resnets.0.conv1"
Calibrate = Callable[[Any], dict[str, torch.Tensor]]
Policymaker = Callable[..., Policy]


@pytest.fixture
def wild_means(toy_pipeline: Any, calibrate: Calibrate) -> dict[str, torch.Tensor]:
    """The mean inputs of the toy U-Net, those of two layers as large as a network without bounds gives them."""
    to_storage(toy_pipeline.unet, torch.float16)
    means = calibrate(toy_pipeline.unet)
    return means | {name: torch.full_like(means[name], 1e9) for name in (WILD, "conv_out")}


def all_int4(unet: Any) -> dict[str, Choice]:
    return {name: Choice(INT4, True) for name, _ in quantizable_layers(unet)}


def not_finite(folder: Path) -> list[str]:
    files = {path: load_file(path) for path in folder.rglob("*.safetensors")}
    return [
        f"{path}: {name}"
        for path, tensors in files.items()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all()
    ]


def test_a_bias_whose_correction_exceeds_the_range_is_not_corrected(
    toy_pipeline: Any, wild_means: dict[str, torch.Tensor]
) -> None:
    layer = toy_pipeline.unet.conv_out
    stored = quantize_layer(
        "conv_out", layer, Choice(INT4, True), quantization=Quantization(calibration=Calibration(wild_means))
    )
    assert torch.equal(stored.bias, layer.bias.half())
    assert stored.left_as_it_was
    wide = quantize_layer(
        "conv_out",
        layer,
        Choice(INT4, True),
        quantization=Quantization(calibration=Calibration(wild_means), storage=torch.bfloat16),
    )
    assert not wide.left_as_it_was
    assert wide.bias.abs().max() > 65504


def test_every_way_to_apply_the_policy_leaves_the_same_biases(
    toy_pipeline: Any,
    wild_means: dict[str, torch.Tensor],
    policy_of: Policymaker,
    predict: Callable[[Any], torch.Tensor],
    tmp_path: Path,
) -> None:
    unet = toy_pipeline.unet
    choices = all_int4(unet)
    with pytest.warns(
        BitPolicyWarning, match=r"2 layers keep their bias, e\.g\. (conv_out|mid_b.*): corrected .*float16"
    ):
        export_pipeline(toy_pipeline, ["unet"], policy_of(unet, choices), Calibration(wild_means), tmp_path / "out")
    assert not_finite(tmp_path / "out") == []
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    plain = {
        name
        for name, layer in quantizable_layers(unet)
        if layer.bias is not None and torch.equal(written[f"{name}.bias"], layer.bias.half())
    }
    assert plain == {WILD, "conv_out"}
    with quantized(unet, choices, quantization=Quantization(calibration=Calibration(wild_means))):
        expected = predict(unet)
        assert all(torch.equal(written[f"{n}.bias"].float(), unet.get_submodule(n).bias) for n in plain)
    assert torch.isfinite(expected).all()
    pack(unet, choices, quantization=Quantization(calibration=Calibration(wild_means)))
    assert torch.equal(predict(unet), expected)


def test_a_policy_whose_biases_all_fit_is_exported_without_a_warning(
    toy_pipeline: Any, calibrate: Calibrate, policy_of: Policymaker, tmp_path: Path
) -> None:
    to_storage(toy_pipeline.unet, torch.float16)
    means, policy = calibrate(toy_pipeline.unet), policy_of(toy_pipeline.unet, all_int4(toy_pipeline.unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BitPolicyWarning)
        export_pipeline(toy_pipeline, ["unet"], policy, Calibration(means), tmp_path / "out")


@pytest.mark.parametrize("target", [None, "comfy", "sdnq"])
def test_a_scale_that_is_not_finite_is_refused_and_named(
    toy_pipeline: Any, policy_of: Policymaker, tmp_path: Path, target: str | None
) -> None:
    unet, name, choice = toy_pipeline.unet, "time_embedding.linear_1", Choice(INT8, quantizer="gptq")
    made = INT8.quantize(unet.get_submodule(name).weight.detach())
    made["weight_scale"][3] = float("inf")
    kept = Calibration(rounded={RoundedKey.of(name, choice, suffix): tensor for suffix, tensor in made.items()})
    choices = {other: choice if other == name else Choice(FP16) for other, _ in quantizable_layers(unet)}
    about = (MemoryParts(toy_pipeline, ["unet"]), policy_of(unet, choices), kept, tmp_path / "out")
    export = export_parts if target is None else partial(export_to, target)
    with pytest.raises(BitPolicyError, match=rf"{name}\.weight_scale would be written as float32 with NaN or Inf"):
        export(*about)
    assert list(tmp_path.iterdir()) == []


class Doubling:
    """Lays a layer out as twice its scale, in float16."""

    def specs(self, layer: Layer, storage: torch.dtype) -> dict[str, TensorSpec]:
        return {"double": TensorSpec(torch.float16, layer.shape[:1])}

    def convert(
        self, layer: Layer, tensors: Mapping[str, torch.Tensor], storage: torch.dtype
    ) -> dict[str, torch.Tensor]:
        return {"double": (2 * tensors["weight_scale"]).half()}


def test_a_value_that_overflows_in_a_targets_layout_is_refused_and_named(tmp_path: Path) -> None:
    layer = Layer("mid.to_q", "Linear", (4, 64), INT8)
    made = {f"mid.to_q.{suffix}": tensor for suffix, tensor in INT8.quantize(torch.full((4, 64), 5e6)).items()}
    source = Source("unet", {}, torch.float16, {"mid.to_q": layer}, {}, lambda: iter(made.items()), {})
    with pytest.raises(
        BitPolicyError, match=r"^mid\.to_q\.double would be written as float16 with NaN or Inf; give layer"
    ):
        write_translated(source, tmp_path / "out.safetensors", Doubling())


def test_nan_and_inf_of_the_model_itself_are_written_with_a_warning(
    toy_pipeline: Any, policy_of: Policymaker, tmp_path: Path
) -> None:
    toy_pipeline.unet.conv_norm_out.bias.data[0] = float("inf")
    policy = policy_of(toy_pipeline.unet, {name: Choice(INT8) for name, _ in quantizable_layers(toy_pipeline.unet)})
    with pytest.warns(
        BitPolicyWarning, match=r"the model itself has NaN or Inf in 1 tensor, e\.g\. conv_norm_out\.bias"
    ):
        export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out")
    assert [line.rpartition(": ")[2] for line in not_finite(tmp_path / "out")] == ["conv_norm_out.bias"]


@pytest.mark.parametrize("place", ["unet.conv_norm_out.bias", "unet.conv_out.bias", "vae.decoder.conv_out.bias"])
def test_a_value_beyond_the_storage_dtype_is_refused_and_named(
    toy_pipeline: Any, policy_of: Policymaker, tmp_path: Path, place: str
) -> None:
    component, _, name = place.partition(".")
    policy = policy_of(toy_pipeline.unet, {n: Choice(INT8) for n, _ in quantizable_layers(toy_pipeline.unet)})
    getattr(toy_pipeline, component).get_parameter(name).data[0] = 1e6
    with pytest.raises(BitPolicyError, match=rf"{name} has values that torch.float16 cannot hold; save .* bfloat16"):
        export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_mean_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    means = Calibration({"a": torch.ones(3), "b": torch.tensor([1.0, float("inf")])})
    assert means.needed_for({}).input_means.keys() == {"a"}
    with pytest.raises(BitPolicyError, match=r"^b would be written as float32 with NaN or Inf"):
        save_calibration(means, tmp_path / "calibration.safetensors")
    assert list(tmp_path.iterdir()) == []
