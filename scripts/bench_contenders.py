"""The contenders that are timed against torch's own layers: packed layers, and the same layers quantized by others.

Each function takes a layer or a whole model, leaves it unchanged and returns a quantized copy. It raises ValueError if
it finds no layer that it can quantize.
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
    """Pack every quantizable layer, rounded to nearest."""
    root = _copy(model)
    for name, layer in list(quantizable_layers(root)):
        tensors = format_named(format).quantize(layer.weight.detach())
        replace_layer(root, name, pack_layer(layer, format_named(format), tensors))
    set_compute(root, compute)
    return root["model"]


def by_torchao(model: nn.Module, what: Literal["int8", "int8-weights", "int4-weights"] = "int8") -> nn.Module:
    """Quantize linear layers with torchao. They are fast only under torch.compile, which the caller has to run.

    Args:
        what: dynamic int8, or weights only; int4 is for CPUs, in groups of 32.
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
    """Quantize linear layers and convolutions of any size with SDNQ, which compiles its own functions.

    Args:
        weights: SDNQ's name of the weights' dtype.
        matmul: whether inputs are quantized too and multiplied as integers.
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
    """Quantize linear layers with comfy-kitchen: one scale per weight tensor and one per input tensor."""
    from comfy_kitchen.tensor import QuantizedTensor

    root = _copy(model)
    for layer in _linears(root):
        weight = QuantizedTensor.from_float(layer.weight, "TensorWiseINT8Layout")
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return root["model"]


def require_known(parser: ArgumentParser, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names of contenders that are not in `known`."""
    unknown = set(names) - set(known)
    if unknown:
        parser.error(f"unknown contender {', '.join(sorted(unknown))}; write any of {', '.join(known)}")


def _copy(model: nn.Module) -> nn.ModuleDict:
    """A copy inside a container, because a layer can only be replaced under a name."""
    return nn.ModuleDict({"model": deepcopy(model)})


def _linears(root: nn.Module) -> list[nn.Linear]:
    found = [layer for layer in root.modules() if isinstance(layer, nn.Linear)]
    if not found:
        raise ValueError("linear layers only")
    return found
