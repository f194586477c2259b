"""Rounded weights on disk: they are read as written, damage is detected, and memory holds one candidate at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitpolicy.kernels.formats.format import TensorSpec
from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.storage.safetensors_writer import SafetensorsWriter
from bitpolicy.policies.target import Target
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.rounding.kept_rounding import KeptRounding, is_whole, write_rounded
from bitpolicy.sensitivity.rounding.rounding_pass import RoundingPass
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.sketches.weight_changes import WeightChanges
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
MEANS = {"a": torch.arange(3.0), "b": torch.arange(4.0)}
ROUNDED = {
    RoundedKey("a", "int4", "gptq", "weight_packed"): torch.arange(6, dtype=torch.uint8).view(2, 3),
    RoundedKey("a", "int4", "gptq", "weight_scale"): torch.rand(2, 1).half(),
    RoundedKey("a", "int8", "mse", "weight_packed"): torch.arange(-3, 3, dtype=torch.int8),
}


def specs(tensors: dict[RoundedKey, torch.Tensor]) -> dict[RoundedKey, TensorSpec]:
    return {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The files of layer `a` with three tensors and of layer `b` with none."""
    paths = {name: tmp_path / "rounded" / f"{name}.safetensors" for name in "ab"}
    write_rounded(paths["a"], specs(ROUNDED), ROUNDED.items())
    write_rounded(paths["b"], {}, ())
    return paths


def test_reading_gives_the_mapping_that_was_written(files: dict[str, Path]) -> None:
    kept = KeptRounding(files)
    assert list(kept) == list(ROUNDED)
    assert len(kept) == 3
    assert all(torch.equal(kept[key], tensor) and key in kept for key, tensor in ROUNDED.items())
    assert Calibration(MEANS, kept).sha256 == Calibration(MEANS, ROUNDED).sha256


@pytest.mark.parametrize(
    "key", [RoundedKey("c", "int4", "gptq", "weight_packed"), RoundedKey("a", "int4", "rtn", "weight_packed")]
)
def test_a_key_that_was_not_written_is_missing(files: dict[str, Path], key: RoundedKey) -> None:
    kept = KeptRounding(files)
    assert key not in kept
    assert kept.get(key) is None
    with pytest.raises(KeyError):
        kept[key]


def test_only_the_chosen_tensors_are_read(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept, read = KeptRounding(files), []
    plain = KeptRounding.__getitem__
    monkeypatch.setattr(KeptRounding, "__getitem__", lambda self, key: read.append(key) or plain(self, key))
    (int4,) = (format for format in parse_formats("int4") if format.packed)
    found = Calibration(MEANS, kept).needed_for({"a": Choice(int4, True, "gptq"), "b": Choice(int4, True)})
    assert list(found.input_means) == ["a", "b"]
    assert list(found.rounded) == read == list(ROUNDED)[:2]


def test_an_unchanged_file_is_whole(files: dict[str, Path]) -> None:
    assert is_whole(files["a"], ROUNDED)
    assert is_whole(files["b"], ())
    assert not is_whole(files["a"], list(ROUNDED)[:2])
    assert not is_whole(files["a"], [*ROUNDED, RoundedKey("a", "int8", "mse", "weight_scale")])
    assert not is_whole(files["a"].with_name("c.safetensors"), ())


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_damaged_file_is_not_whole(files: dict[str, Path], keep: int) -> None:
    files["a"].write_bytes(files["a"].read_bytes()[:keep])
    assert not is_whole(files["a"], ROUNDED)


@pytest.mark.parametrize("key", list(ROUNDED), ids=str)
def test_a_file_with_changed_values_is_not_whole(files: dict[str, Path], key: RoundedKey) -> None:
    before = files["a"].read_bytes()
    where = before.index(ROUNDED[key].view(torch.uint8).numpy().tobytes())
    changed = bytearray(before)
    changed[where] ^= 1
    files["a"].write_bytes(changed)
    assert not torch.equal(load_file(files["a"])[str(key)], ROUNDED[key])
    assert not is_whole(files["a"], ROUNDED)


def test_an_unfinished_layer_leaves_no_file(tmp_path: Path) -> None:
    def killed() -> Iterator[tuple[RoundedKey, torch.Tensor]]:
        yield next(iter(ROUNDED.items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rounded(tmp_path / "a.safetensors", specs(ROUNDED), killed())
    assert list(tmp_path.iterdir()) == []


# Memory: bytes of the tensors that Python can reach


def reachable() -> int:
    """Bytes of all storages that live tensors hold, counting each storage once."""
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if type(tensor) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


FEW, MANY = "int4", "int2,int3,int4,int5,int6,int7,int8"
SOME = ["conv_in", "mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_out"]


def some_layers(target: Target) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in quantizable_layers(target) if name in SOME]


@pytest.fixture
def trajectories(new_trajectories: NewTrajectories, monkeypatch: pytest.MonkeyPatch) -> Trajectories:
    monkeypatch.setattr(Target, "layers", property(lambda target: dict(some_layers(target))))
    return new_trajectories(num_inference_steps=1, guidance_scale=1.0)


def rounding_of(trajectories: Trajectories, formats: str, folder: Path) -> RoundingPass:
    wanted = candidates(parse_formats(formats), ("mse", "gptq"))
    samples = (Sample("a red heart", 3),)
    return RoundingPass(trajectories, wanted, torch.float16, samples, False, folder, Stages(quiet=True))


def test_rounding_to_many_formats_holds_no_more_memory_than_to_few(
    trajectories: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: dict[str, dict[str, int]] = {FEW: {}, MANY: {}}
    sizes, write = {}, SafetensorsWriter.write
    for formats, peak in peaks.items():

        def counted(self: Any, name: str, tensor: torch.Tensor, peak: dict[str, int] = peak) -> None:
            write(self, name, tensor)
            if "weight_packed" in name:
                layer = name.partition("/")[0]
                peak[layer] = max(peak.get(layer, 0), reachable())

        monkeypatch.setattr(SafetensorsWriter, "write", counted)
        paths = rounding_of(trajectories, formats, tmp_path / formats).files()
        sizes[formats] = sum(path.stat().st_size for path in paths.values())
    assert sizes[MANY] > 6 * sizes[FEW]
    for name, layer in some_layers(trajectories.target):
        grown = peaks[MANY][name] - peaks[FEW][name]
        assert grown < 1.5 * layer.weight.numel() + 10_000, f"{name}: more than one rounding of it"


def test_reading_holds_no_memory_and_packed_weights_stay_up_to_a_limit(
    trajectories: Trajectories, tmp_path: Path
) -> None:
    layers = dict(some_layers(trajectories.target))
    weights = sum(layer.weight.numel() for layer in layers.values())
    grown = {}
    for formats, room in ((FEW, 0), (FEW, weights), (MANY, weights)):
        rounding = rounding_of(trajectories, formats, tmp_path / formats)
        kept = KeptRounding(rounding.files())
        before = reachable()
        changes = WeightChanges(
            layers, rounding.candidates, quantization=Quantization(calibration=Calibration(rounded=kept)), room=room
        )
        for _ in range(2):
            for name, layer in layers.items():
                changes.weight_products(name, layer.weight)
        grown[formats, room] = reachable() - before
        assert RoundedKey("conv_in", rounding.candidates[0].format.name, "gptq", "weight_packed") in kept
    assert grown[FEW, 0] == 0 < grown[FEW, weights] <= weights
    assert grown[MANY, weights] <= weights
