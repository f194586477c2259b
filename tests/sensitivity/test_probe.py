"""Probes over calibration samples: the adjoint probe against ablation, and what an interrupted probe repeats."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from scipy.stats import spearmanr

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP16, format_named, parse_formats
from bitpolicy.kernels.layers import quantizable_layers
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.inventory import Layer, inventory
from bitpolicy.sensitivity.probes.measurement import References, ablate
from bitpolicy.sensitivity.probes.run import ProbeRun, ProbeSettings
from bitpolicy.sensitivity.probes.weight import weight_errors
from bitpolicy.sensitivity.records import Records
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.samples import Sample, split_samples
from bitpolicy.sensitivity.table import SensitivityTable
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories

NewTrajectories = Callable[..., Trajectories]
INT4, INT8 = format_named("int4"), format_named("int8")
SAMPLES = tuple(split_samples(["a red heart", "pizza", "cat face"], 3, seed=0))
SETTINGS = ProbeSettings("adjoint", SAMPLES, vectors=2)


def new_run(
    trajectories: Trajectories,
    folder: Path,
    settings: ProbeSettings = SETTINGS,
    formats: str = "int4,int8",
    weights: str = "toy",
) -> ProbeRun:
    layers = inventory(trajectories.target)
    chosen = parse_formats(formats)
    return ProbeRun(trajectories, layers, chosen, torch.float16, weights, settings, folder, Stages(quiet=True))


def table_of(run: ProbeRun) -> SensitivityTable:
    return run.table(run.reference())


@pytest.fixture(scope="module")
def tables(new_trajectories: NewTrajectories, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SensitivityTable]:
    """The same pipeline and samples under every probe."""
    trajectories = new_trajectories(num_inference_steps=2, guidance_scale=1.0)
    folder = tmp_path_factory.mktemp("probes")
    settings = {probe: ProbeSettings(probe, SAMPLES[:2], vectors=16) for probe in ("adjoint", "ablation", "weight")}
    return {probe: table_of(new_run(trajectories, folder, wanted)) for probe, wanted in settings.items()}


@pytest.mark.parametrize("column", [0, 1], ids=["int4", "int8"])
def test_adjoint_scores_agree_with_ablation_in_rank_and_size(tables: dict[str, SensitivityTable], column: int) -> None:
    predicted, truth = tables["adjoint"].error[:, column], tables["ablation"].error[:, column]
    assert spearmanr(predicted, truth).statistic > 0.95
    ratio = predicted / truth
    assert 0.8 < ratio.median() < 1.25
    assert 0.7 < predicted.sum() / truth.sum() < 1.5


@pytest.mark.parametrize("probe", ["adjoint", "ablation", "weight"])
def test_scores_are_finite_and_positive_and_zero_for_fp16(tables: dict[str, SensitivityTable], probe: str) -> None:
    table = tables[probe]
    assert table.error.shape == table.corrected.shape == (83, 2)
    assert table.error.dtype == torch.float64
    assert torch.isfinite(table.error).all()
    assert (table.error >= 0).all()
    assert (table.error > 0).float().mean() > 0.9
    assert all(table.score(i, FP16) == 0.0 for i in range(83))


@pytest.mark.parametrize("probe", ["adjoint", "ablation", "weight"])
def test_int8_harms_less_than_int4(tables: dict[str, SensitivityTable], probe: str) -> None:
    error = tables[probe].error
    assert (error[:, 1] < error[:, 0]).float().mean() > 0.9
    assert error[:, 1].sum() < error[:, 0].sum() / 10


def test_predictions_of_policies_are_never_negative(tables: dict[str, SensitivityTable]) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        formats = [(INT4, INT8, FP16)[i] for i in torch.randint(3, (83,), generator=draw).tolist()]
        predicted = tables["adjoint"].vector_error(formats)
        assert predicted is not None
        assert predicted >= 0


def test_the_adjoint_probe_keeps_one_sketch_per_vector_and_sample(tables: dict[str, SensitivityTable]) -> None:
    table = tables["adjoint"]
    assert table.sketches is not None
    assert table.sketches.shape == (2 * 16, 83, 2)
    torch.testing.assert_close(table.sketches.double().square().mean(0), table.error, rtol=1e-4, atol=0)


def test_the_predicted_error_of_a_policy_is_near_the_measured_one(
    tables: dict[str, SensitivityTable], new_trajectories: NewTrajectories
) -> None:
    """All layers are INT8 with the plain bias, so the error is small enough for first order."""
    trajectories, table = new_trajectories(num_inference_steps=2, guidance_scale=1.0), tables["adjoint"]
    reference = torch.stack(list(trajectories.latents(SAMPLES[:2])))
    for _, layer in quantizable_layers(trajectories.target):
        layer.weight.data = INT8.dequantize(INT8.quantize(layer.weight.data), layer.weight.shape, torch.float32)
    moved = torch.stack(list(trajectories.latents(SAMPLES[:2])))
    measured = float((moved - reference).square().sum() / reference.square().sum())
    as_vectors, as_powers = table.vector_error([INT8] * 83), table.additive_error([INT8] * 83)
    assert as_vectors is not None
    assert as_powers is not None
    assert measured / 4 < as_vectors < measured * 4
    assert measured / 4 < as_powers < measured * 4


# The weight probe


def test_weight_errors_follow_the_formula(toy_unet: Any) -> None:
    found = weight_errors(toy_unet, candidates([INT4, INT8]), quantization=Quantization())
    for row, (_, layer) in enumerate(quantizable_layers(toy_unet)):
        weight = layer.weight.detach().half()
        for column, format in enumerate((INT4, INT8)):
            stored = format.dequantize(format.quantize(weight), weight.shape, torch.float32).double()
            expected = ((stored - weight.double()) ** 2).sum() / (weight.double() ** 2).sum()
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-9)


def test_a_weight_of_zeros_has_no_weight_error(toy_unet: Any) -> None:
    toy_unet.conv_in.weight.data.zero_()
    assert weight_errors(toy_unet, candidates([INT4, INT8]), quantization=Quantization())[0].tolist() == [0.0, 0.0]


# The ablation probe


def one_layer_by_hand(
    trajectories: Trajectories, layer: Layer, format: Any, patch: torch.Tensor, correct: bool
) -> torch.Tensor:
    """The latents with the rounded weight of one layer, and its corrected bias if requested, set by hand."""
    module: Any = trajectories.pipe.unet.get_submodule(layer.name)
    weight, bias = module.weight.data, None if module.bias is None else module.bias.data
    half = weight.half()
    module.weight.data = format.dequantize(format.quantize(half), half.shape, torch.float32)
    if correct and bias is not None:
        delta = (module.weight.data - weight).double()
        module.bias.data = (bias - (delta * patch).flatten(1).sum(1).float()).half().float()
    latents = torch.stack(list(trajectories.latents(SAMPLES)))
    module.weight.data = weight
    if bias is not None:
        module.bias.data = bias
    return latents


@pytest.mark.parametrize("name", ["conv_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "conv_out"])
def test_ablation_equals_a_run_with_only_that_layer_quantized(new_trajectories: NewTrajectories, name: str) -> None:
    trajectories = new_trajectories(num_inference_steps=2)
    (layer,) = [layer for layer in inventory(trajectories.target) if layer.name == name]
    patch = torch.randn(layer.shape[1:], generator=torch.Generator().manual_seed(1))
    reference = References.of(trajectories, SAMPLES, images=False)
    for format, correct in itertools.product((INT4, INT8), (False, True)):
        choices = {name: Choice(format, correct)}
        found = ablate(
            trajectories, choices, SAMPLES, reference, quantization=Quantization(calibration=Calibration({name: patch}))
        )
        errors = (one_layer_by_hand(trajectories, layer, format, patch, correct) - reference.latents).double()
        expected = errors.square().flatten(1).sum(1)
        torch.testing.assert_close(found.power, expected, rtol=1e-3, atol=0)
        units = reference.latents.double().flatten(1)
        units /= units.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found.parallel, (errors.flatten(1) * units).sum(1), rtol=1e-3, atol=1e-6)
        pairs = [float((a * b).sum()) for a, b in itertools.permutations(errors, 2)]
        assert found.mean == pytest.approx(sum(pairs) / len(pairs), rel=1e-3, abs=1e-9)
        assert found.psnr_db is None


# What an interrupted probe repeats


class Calls:
    """Counts trajectories, with a graph and without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain: list[Sample] = []
        self.graph: list[Sample] = []
        latents, differentiable = Trajectories.latents, Trajectories.differentiable_signal

        def counted_latents(this: Trajectories, samples: Any) -> Any:
            samples = list(samples)
            self.plain += samples
            return latents(this, samples)

        def counted_differentiable(this: Trajectories, sample: Sample) -> torch.Tensor:
            self.graph.append(sample)
            return differentiable(this, sample)

        monkeypatch.setattr(Trajectories, "latents", counted_latents)
        monkeypatch.setattr(Trajectories, "differentiable_signal", counted_differentiable)

    def new(self) -> tuple[list[Sample], list[Sample]]:
        """The trajectories (without a graph, with a graph) since the last call of this method."""
        found = self.plain, self.graph
        self.plain, self.graph = [], []
        return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def pieces(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(f"*/{pattern}.safetensors"))


def assert_equal_tables(a: SensitivityTable, b: SensitivityTable) -> None:
    assert (a.layers, a.formats, a.probe) == (b.layers, b.formats, b.probe)
    assert torch.equal(a.error, b.error)
    assert torch.equal(a.corrected, b.corrected)


def test_a_finished_probe_does_not_run_again(new_trajectories: NewTrajectories, calls: Calls, tmp_path: Path) -> None:
    first = table_of(new_run(new_trajectories(), tmp_path))
    assert calls.new() == (list(SAMPLES), list(SAMPLES))
    again = table_of(new_run(new_trajectories(), tmp_path))
    assert calls.new() == ([], [])
    assert_equal_tables(first, again)


def test_a_probe_with_more_vectors_reuses_the_existing_ones(
    new_trajectories: NewTrajectories, calls: Calls, tmp_path: Path
) -> None:
    table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path))
    kept = {path: path.read_bytes() for path in pieces(tmp_path)}
    more = table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path, replace(SETTINGS, vectors=3)))
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(pieces(tmp_path, "sketch-*")) == 9
    at_once = table_of(
        new_run(new_trajectories(num_inference_steps=1), tmp_path / "other", replace(SETTINGS, vectors=3))
    )
    assert_equal_tables(more, at_once)


@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
def test_an_interrupted_probe_resumes(
    new_trajectories: NewTrajectories, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Pieces in order: the reference, the layers to sum, then two sketches for each of three samples."""
    whole = table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path / "whole"))
    calls.new()
    put = Records.put

    def put_until(records: Records, name: str, tensors: Any) -> None:
        if len(pieces(tmp_path / "stopped")) == done:
            raise KeyboardInterrupt
        put(records, name, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(Records, "put", put_until)
        with pytest.raises(KeyboardInterrupt):
            table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path / "stopped"))
    assert len(pieces(tmp_path / "stopped")) == done
    calls.new()
    resumed = table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path / "stopped"))
    plain, graph = calls.new()
    assert graph == list(SAMPLES[max(done - 2, 0) // 2 :])
    assert plain == (graph[:1] if done else list(SAMPLES))  # one run to find where the loop ends, or the reference pass
    assert_equal_tables(resumed, whole)


@pytest.mark.parametrize(("piece", "again"), [("reference-0", (3, 0)), ("sketch-1-0", (1, 1)), ("sketch-2-1", (1, 1))])
@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "cut"])
def test_a_damaged_piece_is_recomputed(
    new_trajectories: NewTrajectories,
    calls: Calls,
    tmp_path: Path,
    piece: str,
    again: tuple[int, int],
    content: bytes | None,
) -> None:
    whole = table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path))
    (path,) = pieces(tmp_path, piece)
    good = path.read_bytes()
    path.write_bytes(good[:-5] if content is None else content)
    calls.new()
    mended = table_of(new_run(new_trajectories(num_inference_steps=1), tmp_path))
    plain, graph = calls.new()
    assert (len(plain), len(graph)) == again
    assert path.read_bytes() == good
    assert_equal_tables(whole, mended)


def test_an_interrupted_ablation_resumes(new_trajectories: NewTrajectories, calls: Calls, tmp_path: Path) -> None:
    settings = ProbeSettings("ablation", SAMPLES[:1])
    trajectories = new_trajectories(num_inference_steps=1)
    whole = table_of(new_run(trajectories, tmp_path, settings, "int8"))
    calls.new()
    for lost in pieces(tmp_path, "ablation-conv_out-*"):
        lost.unlink()
    mended = table_of(new_run(trajectories, tmp_path, settings, "int8"))
    assert len(calls.new()[0]) == 1 + 2  # the reference, and conv_out with and without bias correction
    assert_equal_tables(whole, mended)


def other_settings() -> dict[str, Callable[[NewTrajectories, Path], ProbeRun]]:
    euler, ddim = EulerDiscreteScheduler, DDIMScheduler

    def samples(*chosen: Sample) -> ProbeSettings:
        return ProbeSettings("adjoint", chosen, 2)

    def other_beta(new: NewTrajectories, folder: Path) -> ProbeRun:
        trajectories = new()
        trajectories.pipe.scheduler = ddim.from_config(trajectories.pipe.scheduler.config, beta_end=0.03)
        return new_run(trajectories, folder)

    return {
        "a step more": lambda new, folder: new_run(new(num_inference_steps=4), folder),
        "other guidance": lambda new, folder: new_run(new(guidance_scale=2.0), folder),
        "another scheduler": lambda new, folder: new_run(new(euler), folder),
        "another scheduler setting": other_beta,
        "another prompt": lambda new, folder: new_run(new(), folder, samples(Sample("dog", 0), *SAMPLES[1:])),
        "another seed": lambda new, folder: new_run(new(), folder, samples(Sample(SAMPLES[0].prompt, 9), *SAMPLES[1:])),
        "a sample less": lambda new, folder: new_run(new(), folder, samples(*SAMPLES[:2])),
        "another format": lambda new, folder: new_run(new(), folder, formats="int4-g32,int8"),
        "formats in another order": lambda new, folder: new_run(new(), folder, formats="int8,int4"),
        "another weight": lambda new, folder: new_run(new(), folder, weights="other"),
        "another dtype": lambda new, folder: new_run(new(dtype=torch.float64), folder),
    }


@pytest.mark.parametrize("change", other_settings())
def test_different_settings_have_separate_records(
    new_trajectories: NewTrajectories, tmp_path: Path, change: str
) -> None:
    new_run(new_trajectories(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    new_run(new_trajectories(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    other_settings()[change](new_trajectories, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_fp16_alone_leaves_nothing_to_score(new_trajectories: NewTrajectories, tmp_path: Path) -> None:
    with_fp16 = new_run(new_trajectories(num_inference_steps=1), tmp_path, formats="int8,fp16")
    table = table_of(with_fp16)
    assert table.formats == (INT8,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magic", SAMPLES, 2), "unknown probe 'magic'; write any of adjoint, stepwise, ablation, weight"),
        (("adjoint", (), 2), "got 0 samples, 2 vectors"),
        (("adjoint", SAMPLES, 0), "got 3 samples, 0 vectors"),
    ],
)
def test_invalid_settings_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(BitPolicyError, match=message):
        ProbeSettings(*arguments)
