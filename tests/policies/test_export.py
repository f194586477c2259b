"""What an export writes: the predicted bytes, the same every time, completely or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.checkpoint import checkpoint_bytes, export_diffusers_model
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.footprint import stored_others
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.calibration_file import load_calibration
from bitpolicy.policies.target import Target

StoredReader = Callable[[str, Mapping[str, np.ndarray], tuple[int, ...]], np.ndarray]
Policymaker = Callable[..., Policy]
WEIGHTS = "diffusion_pytorch_model.safetensors"
F16 = torch.float16


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a denoiser's folder, from all shards, read by safetensors itself."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def nbytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_the_bytes_of_the_file_are_those_of_the_account(exported: Any) -> None:
    account = ByteAccount.of(Target({"unet": exported.pipe.unet}), F16)
    predicted = account.total({name: choice.format for name, choice in exported.choices.items()})
    tensors = stored(exported.folder / "unet")
    assert predicted == exported.nbytes == checkpoint_bytes(exported.folder / "unet") == nbytes(tensors)
    assert predicted < account.reference


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["int4", "int4-g32", "int5-sym", "int3-channel", "nf4", "fp8", "nvfp4", "mxfp8", "fp8-tensor", "int8", "fp16"],
)
def test_the_account_is_exact_for_every_format_and_storage(
    toy_unet: Any, tmp_path: Path, name: str, storage: torch.dtype
) -> None:
    choices = {layer: Choice(format_named(name)) for layer, _ in quantizable_layers(toy_unet)}
    predicted = ByteAccount.of(Target({"unet": toy_unet}), storage).total(
        {layer: c.format for layer, c in choices.items()}
    )
    assert (
        export_diffusers_model(toy_unet, choices, tmp_path, quantization=Quantization(storage=storage))
        == predicted
        == nbytes(stored(tmp_path))
    )
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (tmp_path / WEIGHTS).stat().st_size == 8 + header + predicted
    floats = {t.dtype for n, t in stored(tmp_path).items() if n.endswith(("bias", ".weight"))}
    assert floats == {storage}


def test_a_second_reader_finds_every_weight_as_its_format_has_it(exported: Any, read_stored: StoredReader) -> None:
    seen = set()
    with safe_open(exported.folder / "unet" / WEIGHTS, "pt") as file:
        for name, layer in quantizable_layers(exported.pipe.unet):
            format, shape = exported.choices[name].format, tuple(layer.weight.shape)
            tensors = {suffix: file.get_tensor(f"{name}.{suffix}") for suffix in format.tensors(shape, F16)}
            weight = read_stored(format.name, {suffix: as_bytes(tensor) for suffix, tensor in tensors.items()}, shape)
            expected = format.dequantize(format.quantize(layer.weight.detach()), shape, torch.float32).numpy()
            rotating = 1e-6 * float(np.abs(expected).max()) if "rotation" in format.parameters() else 0.0
            np.testing.assert_allclose(weight, expected, rtol=0, atol=rotating, err_msg=name)
            np.testing.assert_allclose(weight, layer.weight.detach().numpy(), atol=0.1, err_msg=name)
            seen.add(format.parameters()["kind"])
    assert seen == {"affine", "codebook", "float"}


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """For numpy, which has no float8."""
    return (tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor).numpy()


def test_tensors_that_are_not_packed_are_the_models_in_the_storage_dtype(exported: Any) -> None:
    tensors = stored(exported.folder / "unet")
    model = exported.pipe.unet.state_dict()
    corrected = {f"{name}.bias" for name, choice in exported.choices.items() if choice.bias_correction}
    packed = {f"{name}.weight" for name, choice in exported.choices.items() if choice.format.packed}
    untouched = model.keys() - corrected - packed
    assert [name for name in untouched if not torch.equal(tensors[name], model[name].to(F16))] == []
    moved = [name for name in corrected & model.keys() if not torch.equal(tensors[name], model[name].to(F16))]
    assert len(moved) > 10
    assert packed.isdisjoint(tensors)


def test_two_exports_are_the_same_files(exported: Any, tmp_path: Path) -> None:
    export_pipeline(exported.pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "a", component_dtype=F16)
    assert hashes(tmp_path / "a") == hashes(exported.folder)


def test_the_folder_is_a_diffusers_pipeline_with_its_policy(exported: Any) -> None:
    names = {path.relative_to(exported.folder).as_posix() for path in exported.folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "policy.yaml", "README.md", "calibration.safetensors"} < names
    assert {f"unet/{WEIGHTS}", "unet/config.json", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"} < names
    assert Policy.load(exported.folder / "policy.yaml").resolve(exported.choices) == exported.choices
    kept = load_calibration(exported.folder / "calibration.safetensors")
    assert all(torch.equal(kept.input_means[name], patch) for name, patch in exported.calibration.input_means.items())
    assert [name for name in names if name.startswith(".") or "partial" in name] == []


def test_the_config_lists_the_packed_layers(exported: Any) -> None:
    config = json.loads((exported.folder / "unet" / "config.json").read_text())["quantization_config"]
    packed = {name: choice.format for name, choice in exported.choices.items() if choice.format.packed}
    assert config["quant_method"] == "bitpolicy"
    assert config["format_version"] == 1
    assert config["storage_dtype"] == "float16"
    assert config["layers"] == {name: format.name for name, format in packed.items()}
    assert config["formats"] == {format.name: format.parameters() for format in packed.values()}


def test_exporting_changes_nothing_in_memory(exported: Any, tmp_path: Path) -> None:
    pipe = exported.pipe
    models = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    before = {(n, k): t.clone() for n, model in models.items() for k, t in model.state_dict().items()}
    export_pipeline(pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out", component_dtype=F16)
    after = {(n, k): t for n, model in models.items() for k, t in model.state_dict().items()}
    assert {model.dtype for model in models.values()} == {torch.float32}
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert "quantization_config" not in pipe.unet.config


@pytest.mark.parametrize(("dtype", "expected"), [(None, F16), (F16, F16), (torch.float32, torch.float32)])
def test_other_components_are_stored_as_asked(
    toy_pipeline: Any,
    policy_of: Policymaker,
    tmp_path: Path,
    dtype: torch.dtype | None,
    expected: torch.dtype,
) -> None:
    policy = policy_of(toy_pipeline.unet, {name: Choice(FP16) for name, _ in quantizable_layers(toy_pipeline.unet)})
    export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out", component_dtype=dtype)
    found = load_file(tmp_path / "out" / "vae" / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {expected}
    assert not (tmp_path / "out" / "calibration.safetensors").exists(), "nothing was corrected"


@pytest.mark.parametrize("most", [1, 5_000, 50_000, 100_000_000])
def test_a_large_denoiser_is_split_as_diffusers_splits_it(exported: Any, tmp_path: Path, most: int) -> None:
    total = export_diffusers_model(
        exported.pipe.unet,
        exported.choices,
        tmp_path,
        most,
        quantization=Quantization(calibration=exported.calibration),
    )
    whole = stored(exported.folder / "unet")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert total == exported.nbytes == checkpoint_bytes(tmp_path)
    assert stored(tmp_path).keys() == whole.keys()
    assert [name for name, tensor in stored(tmp_path).items() if not torch.equal(tensor, whole[name])] == []
    if most > total:
        assert [file.name for file in files] == [WEIGHTS]
        return
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(nbytes(load_file(f)) <= most or len(load_file(f)) == 1 for f in files)
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: f.name for f in files for name in load_file(f)}


def test_an_older_export_is_replaced_whole(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "out" / "model_index.json").write_text("old")
    export_pipeline(
        exported.pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out", component_dtype=F16
    )
    assert hashes(tmp_path / "out") == hashes(exported.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_a_pipeline_is_never_replaced(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(BitPolicyError, match="empty folder"):
        export_pipeline(exported.pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("before", [True, False], ids=["an older export", "nothing"])
def test_an_export_that_fails_leaves_what_was_there(exported: Any, tmp_path: Path, before: bool) -> None:
    if before:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model_index.json").write_text("old")
    last = [name for name, choice in exported.choices.items() if choice.bias_correction][-1]
    means = {name: mean for name, mean in exported.calibration.input_means.items() if name != last}
    with pytest.raises(BitPolicyError, match=f"layer {last}: bias correction needs its mean input"):
        export_pipeline(exported.pipe, ["unet"], exported.policy, Calibration(means), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "model_index.json"] if before else [])


def test_a_full_disk_is_reported_before_anything_is_written(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = checkpoint_bytes(exported.folder)  # of the files beside the components'
    needed = exported.nbytes + calibration + sum(stored_others(exported.pipe, ["unet"], F16).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(BitPolicyError, match=f"{needed - 1:,} bytes free, .* at least {needed:,}; free some space or"):
        export_pipeline(exported.pipe, ["unet"], exported.policy, exported.calibration, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_weight_that_integers_cannot_hold_names_the_layer(
    toy_pipeline: Any, policy_of: Policymaker, tmp_path: Path
) -> None:
    choices = {name: Choice(format_named("int8")) for name, _ in quantizable_layers(toy_pipeline.unet)}
    policy = policy_of(toy_pipeline.unet, choices)
    toy_pipeline.unet.mid_block.resnets[0].conv1.weight.data[0] = float("nan")
    with pytest.raises(BitPolicyError, match=r"layer mid_block\.resnets\.0\.conv1: .*keep this layer at fp16"):
        export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out")


def test_a_policy_for_layers_that_do_not_exist_is_refused(
    toy_pipeline: Any, policy_of: Policymaker, tmp_path: Path
) -> None:
    policy = policy_of(toy_pipeline.unet, {"conv_in": Choice(FP16), "conv_inn": Choice(format_named("int8"))})
    with pytest.raises(BitPolicyError, match=r"'conv_inn', which this model does not have; did you mean 'conv_in'\?"):
        export_pipeline(toy_pipeline, ["unet"], policy, Calibration(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_float32_model_is_exported_as_its_rounded_self(toy_unet: Any, tmp_path: Path) -> None:
    choices = {name: Choice(format_named("int4")) for name, _ in quantizable_layers(toy_unet)}
    export_diffusers_model(toy_unet, choices, tmp_path / "exact", quantization=Quantization())
    to_storage(toy_unet, F16)
    export_diffusers_model(toy_unet, choices, tmp_path / "rounded", quantization=Quantization())
    assert hashes(tmp_path / "exact") == hashes(tmp_path / "rounded")
