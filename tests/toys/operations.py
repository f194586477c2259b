"""What people do with a model of diffusers, as checks that a packed one goes along.

Each takes a model that was loaded packed, in float32 and eval mode, and the keyword arguments of one call, and raises
AssertionError where the outcome is not that of an ordinary model with the same weights. It may change the model: give
each its own. `OPERATIONS` lists those of one model, `PIPELINE_OPERATIONS` those of a pipeline.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from torch import nn

from bitpolicy.kernels.layers import PackedLayer

Inputs = Mapping[str, Any]
Operation = Callable[[Any, Inputs], None]
_CPU = torch.device("cpu")


def output(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the model returns for the inputs, without a gradient, its first tensor."""
    with torch.no_grad():
        return _first(model(**inputs))


def _first(result: Any) -> torch.Tensor:
    """Of a ControlNet the residuals of all levels, one after the other."""
    found = result if isinstance(result, torch.Tensor) else result[0]
    return torch.cat([part.flatten() for part in found]) if isinstance(found, list) else found


def plain(model: Any) -> Any:
    """An ordinary model with the same weights."""
    return copy.deepcopy(model).dequantize()


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every packed tensor, by the name of its layer without what peft adds."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLayer))
    return {
        f"{name.removesuffix('.base_layer')}.{suffix}": tensor.clone()
        for name, layer in layers
        for suffix, tensor in layer.packed_tensors().items()
    }


def require_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found, "nothing is packed"
    assert found.keys() == expected.keys()
    odd = [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert not odd, odd


def cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return {key: one(part) for key, part in value.items()} if isinstance(value, dict) else value

    return {name: one(value) for name, value in inputs.items()}


# In memory


def to_dtype(model: Any, inputs: Inputs) -> None:
    """`.to(bfloat16)` and back: what is packed stays, the rest is what an ordinary model has after it."""
    before, ordinary = packed(model), plain(model).to(torch.bfloat16)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    require_same(packed(model), before)
    unpacked = [name for name, _ in model.named_parameters()]
    ordinary_state = ordinary.state_dict()
    assert all(torch.equal(model.state_dict()[name], ordinary_state[name]) for name in unpacked)
    assert torch.equal(output(model, cast(inputs, torch.bfloat16)), output(ordinary, cast(inputs, torch.bfloat16)))
    model.to(torch.float32)
    assert {layer.compute_dtype for layer in model.modules() if isinstance(layer, PackedLayer)} == {torch.float32}


def half(model: Any, inputs: Inputs) -> None:
    """`.half()`."""
    before, ordinary = packed(model), plain(model).half()
    model.half()
    require_same(packed(model), before)
    assert torch.equal(output(model, cast(inputs, torch.float16)), output(ordinary, cast(inputs, torch.float16)))


def deepcopy(model: Any, inputs: Inputs) -> None:
    """A copy is packed, and its own."""
    expected, twin = output(model, inputs), copy.deepcopy(model)
    require_same(packed(twin), packed(model))
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(output(model, inputs), expected)


def save_and_load(model: Any, inputs: Inputs) -> None:
    """Saved and loaded twice: the same bits, and the same bytes."""
    expected = output(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        model.save_pretrained(first)
        again = type(model).from_pretrained(first, dtype=torch.float32)
        require_same(packed(again), packed(model))
        assert torch.equal(output(again, inputs), expected)
        again.save_pretrained(second)
        files = sorted(path.name for path in first.glob("*.safetensors"))
        assert files
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def shards(model: Any, inputs: Inputs) -> None:
    """Saved in many files, and loaded: the same bits."""
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    _require_loads(model, inputs, {"max_shard_size": nbytes // 4}, {})


def variant(model: Any, inputs: Inputs) -> None:
    """Saved as a variant, and loaded as one: the same bits."""
    _require_loads(model, inputs, {"variant": "fp16"}, {"variant": "fp16"})


def device_map(model: Any, inputs: Inputs) -> None:
    """Loaded straight to a device."""
    _require_loads(model, inputs, {}, {"device_map": {"": "cpu"}})


def _require_loads(model: Any, inputs: Inputs, save: dict[str, Any], load: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save)
        names = [path.name for path in Path(folder).glob("*.safetensors")]
        assert (len(names) > 1) == ("max_shard_size" in save)
        assert all(save.get("variant", "") in name for name in names)
        again = type(model).from_pretrained(folder, dtype=torch.float32, **load)
    require_same(packed(again), packed(model))
    assert torch.equal(output(again, inputs), output(model, inputs))


def dtypes(model: Any, inputs: Inputs) -> None:
    """Loaded in a dtype it is what an ordinary model is that is loaded in it; loaded in none it has the stored one."""
    with tempfile.TemporaryDirectory() as name:
        folder, ordinary = Path(name) / "packed", Path(name) / "ordinary"
        model.save_pretrained(folder)
        plain(model).save_pretrained(ordinary)
        for dtype in (None, torch.float16, torch.bfloat16, torch.float32):
            again = type(model).from_pretrained(folder, dtype=dtype)
            expected = copy.deepcopy(type(model).from_pretrained(ordinary, dtype=dtype or torch.float16))
            for one in (again, expected):
                one.requires_grad_(False)  # torch's matmul asks for it before it decides how to add
            require_same(packed(again), packed(model))
            dtypes = {name: parameter.dtype for name, parameter in expected.named_parameters()}
            assert all(dtypes[name] == parameter.dtype for name, parameter in again.named_parameters())
            given = cast(inputs, dtype or torch.float16)
            assert torch.equal(output(again, given), output(expected, given))


def dequantize(model: Any, inputs: Inputs) -> None:
    """`dequantize()` gives an ordinary model that computes the same and saves as one."""
    expected, counted = output(model, inputs), model.num_parameters()
    ordinary = model.dequantize()
    assert ordinary.num_parameters() == counted
    assert not any(isinstance(module, PackedLayer) for module in ordinary.modules())
    assert torch.equal(output(ordinary, inputs), expected)
    with tempfile.TemporaryDirectory() as folder:
        ordinary.save_pretrained(folder)
        again = type(ordinary).from_pretrained(folder, dtype=torch.float32)
        assert not any(isinstance(module, PackedLayer) for module in again.modules())
        # Copied to memory that is aligned as usual: in a mapped file torch adds in another order, in any model.
        assert torch.equal(output(copy.deepcopy(again), inputs), expected)


# LoRA


def _targets(model: nn.Module) -> list[str]:
    """Of each kind of packed layer some, by their full names; peft has no LoRA for grouped or dilated convolutions."""
    found: dict[type, list[str]] = {}
    for name, layer in model.named_modules():
        usual = getattr(layer, "groups", 1) == 1 and set(getattr(layer, "dilation", (1,))) == {1}
        if isinstance(layer, PackedLayer) and usual:
            found.setdefault(type(layer), []).append(name)
    return [name for names in found.values() for name in names[:6]]


def _adapt(model: Any, targets: list[str] | None = None, name: str = "default") -> Any:
    torch.manual_seed(3)
    wanted = targets or _targets(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=wanted), adapter_name=name)
    return model


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def lora(model: Any, inputs: Inputs) -> None:
    """An adapter computes what it computes on ordinary layers, at every scale, and leaves with nothing changed."""
    before, expected, held, targets = output(model, inputs), plain(model), packed(model), _targets(model)
    _adapt(model)
    _adapt(expected, targets)
    for scale in (1.0, 0.25):
        model.set_adapters("default", weights=scale)
        expected.set_adapters("default", weights=scale)
        assert torch.equal(output(model, inputs), output(expected, inputs))
    assert not torch.equal(output(model, inputs), before)
    model.disable_adapters()
    assert torch.equal(output(model, inputs), before)
    model.unload_lora()
    require_same(packed(model), held)
    assert torch.equal(output(model, inputs), before)


def lora_fuse(model: Any, inputs: Inputs) -> None:
    """Fused, the adapter is in the packed weights as nearly as their formats hold it; unfused it is out again.

    Each of the two rounds the weights once: what is left after both is of the size that one rounding makes.
    """
    before, targets = output(model, inputs), _targets(model)
    _adapt(model)
    adapted = output(model, inputs)
    model.fuse_lora()
    fused = output(model, inputs)
    assert _distance(fused, adapted) < 0.5 * _distance(before, adapted)
    model.unfuse_lora()
    model.unload_lora()
    left = _distance(output(model, inputs), before)
    assert left < 0.75 * _distance(adapted, before)
    assert left < 3 * _distance(fused, adapted)
    kept = {name.rpartition(".")[0] for name in packed(model)}
    assert set(targets) <= kept


def lora_training(model: Any, inputs: Inputs) -> None:
    """Gradients of an adapter through packed layers are those through ordinary ones."""
    expected, targets = plain(model), _targets(model)
    _adapt(model)
    _adapt(expected, targets)
    for one in (model, expected):
        _first(one(**inputs)).square().mean().backward()
    theirs = {name: parameter.grad for name, parameter in expected.named_parameters() if "lora_" in name}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    assert ours
    for name, gradient in ours.items():
        assert gradient is not None, name
        assert torch.equal(gradient, theirs[name]), name
    assert any(gradient.any() for gradient in ours.values())


def input_gradient(model: Any, inputs: Inputs) -> None:
    """The gradient of the inputs passes through packed layers."""
    found, expected = (_gradient_of_inputs(one, inputs) for one in (model, plain(model)))
    assert found.any()
    assert torch.equal(found, expected)


def _gradient_of_inputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    name = next(n for n, value in inputs.items() if isinstance(value, torch.Tensor) and value.is_floating_point())
    given = inputs[name].clone().requires_grad_()
    _first(model(**{**inputs, name: given})).square().sum().backward()
    return given.grad


# diffusers' own ways to save memory and time


def group_offload(model: Any, inputs: Inputs) -> None:
    """Offloaded group by group, by blocks and by leaves, with what is packed kept."""
    expected, held = output(model, inputs), packed(model)
    for kind in ("leaf_level", "block_level"):
        one = copy.deepcopy(model)
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(one, onload_device=_CPU, offload_device=_CPU, offload_type=kind, **blocks)
        assert torch.equal(output(one, inputs), expected), kind
        require_same(packed(one), held)


def sequential_offload(model: Any, inputs: Inputs) -> None:
    """Offloaded layer by layer by accelerate, and dequantized as it is."""
    expected, held = output(model, inputs), packed(model)
    accelerate.cpu_offload(model, execution_device=_CPU, offload_buffers=True)
    meta = [layer for layer in model.modules() if isinstance(layer, PackedLayer) and layer.weight_packed.is_meta]
    assert len(meta) == len({name.rpartition(".")[0] for name in held}), "the packed tensors are not offloaded"
    assert torch.equal(output(model, inputs), expected)
    ordinary = model.dequantize()
    assert not any(isinstance(module, PackedLayer) for module in ordinary.modules())
    assert all(parameter.is_meta for parameter in ordinary.parameters())
    assert torch.equal(output(ordinary, inputs), expected)
    accelerate.hooks.remove_hook_from_module(ordinary, recurse=True)
    for parameter in ordinary.parameters():
        parameter.data.zero_()
    assert not torch.equal(output(ordinary, inputs), expected), "it still computes with what was packed"


def layerwise_casting(model: Any, inputs: Inputs) -> None:
    """Biases and unpacked layers are kept in float8 between calls, packed weights as they are."""
    small, held, expected = torch.float8_e4m3fn, packed(model), copy.deepcopy(model)
    model.enable_layerwise_casting(storage_dtype=small, compute_dtype=torch.float32)
    cast_between = [name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")]
    assert any(isinstance(model.get_submodule(name), PackedLayer) for name in cast_between)
    for name in cast_between:
        for parameter in expected.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data.to(small).to(parameter.dtype)
    assert torch.equal(output(model, inputs), output(expected, inputs))
    require_same(packed(model), held)
    assert any(parameter.dtype == small for parameter in model.parameters())


def fuse_qkv(model: Any, inputs: Inputs) -> None:
    """Fused projections compute the same; taken apart again, the model is the packed one."""
    expected, held = output(model, inputs), packed(model)
    model.fuse_qkv_projections()
    assert torch.allclose(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model, inputs), expected)
    require_same(packed(model), held)
    save_and_load(model, inputs)


def compiled(model: Any, inputs: Inputs) -> None:
    """`torch.compile` takes the whole model as one graph; backend eager, inductor would take minutes."""
    expected = output(model, inputs)
    torch._dynamo.reset()
    compiled_model = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(output(compiled_model, inputs), expected, rtol=1e-5, atol=1e-6)


def exported(model: Any, inputs: Inputs) -> None:
    """`torch.export` gives a program that holds the packed tensors and computes the same."""
    expected = output(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), dict(inputs), strict=False)
    found = _first(program.module()(**inputs))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    names = set(packed(model))
    assert names <= {*program.state_dict, *program.constants}, "the packed tensors are not in the program"


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        to_dtype,
        half,
        deepcopy,
        save_and_load,
        shards,
        variant,
        dtypes,
        device_map,
        dequantize,
        lora,
        lora_fuse,
        lora_training,
        input_gradient,
        group_offload,
        sequential_offload,
        layerwise_casting,
        fuse_qkv,
        compiled,
        exported,
    )
}


# Of a pipeline: `draw` gives its latents for fixed arguments.

Draw = Callable[[Any], torch.Tensor]


def from_pipe(pipe: Any, draw: Draw) -> None:
    """A pipeline made from another shares its packed model, and draws the same."""
    expected = draw(pipe)
    other = type(pipe).from_pipe(pipe)
    name = next(n for n, part in pipe.components.items() if isinstance(part, nn.Module) and any(packed(part)))
    assert getattr(other, name) is getattr(pipe, name)
    assert torch.equal(draw(other), expected)


def pipeline_to(pipe: Any, draw: Draw) -> None:
    """A pipeline that went to bfloat16 and back draws as if all but what is packed had been rounded to bfloat16."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    rounded = {name: copy.deepcopy(part) for name, part in parts.items()}
    held = {name: found for name, part in parts.items() if (found := packed(part))}
    pipe.to(torch.bfloat16)
    for name, before in held.items():
        require_same(packed(parts[name]), before)
    pipe.to(torch.float32)
    found = draw(pipe)
    for part in rounded.values():
        _round(part, torch.bfloat16)
    pipe.register_modules(**rounded)
    assert torch.equal(found, draw(pipe))


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every float that no layer packs be one of `dtype`."""
    for module in model.modules():
        own = {} if isinstance(module, PackedLayer) else module._buffers
        for tensor in (*module._parameters.values(), *own.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype).to(tensor.dtype)


def pipeline_saved(pipe: Any, draw: Draw) -> None:
    """A pipeline is saved and loaded as it was, and saved again with the same bytes."""
    expected = draw(pipe)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        pipe.save_pretrained(first)
        again = type(pipe).from_pretrained(first, dtype=torch.float32)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), expected)
        again.save_pretrained(second)
        files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
        assert files
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def model_cpu_offload(pipe: Any, draw: Draw) -> None:
    """Each model comes to a device for its calls, here the CPU; drawn twice, as what went away comes back."""
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe), expected)


PIPELINE_OPERATIONS: dict[str, Callable[[Any, Draw], None]] = {
    operation.__name__: operation for operation in (from_pipe, pipeline_to, pipeline_saved, model_cpu_offload)
}
