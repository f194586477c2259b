"""What is timed beside torch's own layers: packed layers, and what other projects make of the same layers.

Each function takes a layer or a whole model, which it leaves as it is, and returns a quantized copy; one that finds no
layer that it can quantize raises ValueError.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Collection, Iterable
from copy import deepcopy
from typing import Any, Literal

from torch import nn

from bitpolicy.kernels.compute.setting import set_compute
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import pack_layer, quantizable_layers, replace_layer


def packed(model: nn.Module, format: str, compute: str) -> nn.Module:
    """Packed layers, rounded to nearest."""
    root = _copy(model)
    for name, layer in list(quantizable_layers(root)):
        tensors = format_named(format).quantize(layer.weight.detach())
        replace_layer(root, name, pack_layer(layer, format_named(format), tensors))
    set_compute(root, compute)
    return root["model"]


def by_torchao(model: nn.Module, what: Literal["int8", "int8-weights", "int4-weights"] = "int8") -> nn.Module:
    """Linear layers, whose products torchao leaves to torch.compile to make fast: the caller has to do that.

    Args:
        what: dynamic int8, or weights only; int4 in groups of 32 for CPUs.
    """
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    configs: dict[str, Any] = {
        "int8": Int8DynamicActivationInt8WeightConfig,
        "int8-weights": Int8WeightOnlyConfig,
        "int4-weights": lambda: PrototypeInt4WeightOnlyConfig(group_size=32),
    }
    root = _copy(model)
    _linears(root)
    quantize_(root, configs[what]())
    return root["model"]


def by_sdnq(model: nn.Module, weights: str = "int8", matmul: bool = True) -> nn.Module:
    """Linear layers and convolutions of any size; SDNQ compiles its functions itself.

    Args:
        weights: its dtype for them.
        matmul: whether inputs are quantized, too, and multiplied as integers.
    """
    from sdnq import SDNQConfig
    from sdnq.quantizer import apply_sdnq_to_module

    config = SDNQConfig(
        weights_dtype=weights,
        use_quantized_matmul=matmul,
        use_quantized_matmul_conv=matmul,
        quant_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
    )
    return apply_sdnq_to_module(_copy(model), config)[0]["model"]


def by_comfy(model: nn.Module) -> nn.Module:
    """Linear layers with one scale for all of a weight and one for all of an input."""
    from comfy_kitchen.tensor import QuantizedTensor

    root = _copy(model)
    for layer in _linears(root):
        weight = QuantizedTensor.from_float(layer.weight, "TensorWiseINT8Layout")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return root["model"]


def require_known(parser: ArgumentParser, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names of contenders that are none of `known`."""
    unknown = set(names) - set(known)
    if unknown:
        parser.error(f"unknown contender {', '.join(sorted(unknown))}; write any of {', '.join(known)}")


def _copy(model: nn.Module) -> nn.ModuleDict:
    """With a name above the model, as a lone layer has none by which it could be replaced."""
    return nn.ModuleDict({"model": deepcopy(model)})


def _linears(root: nn.Module) -> list[nn.Linear]:
    found = [layer for layer in root.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError("linear layers only")
    return found
