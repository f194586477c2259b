"""Every class of model and pipeline through every operation of tests/toys/operations.py: a cell of the table, a test.

tests/policies/operations.yaml says what a cell is expected to be. One that fails is an expected failure, strictly, with
its reason; one that is not applicable is checked to lack what the operation calls. Rows that are not `by_default` run
with `pytest -m every_pipeline`.
"""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from operations import OPERATIONS, PIPELINE_OPERATIONS, output, packed, require_same
from torch import nn
from toy_convolutions import KINDS, ToyConvolutions, sample_for
from toy_pipelines import TOYS, Toy

from bitpolicy import BitPolicyConfig
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import PackedLayer, PackedLinear, pack_layer, quantizable_layers, unsupported_layers
from bitpolicy.policies.apply import quantized, to_storage
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.checkpoints.component import export_component
from bitpolicy.policies.checkpoints.pipeline import export_pipeline
from bitpolicy.policies.policy import Choice, Policy
from bitpolicy.policies.quantization import Quantization
from bitpolicy.policies.target import Target

ROOT = Path(__file__).parents[2]
TABLE = yaml.safe_load((Path(__file__).parent / "operations.yaml").read_text())
NEEDS = {  # what a class lacks where an operation is not applicable
    "lora": "add_adapter",
    "lora_fuse": "fuse_lora",
    "lora_training": "add_adapter",
    "fuse_qkv": "fuse_qkv_projections",
}
ASKED: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "a cat"},
    "class_labels": {"class_labels": [3]},
    "nothing": {},
}


class Case(NamedTuple):
    """One class of model: the ordinary one, rounded to float16, and the folder of the packed one."""

    source: Any
    choices: dict[str, Choice]
    policy: Policy
    loaded: Any
    inputs: dict[str, Any]
    folder: Path


class _Called(Exception):
    """Stops a pipeline at the call that is wanted."""


def inputs_of(pipe: Any, component: str, toy: Toy) -> dict[str, Any]:
    """The keyword arguments of the first call that the pipeline makes."""
    calls: list[dict[str, Any]] = []

    def note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        calls.append({**dict(zip(names, args, strict=False)), **kwargs, "return_dict": False})
        raise _Called

    hook = getattr(pipe, component).register_forward_pre_hook(note, with_kwargs=True)
    with pytest.raises(_Called):
        pipe(**ASKED[toy.takes], **toy.call, **toy.extra, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return calls[0]


def model_and_inputs(name: str) -> tuple[Any, dict[str, Any]]:
    if name == "ToyConvolutions":
        torch.manual_seed(0)
        return ToyConvolutions().eval(), {"sample": sample_for("Conv3d")}
    toy, component = TOYS[TABLE["models"][name]["toy"]], TABLE["models"][name]["component"]
    pipe = toy.new()
    model = getattr(pipe, component)
    if component == "vae":  # never called as a whole
        return model, {
            "sample": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
            "return_dict": False,
        }
    return model, inputs_of(pipe, component, toy)


@pytest.fixture(scope="module")
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    policy_of: Callable[..., Policy],
) -> Case:
    model, inputs = model_and_inputs(request.param)
    folder = tmp_path_factory.mktemp("operations")
    to_storage(model, torch.float16)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(model).items()}
    export_component(model, choices, folder, quantization=Quantization())
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    return Case(model, choices, policy_of(model, choices), loaded, inputs, folder)


@pytest.fixture
def model(case: Case) -> Any:
    """A fresh packed model for one test."""
    return copy.deepcopy(case.loaded)


def cells(rows: str, operations: str) -> list[Any]:
    """One parameter set for each cell that is run: row, operation."""
    return list(_cells(rows, operations))


def _cells(rows: str, operations: str) -> Iterator[Any]:
    for row, about in TABLE[rows].items():
        for operation in TABLE[operations]:
            reason = about.get("fail", {}).get(operation)
            marks: list[Any] = [] if row in TABLE["by_default"] else [pytest.mark.every_pipeline]
            if reason:
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            yield pytest.param(row, operation, marks=marks, id=f"{row}-{operation}")


@pytest.mark.parametrize(("case", "operation"), cells("models", "operations"), indirect=["case"])
def test_a_packed_model_supports_the_operation(
    case: Case, model: Any, operation: str, request: pytest.FixtureRequest
) -> None:
    row = TABLE["models"][request.node.callspec.params["case"]]
    if operation in row.get("not_applicable", ()):
        assert not hasattr(model, NEEDS[operation])
    elif operation in OF_A_CASE:
        OF_A_CASE[operation](case, model)
    else:
        OPERATIONS[operation](model, case.inputs)


def quantize(case: Case, model: Any) -> None:
    """A loaded model computes the same as the original model with quantized weights."""
    assert {name for name, choice in case.choices.items() if choice.format.packed} == {
        name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)
    }
    unquantized = output(case.source, case.inputs)
    with quantized(case.source, case.choices, quantization=Quantization()):
        expected = output(case.source, case.inputs)
    assert torch.equal(output(model, case.inputs), expected)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, unquantized)


def while_read(case: Case, model: Any) -> None:
    """A full-precision model that is packed while it is read equals the exported one, in every dtype."""
    with tempfile.TemporaryDirectory() as folder:
        case.source.save_pretrained(folder)
        for dtype in (None, torch.bfloat16, torch.float32):
            config = BitPolicyConfig(policy=case.policy)
            found = type(model).from_pretrained(folder, quantization_config=config, dtype=dtype)
            exported = type(model).from_pretrained(case.folder, dtype=dtype)
            require_same(found.state_dict(), exported.state_dict())  # some modules are kept in float32
    assert torch.equal(output(found, case.inputs), output(model, case.inputs))


OF_A_CASE = {"quantize": quantize, "while_read": while_read}


# Pipelines


class PipelineCase(NamedTuple):
    toy: Toy
    folder: Path
    full: Path  # the same in full precision

    def draw(self, pipe: Any) -> torch.Tensor:
        """Latents where the pipeline hands them out, else pixels."""
        pipe.set_progress_bar_config(disable=True)
        kind = "latent" if self.toy.gives_latents else "np"
        asked = {**ASKED[self.toy.takes], **self.toy.call, **self.toy.extra, "output_type": kind, "return_dict": False}
        return torch.as_tensor(pipe(**asked, generator=torch.Generator().manual_seed(0))[0])


@pytest.fixture(scope="module")
def pipeline(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    every_format_in_turn: Callable[[nn.Module], dict[str, Choice]],
    policy_of: Callable[..., Policy],
) -> PipelineCase:
    toy, folder = TOYS[request.param], tmp_path_factory.mktemp("operations")
    pipe = toy.new()
    studied = Target.chosen(pipe)
    to_storage(studied, torch.float16)
    choices = {name: Choice(choice.format) for name, choice in every_format_in_turn(studied).items()}
    policy = policy_of(studied, choices)
    export_pipeline(pipe, studied.names, policy, Calibration(), folder / "packed", component_dtype=torch.float32)
    pipe.save_pretrained(folder / "full")
    return PipelineCase(toy, folder / "packed", folder / "full")


@pytest.mark.parametrize(("pipeline", "operation"), cells("pipelines", "pipeline_operations"), indirect=["pipeline"])
def test_a_pipeline_with_a_packed_model_supports_the_operation(pipeline: PipelineCase, operation: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(pipeline.folder, dtype=torch.float32)
    if operation == "pipeline_while_read":
        pipeline_while_read(pipeline, pipe)
    else:
        PIPELINE_OPERATIONS[operation](pipe, pipeline.draw)


def pipeline_while_read(pipeline: PipelineCase, pipe: Any) -> None:
    """A full-precision pipeline that is packed while it is read draws the same as the exported one."""
    policy = Policy.load(pipeline.folder / "policy.yaml")
    names = policy.model.components
    config = PipelineQuantizationConfig(quant_mapping={name: BitPolicyConfig(policy=policy) for name in names})
    found = DiffusionPipeline.from_pretrained(pipeline.full, quantization_config=config, dtype=torch.float32)
    for name in names:
        require_same(packed(getattr(found, name)), packed(getattr(pipe, name)))
    assert torch.equal(pipeline.draw(found), pipeline.draw(pipe))


# Kinds of layers


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_layer_is_packed_or_named_as_left_alone(kind: str) -> None:
    torch.manual_seed(0)
    layer, sample = KINDS[kind](), sample_for(kind)
    model = nn.ModuleDict({"one": layer})
    expected = {"packed": ["one"], "stays FP16": []}[TABLE["kinds"][kind]]
    assert [name for name, _ in quantizable_layers(model)] == expected
    assert [name for name, _ in unsupported_layers(model)] == [name for name in ["one"] if name not in expected]
    weight = layer.weight.detach().clone()
    for chosen in map(format_named, ["int8", "int4", "int4-channel-sym", "nf4"] if expected else []):
        held = pack_layer(layer, chosen, chosen.quantize(weight))
        layer.weight.data = chosen.dequantize(held.packed_tensors(), layer.weight.shape, torch.float32)
        assert torch.equal(held(sample), layer(sample)), chosen.name


# The table is whole


def test_every_operation_every_toy_and_every_kind_of_layer_is_in_the_table() -> None:
    assert set(TABLE["operations"]) == {*OF_A_CASE, *OPERATIONS}
    assert set(TABLE["pipeline_operations"]) == {"pipeline_while_read", *PIPELINE_OPERATIONS}
    assert set(TABLE["pipelines"]) == set(TOYS)
    assert set(TABLE["kinds"]) == set(KINDS)


def test_the_entries_of_a_row_name_known_operations() -> None:
    assert set(TABLE["by_default"]) <= {*TABLE["models"], *TABLE["pipelines"]}
    for rows, operations in (("models", "operations"), ("pipelines", "pipeline_operations")):
        for row, about in TABLE[rows].items():
            said = [*about.get("not_applicable", ()), *about.get("fail", ())]
            assert len(said) == len(set(said)), row
            assert set(said) <= set(TABLE[operations]), row


def test_the_page_is_the_output_of_the_script() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "operations_table.py")], capture_output=True, text=True
    )
    assert done.stdout == (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"), (
        "run python scripts/operations_table.py --write" + done.stderr
    )


# What no operation covers

two_models = pytest.mark.parametrize("case", ["UNet2DConditionModel", "FluxTransformer2DModel"], indirect=True)


@two_models
def test_a_model_with_fused_projections_is_saved_as_it_was(case: Case, model: Any, tmp_path: Path) -> None:
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / file).read_bytes() == (case.folder / file).read_bytes()


@two_models
@pytest.mark.parametrize("operation", ["group_offload", "layerwise_casting"])
def test_dequantizing_is_refused_where_diffusers_offloads_or_casts(case: Case, model: Any, operation: str) -> None:
    if operation == "group_offload":
        model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    expected, held = output(model, case.inputs), packed(model)
    with pytest.raises(BitPolicyError, match=f"has diffusers' {operation.replace('offload', 'offloading')} on its"):
        model.dequantize()
    require_same(packed(model), held)
    assert torch.equal(output(model, case.inputs), expected)


# The checks can fail


@two_models
@pytest.mark.parametrize("operation", ["to_dtype", "half"])
def test_scales_that_are_cast_are_noticed(
    case: Case, model: Any, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedLayer, "_apply", nn.Module._apply)
    with pytest.raises(AssertionError):
        OPERATIONS[operation](model, case.inputs)


@two_models
@pytest.mark.parametrize("operation", ["dequantize", "lora", "lora_training", "input_gradient", "sequential_offload"])
def test_a_layer_that_multiplies_with_another_weight_is_noticed(
    case: Case, model: Any, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: 1.01 * right(self, x))
    with pytest.raises(AssertionError):
        OPERATIONS[operation](model, case.inputs)
