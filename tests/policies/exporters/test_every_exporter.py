"""What every exporter guarantees. A new one is added to `EXPORTERS` and to `READERS` and inherits all tests."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors import safe_open
from toy_readers import READERS, Reading

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.apply import quantized, stored_weight
from bitpolicy.policies.calibration import Calibration, RoundedKey
from bitpolicy.policies.checkpoints.folder_parts import FolderParts
from bitpolicy.policies.checkpoints.parts import Parts
from bitpolicy.policies.exporters.export import Exported, export_to
from bitpolicy.policies.exporters.exporter import Exporter, Layer
from bitpolicy.policies.exporters.names import NAMES
from bitpolicy.policies.exporters.requantize import TargetError
from bitpolicy.policies.exporters.targets import EXPORTERS, exporter_named
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization

F16 = torch.float16


@dataclass(frozen=True)
class Written:
    """One export of a policy that the target holds."""

    exporter: Exporter
    unet: Any
    parts: Parts
    choices: dict[str, Choice]
    policy: Policy
    calibration: Calibration
    folder: Path
    result: Exported

    def again(self, folder: Path, **changed: Any) -> Exported:
        """Another export of the same."""
        given = {
            "parts": self.parts,
            "policy": self.policy,
            "calibration": self.calibration,
            "folder": folder,
            **changed,
        }
        return export_to(self.exporter.name, **given)


@pytest.fixture(scope="module", params=EXPORTERS, ids=lambda exporter: exporter.name)
def written(
    request: pytest.FixtureRequest,
    even_unet: Any,
    held_choices: Any,
    even_means: Any,
    policy_of: Any,
    parts_of: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Written:
    exporter, unet = request.param, even_unet()
    choices = held_choices(exporter, unet)
    policy, folder = policy_of(unet, choices), tmp_path_factory.mktemp(exporter.name) / "out"
    parts = parts_of(unet=unet)
    calibration = Calibration(even_means)
    result = export_to(exporter.name, parts, policy, calibration, folder)
    return Written(exporter, unet, parts, choices, policy, calibration, folder, result)


@pytest.fixture(scope="module")
def reading(written: Written, even_unet: Callable[[], Any]) -> Reading:
    """The export as the other program reads it."""
    return READERS[written.exporter.name].read(written.folder, even_unet())


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ours(written: Written) -> dict[str, torch.Tensor]:
    """The weights that bitpolicy multiplies with in packed layers, float32."""
    return _weights(written.unet, written.choices, written.calibration)


def _weights(unet: Any, choices: dict[str, Choice], calibration: Calibration) -> dict[str, torch.Tensor]:
    modules = dict(quantizable_layers(unet))
    found = {}
    for name, choice in choices.items():
        weight = modules[name].weight.detach().half()
        if choice.format.packed:
            stored = stored_weight(name, weight, choice, calibration)
            found[name] = choice.format.dequantize(stored, weight.shape, torch.float32)
    return found


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest weight."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_help_lists_all_targets() -> None:
    assert tuple(exporter.name for exporter in EXPORTERS) == NAMES


def test_every_target_has_a_reader_and_is_found_by_its_name() -> None:
    assert set(NAMES) == set(READERS)
    assert [exporter_named(f" {name.upper()} ").name for name in NAMES] == list(NAMES)
    with pytest.raises(BitPolicyError, match="unknown target 'onnx'; write any of comfy, comfy-int8, sdnq"):
        exporter_named("onnx")


def test_the_other_program_has_the_layers_of_the_policy(written: Written, reading: Reading) -> None:
    expected = ours(written)
    assert reading.weights.keys() == expected.keys()
    assert len({choice.format for choice in written.choices.values()}) >= 5
    assert {n: t.shape for n, t in reading.weights.items()} == {n: t.shape for n, t in expected.items()}


def test_the_other_program_reads_exactly_our_weights(written: Written, reading: Reading) -> None:
    exact = READERS[written.exporter.name].exact
    assert (exact is None) == written.exporter.rounds_itself
    if exact is None:
        pytest.skip("it rounds itself")
    off = {name: apart(reading.weights[name], weight) for name, weight in ours(written).items()}
    assert {name: share for name, share in off.items() if share > exact} == {}


def test_a_recipe_rounds_as_well_as_the_policy(written: Written, reading: Reading) -> None:
    if not written.exporter.rounds_itself:
        pytest.skip("it takes our weights")
    for name, weight in ours(written).items():
        original = written.unet.get_submodule(name).weight.detach()
        error = float((weight - original).norm() / original.norm())
        theirs = float((reading.weights[name] - original).norm() / original.norm())
        assert 0.5 * error < theirs < 1.25 * error, (name, written.choices[name].format.name, error, theirs)


def test_a_recipe_gives_our_weights_where_the_grids_are_the_same(written: Written, reading: Reading) -> None:
    """Except the few that are between two levels."""
    shared = READERS[written.exporter.name].same_grid
    assert bool(shared) == written.exporter.rounds_itself
    tried = set()
    for name, weight in ours(written).items():
        format = written.choices[name].format.name
        if format in shared:
            moved = (reading.weights[name] - weight).abs() > 1e-3 * weight.abs().max()
            assert float(moved.float().mean()) < 0.01, (name, format)
            tried.add(format)
    assert len(tried) >= min(2, len(shared))


def test_the_other_program_predicts_the_same(written: Written, reading: Reading, predict_even: Any) -> None:
    plain = predict_even(written.unet)
    with quantized(written.unet, written.choices, quantization=Quantization(calibration=written.calibration)):
        expected = predict_even(written.unet)
    found = predict_even(reading.model)
    harm = float((expected - plain).norm())
    if written.exporter.rounds_itself:
        assert float((found - plain).norm()) < 2 * harm
    else:
        assert float((found - expected).norm()) < 0.02 * harm


def test_two_exports_are_the_same_files(written: Written, tmp_path: Path) -> None:
    written.again(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(written.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_bytes_are_those_of_the_files(written: Written) -> None:
    total = 0
    for path in written.folder.rglob("*.gguf"):
        total += sum(int(tensor.n_bytes) for tensor in pytest.importorskip("gguf").GGUFReader(path).tensors)
    for path in written.folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            total += sum(file.get_tensor(n).numel() * file.get_tensor(n).element_size() for n in names)
    assert written.result.nbytes == total
    assert (total == 0) == written.exporter.rounds_itself


def test_the_policy_is_written_next_to_the_export(written: Written) -> None:
    assert Policy.load(written.folder / "policy.yaml").resolve(written.choices) == written.choices
    assert written.result.requantized == ()
    assert (written.result.notes != ()) == written.exporter.rounds_itself


def test_the_export_of_an_int8_compute_policy_notes_that_the_target_multiplies_in_its_own_way(
    written: Written, tmp_path: Path
) -> None:
    found = written.again(tmp_path / "new", policy=written.policy.under(Compute.INT8))
    assert found.notes[:-1] == written.result.notes
    assert "int8 compute" in found.notes[-1]
    assert written.exporter.title in found.notes[-1]
    assert Policy.load(tmp_path / "new" / "policy.yaml").compute == "int8"


def test_exporting_changes_nothing_in_memory(written: Written, even_unet: Callable[[], Any]) -> None:
    fresh = even_unet().state_dict()
    assert [name for name, tensor in written.unet.state_dict().items() if not torch.equal(tensor, fresh[name])] == []


def test_layers_that_a_target_does_not_hold_are_refused_together(
    written: Written, policy_of: Any, tmp_path: Path
) -> None:
    choices = dict.fromkeys(written.choices, Choice(format_named("nf4")))
    with pytest.raises(TargetError) as refused:
        written.again(tmp_path / "out", policy=policy_of(written.unet, choices))
    message = str(refused.value)
    layers = list(choices)
    assert f"{written.exporter.title} cannot hold {len(layers)} layers" in message
    assert f": {layers[0]}, {layers[1]}, {layers[2]}, ..." in message
    assert "in nf4, Linear" in message
    assert "in nf4, Conv2d" in message
    assert "--requantize" in message
    assert f"--formats {','.join(written.exporter.suggested)}" in message
    assert list(tmp_path.iterdir()) == []


def test_requantize_gives_each_layer_the_nearest_format_of_the_target(
    written: Written, policy_of: Any, even_unet: Callable[[], Any], tmp_path: Path
) -> None:
    choices = dict.fromkeys(written.choices, Choice(format_named("nf4"), bias_correction=True))
    result = written.again(tmp_path / "out", policy=policy_of(written.unet, choices), requantize=True)
    after = Policy.load(tmp_path / "out" / "policy.yaml").resolve(choices)
    assert [one.name for one in result.requantized] == list(choices)
    assert {one.name: one.after for one in result.requantized} == after
    expected = _weights(written.unet, after, written.calibration)
    for one in result.requantized:
        original = written.unet.get_submodule(one.name).weight.detach()
        assert written.exporter.holds(Layer.of(one.name, written.unet.get_submodule(one.name), one.after.format))
        assert 0.05 < one.error_before < 0.2
        rounded = expected.get(one.name, original)
        assert one.error_after == pytest.approx(float((rounded - original).norm() / original.norm()), rel=1e-4)
        assert one.after.bias_correction == one.after.format.packed
    found = READERS[written.exporter.name].read(tmp_path / "out", even_unet())
    assert found.weights.keys() == expected.keys()
    exact = READERS[written.exporter.name].exact
    if exact is not None:
        assert max((apart(found.weights[name], weight) for name, weight in expected.items()), default=0.0) <= exact


def test_a_bfloat16_policy_is_read_within_its_rounding(
    written: Written, policy_of: Any, even_unet: Callable[[], Any], tmp_path: Path
) -> None:
    policy = policy_of(written.unet, written.choices, torch.bfloat16)
    written.again(tmp_path / "out", policy=policy)
    found = READERS[written.exporter.name].read(tmp_path / "out", even_unet())
    for name, choice in written.choices.items():
        if choice.format.packed and not written.exporter.rounds_itself:
            weight = written.unet.get_submodule(name).weight.detach().bfloat16()
            expected = choice.format.dequantize(choice.format.quantize(weight), weight.shape, torch.float32)
            assert apart(found.weights[name], expected) <= (READERS[written.exporter.name].exact and 0.005)


def test_codes_in_the_calibration_are_written_unchanged(
    written: Written, policy_of: Any, even_unet: Callable[[], Any], tmp_path: Path
) -> None:
    """A layer that gptq rounded cannot be rounded again; here all its codes are 1."""
    if written.exporter.rounds_itself:
        pytest.skip("it rounds itself")
    name, choice = "time_embedding.linear_1", Choice(format_named("int8"), quantizer="gptq")
    shape = written.unet.get_submodule(name).weight.shape
    kept = {"weight_packed": torch.ones(shape, dtype=torch.int8), "weight_scale": torch.arange(1.0, shape[0] + 1)}
    calibration = Calibration(rounded={RoundedKey.of(name, choice, s): tensor for s, tensor in kept.items()})
    policy = policy_of(written.unet, {**dict.fromkeys(written.choices, Choice(FP16)), name: choice})
    written.again(tmp_path / "out", policy=policy, calibration=calibration)
    found = READERS[written.exporter.name].read(tmp_path / "out", even_unet()).weights
    assert set(found) == {name}
    assert torch.equal(found[name], torch.arange(1.0, shape[0] + 1)[:, None].expand(shape))


def test_a_policy_with_only_fp16_is_held(written: Written, policy_of: Any, tmp_path: Path) -> None:
    policy = policy_of(written.unet, dict.fromkeys(written.choices, Choice(FP16)))
    assert written.again(tmp_path / "out", policy=policy).requantized == ()


def test_a_foreign_folder_is_never_replaced_and_an_older_export_is(written: Written, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(BitPolicyError, match="no export wrote"):
        written.again(tmp_path / "mine")
    for kind in ("sensitivity.safetensors", "model_index.json"):  # a search, a checkpoint
        (tmp_path / kind).mkdir()
        for name in ("policy.yaml", kind):
            (tmp_path / kind / name).write_text("mine")
        with pytest.raises(BitPolicyError, match="no export wrote"):
            written.again(tmp_path / kind)
        assert (tmp_path / kind / kind).read_text() == "mine"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "policy.yaml").write_text("old")
    (tmp_path / "old" / "left.safetensors").write_text("old")
    written.again(tmp_path / "old")
    assert hashes(tmp_path / "old") == hashes(written.folder)


def test_an_export_that_fails_leaves_nothing(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "to_yaml", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        written.again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_file_records_the_folder_that_it_was_made_in(written: Written) -> None:
    for path in written.folder.rglob("*.json"):
        json.loads(path.read_text())
        assert str(written.folder) not in path.read_text()


def test_a_folder_is_exported_like_the_model_in_memory_without_loading_it(written: Written, tmp_path: Path) -> None:
    unet = copy.deepcopy(written.unet).half()
    pipe = DDPMPipeline(unet, DDPMScheduler())  # any pipeline: it is never called
    pipe.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    parts = FolderParts(tmp_path / "model", ["unet"])
    assert {tensor.device.type for tensor in parts.target.state_dict().values()} == {"meta"}
    result = written.again(tmp_path / "out", parts=parts)
    assert result == written.result
    assert hashes(tmp_path / "out") == hashes(written.folder)


def test_a_folder_is_requantized_like_the_model_in_memory(written: Written, policy_of: Any, tmp_path: Path) -> None:
    DDPMPipeline(copy.deepcopy(written.unet).half(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    choices = dict.fromkeys(written.choices, Choice(format_named("nf4"), bias_correction=True))
    given = {"policy": policy_of(written.unet, choices), "requantize": True}
    from_file = written.again(tmp_path / "a", parts=FolderParts(tmp_path / "model", ["unet"]), **given)
    assert len(from_file.requantized) > 10
    assert from_file == written.again(tmp_path / "b", **given)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_full_disk_is_reported_before_anything_is_written(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if written.exporter.rounds_itself:
        pytest.skip("a recipe takes no room")
    free = written.result.nbytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(BitPolicyError, match=f"{free:,} bytes free, .* at least {free + 1:,}; free some space"):
        written.again(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_policy_with_a_text_encoder_is_refused_and_names_it(
    written: Written, policy_of: Any, parts_of: Any, toy_pipeline: Any, tmp_path: Path
) -> None:
    parts = parts_of(unet=toy_pipeline.unet, text_encoder=toy_pipeline.text_encoder)
    policy = policy_of(parts.target, {name: Choice(FP16) for name, _ in quantizable_layers(parts.target)})
    with pytest.raises(BitPolicyError, match=r"diffusers models only, .*text_encoder; .*export without --target"):
        written.again(tmp_path / "out", parts=parts, policy=policy)
    assert list(tmp_path.iterdir()) == []
