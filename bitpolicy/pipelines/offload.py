"""Run a pipeline whose denoiser is larger than the accelerator: weights stay in main memory and are copied over on use.

Each large layer of the denoiser copies its weight to the device of its input, inside the autograd graph, so that
gradients flow back to the copy in main memory. Everything small (norms, embeddings, biases of other layers) stays on
the device. If the denoiser is checkpointed block by block, the device holds one block's weights at a time. The other
models are moved over whole when they run, and leave before the denoiser runs (accelerate's hooks).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from torch import nn

from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.policies.target import Target


def stream_weights(pipe: DiffusionPipeline, target: Target, device: torch.device) -> None:
    """Permanently prepare `pipe`, which is on the CPU, to run on `device` with streamed weights.

    Args:
        target: the components whose weights are streamed; the other models are moved whole.
    """
    others = [m for m in pipe.components.values() if isinstance(m, nn.Module) and m not in target.models]
    leaving = [cpu_offload_with_hook(other, device)[1] for other in others]
    for model in target.models:
        streamed = dict(quantizable_layers(model))
        for layer in streamed.values():
            layer.forward = _streaming(layer)  # type: ignore[assignment, method-assign]
        for module in model.modules():
            if module not in streamed.values():
                _move_own(module, device)
        add_hook_to_module(model, _RunsOn(device, leaving))


class _RunsOn(ModelHook):
    """Tells diffusers which device the loop runs on, and moves the other models off it."""

    def __init__(self, device: torch.device, others: Sequence[Any]) -> None:
        self.execution_device, self._others = device, others

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self._others:
            other.offload()
        return args, kwargs


def _streaming(layer: Quantizable) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        weight = layer.weight.to(input.device)
        bias = None if layer.bias is None else layer.bias.to(input.device)
        if isinstance(layer, nn.Linear):
            return nn.functional.linear(input, weight, bias)
        return layer._conv_forward(input, weight, bias)

    return forward


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move the parameters and buffers of this module, but not those of its submodules."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
