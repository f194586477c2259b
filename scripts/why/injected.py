"""What blocks and normalizations do to an error that is put in, and which operator passes more of its own.

`blocks` adds an error of 1% of the hidden state's size at the input of one residual block at a time, and measures the
relative error behind the next normalization, and at the output of the model. The error is

    noise   independent at each position and channel
    shift   one value per channel, the same at every position and for every sample
    scale   1% of the hidden state itself

`operators` perturbs the weights of all layers of one kind by Gaussian noise of 3% of each output channel's size. So a
convolution and a linear layer get relative errors of the same size, which no format would give them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peers.own_model import OUTPUT, call
from torch import nn
from why.subjects import Subject, decibels, relative

KINDS = ("noise", "shift", "scale")
SIZE, WEIGHT_SIZE = 0.01, 0.03
CALL_ROWS = 8
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "GPT2Block", "TemporalConvLayer")
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
Run = Callable[[], torch.Tensor]
"""Calls the model and returns its output."""


def blocks(model: nn.Module, runs: Sequence[Run]) -> dict[str, float]:
    """Medians over residual blocks: relative error behind the next normalization and at the model's output, each as a
    multiple of the 1% that was put in.

    Args:
        runs: calls of the model, whose errors are added up as powers.
    """
    places = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    found: dict[str, list[float]] = {f"{where}, {kind}": [] for where in ("norm", "output") for kind in KINDS}
    clean = [run() for run in runs]
    for place, block in enumerate(places):
        before = [_norm_output(block, run) for run in runs]
        for kind in KINDS:
            with _disturbed(block, kind, place):
                output = sum(relative(run(), exact) for run, exact in zip(runs, clean, strict=True)) / len(runs)
                behind = [_norm_output(block, run) for run in runs]
            norm = sum(relative(after, exact) for after, exact in zip(behind, before, strict=True)) / len(runs)
            found[f"norm, {kind}"].append(norm**0.5 / SIZE)
            found[f"output, {kind}"].append(output**0.5 / SIZE)
    return {"blocks": len(places), **{name: statistics.median(values) for name, values in found.items()}}


def denoiser_blocks(subject: Subject) -> dict[str, float]:
    with torch.no_grad():
        return blocks(subject.denoiser, runs_of(subject))


def runs_of(subject: Subject) -> list[Run]:
    """Calls of the denoiser at a few steps of the reference's trajectories."""
    return [lambda one=one: call(subject.denoiser, one) for one in subject.calls(CALL_ROWS)]


@contextmanager
def _disturbed(block: nn.Module, kind: str, seed: int) -> Iterator[None]:
    """Add the error to the block's hidden state."""

    def change(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_with_error(args[0], kind, seed), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _with_error(kwargs["hidden_states"], kind, seed)}

    handle = block.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _with_error(x: torch.Tensor, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "scale":
        return x * (1 + SIZE)
    if kind == "noise":
        error = torch.randn(x.shape, generator=generator)
    else:
        shape = [1] * x.ndim
        channels = 1 if x.ndim >= 4 else x.ndim - 1
        shape[channels] = x.shape[channels]
        error = torch.randn(shape, generator=generator).expand(x.shape)
    dims = tuple(range(1, x.ndim))
    size = x.square().sum(dims, keepdim=True).sqrt() / error.square().sum(dims, keepdim=True).sqrt()
    return x + SIZE * size * error


def _norm_output(block: nn.Module, run: Run) -> torch.Tensor:
    """The output of the first normalization that the block calls."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output: found.append(output))
        for module in block.modules()
        if isinstance(module, NORMS)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def operators(subject: Subject) -> list[dict[str, Any]]:
    """For convolutions, for linear layers (1 x 1 convolutions among them) and for all: the error of single calls and
    of the finished latents, in dB below the signal."""
    layers = subject.plan.trajectories.target.layers
    convolutions = {name for name, layer in layers.items() if layer.weight[0].numel() > layer.weight.shape[1]}
    chosen = {"convolutions": convolutions, "linear layers": {*layers} - convolutions, "all": {*layers}}
    samples = subject.samples[:CALL_ROWS]
    rows = []
    with torch.no_grad():
        runs = runs_of(subject)
        exact = [one[OUTPUT] for one in subject.calls(CALL_ROWS)]
        latents = _latents(subject, samples)
        for kind, names in chosen.items():
            if not names:
                continue
            with noisy({name: layers[name] for name in names}):
                once = sum(relative(run(), output) for run, output in zip(runs, exact, strict=True)) / len(runs)
                finished = relative(_latents(subject, samples), latents)
            share = sum(layers[n].weight.numel() for n in names) / sum(one.weight.numel() for one in layers.values())
            rows.append({"layers": kind, "weights": share, "one call": decibels(once), "latents": decibels(finished)})
    return rows


def _latents(subject: Subject, samples: Any) -> torch.Tensor:
    return torch.stack(list(subject.plan.trajectories.latents(samples)))


@contextmanager
def noisy(layers: Mapping[str, Any]) -> Iterator[None]:
    """Perturb the weights by Gaussian noise relative to each output channel."""
    generator = torch.Generator().manual_seed(0)
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        for layer in layers.values():
            rows = layer.weight.flatten(1)
            noise = torch.randn(rows.shape, generator=generator)
            change = WEIGHT_SIZE * noise * rows.square().mean(1, keepdim=True).sqrt()
            layer.weight.data.add_(change.reshape(layer.weight.shape))
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data.copy_(kept[name])
