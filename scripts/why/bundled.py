"""Measurements for docs/why-int4-hurts.md that no probe makes, on the bundled pipeline.

sampler     the coefficients of every DDIM step, and the later effect of a small error of the latent after it
steps       the error of all INT8 by the number of sampling steps; it falls as 1/T for independent errors
models      error, bias share and PSNR of all INT4 and all INT8, with unchanged and with corrected biases
round-off   the share of a layer's own error that is a mean, by what feeds the layer; before and after correction
groupnorm   the share of an error of `conv1` that passes the normalization after it
skips       how an error of the encoder reaches the output: through skips or from below
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.kernels.layers import Quantizable, quantizable_layers
from bitpolicy.kernels.quantizers.bias_correction import bias_shift
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.policy import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.cost.progress import Stages
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.sensitivity.trajectory.reference import ReferencePass
from bitpolicy.sensitivity.trajectory.trajectories import Trajectories
from bitpolicy.settings import Settings
from bitpolicy.workflow.plan import BUNDLED_CALL, Plan, make_plan

FORMATS = (format_named("int4"), format_named("int8"))
STEPS = (5, 10, 20, 40)
SMALL = 1e-3  # size of a perturbation, relative to the latent
AFTER_SILU = re.compile(r"(resnets\.\d+\.(conv[12]|time_emb_proj)|conv_out|time_embedding\.linear_2)$")
AFTER_NORM = re.compile(r"(proj_in|attn\d\.to_q|attn1\.to_[kv]|ff\.net\.0\.proj)$")
ENCODER = re.compile(r"(down_blocks\.|conv_in$)")


def bundled(work: Path, samples: int = 16, few: int = 4) -> None:
    """Measure everything, print one table and write JSON.

    Args:
        work: folder for records and results.
        samples: for whole trajectories.
        few: held-out samples for measurements inside the denoiser.
    """
    stages = Stages()
    plan, reference = _plan(samples, 20, work, stages)
    inside = plan.split.held_out[:few]
    found = {
        "sampler": sampler(plan, inside),
        "steps": {steps: steps_error(samples, steps, work, stages) for steps in STEPS},
        "models": whole_models(plan, reference, samples, work, stages),
        "round-off": round_off(plan, reference, inside),
        "groupnorm": group_norm(plan, inside),
        "skips": skips(plan, reference, inside),
    }
    for name, numbers in found.items():
        _show(name, numbers)
    (work / "why-int4-hurts.json").write_text(json.dumps(found, indent=1) + "\n")


def _plan(samples: int, steps: int, work: Path, stages: Stages) -> tuple[Plan, ReferencePass]:
    settings = _settings(samples, steps)
    plan = make_plan(settings)
    return plan, plan.probe(settings, work, stages).reference()


def _settings(samples: int, steps: int) -> Settings:
    call = tuple({**BUNDLED_CALL, "num_inference_steps": steps}.items())
    return Settings(budget="100%", quantizer="rtn", calibration_samples=samples, call=call)


def _all(plan: Plan, name: str, corrected: bool) -> dict[str, Choice]:
    return {layer.name: Choice(format_named(name), corrected) for layer in plan.layers}


# The effect of the sampler on an error


def sampler(plan: Plan, samples: Sequence[Sample]) -> dict[str, list[float]]:
    """For each step, a and b of x' = a x + b e, and the gain |dx_0| / |dx'| of a small random error after it."""
    scheduler: Any = plan.source.pipe.scheduler
    scheduler.set_timesteps(BUNDLED_CALL["num_inference_steps"])
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    a = [float(scheduler.step(zero, t, one).prev_sample) for t in scheduler.timesteps]
    b = [float(scheduler.step(one, t, zero).prev_sample) for t in scheduler.timesteps]
    clean = torch.stack(list(plan.trajectories.latents(samples)))
    gains = []
    for step in range(len(a) - 1):
        sizes: list[torch.Tensor] = []
        call = {**plan.trajectories.call, "callback_on_step_end": _nudge(step, sizes)}
        found = torch.stack(list(Trajectories(plan.source.pipe, plan.source.components, call).latents(samples)))
        gains.append(float((found - clean).norm() / torch.cat(sizes).norm()))
    return {"a": a, "b": b, "gain": [*gains, 1.0]}


def _nudge(at: int, sizes: list[torch.Tensor]) -> Callable[..., dict[str, Any]]:
    def nudge(_pipe: Any, step: int, _t: Any, found: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            x = found["latents"]
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + at))
            sizes.append(SMALL * x.norm() / z.norm() * z)
            found["latents"] = x + sizes[-1]
        return found

    return nudge


def steps_error(samples: int, steps: int, work: Path, stages: Stages) -> dict[str, float]:
    """Error and bias share of all INT8 with corrected biases."""
    plan, reference = _plan(samples, steps, work, stages)
    found = plan.probe(_settings(samples, steps), work, stages).measure(
        {"all-int8-corrected": _all(plan, "int8", True)}, reference, f"{steps} steps", images=True
    )[0]
    return {"error": float(found.power.mean()) / reference.latent_power, "bias": found.bias_share}


def whole_models(plan: Plan, reference: ReferencePass, samples: int, work: Path, stages: Stages) -> dict[str, Any]:
    """Error, bias share, scale share and PSNR with every layer in one format."""
    kinds = {f"all-{f.name}-{word}": (f.name, word == "corrected") for f in FORMATS for word in ("plain", "corrected")}
    choices = {name: _all(plan, *kind) for name, kind in kinds.items()}
    run = plan.probe(_settings(samples, 20), work, stages)
    return {
        name: {
            "error": float(m.power.mean()) / reference.latent_power,
            "bias": m.bias_share,
            "scale": m.parallel_share,
            "psnr": m.psnr_db,
        }
        for name, m in zip(choices, run.measure(choices, reference, "whole models", images=True), strict=True)
    }


# The parts of a layer's own error


@contextmanager
def _inputs(layers: Mapping[str, Quantizable], look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call `look` with every layer's input while the block runs."""
    handles = [
        layer.register_forward_pre_hook(lambda _module, given, name=name: look(name, given[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(layer: Quantizable, format: Format, storage: torch.dtype) -> torch.Tensor:
    """dW, float32, shape of the weight."""
    weight = layer.weight.detach().to(storage)
    return format.dequantize(format.quantize(weight), weight.shape, torch.float32) - weight.float()


def _err(layer: Quantizable, change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dW x, channels last, shape (places, out)."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, change).flatten(0, -2)
    return layer._conv_forward(x, change, None).movedim(1, -1).flatten(0, -2)


def round_off(plan: Plan, reference: ReferencePass, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Medians over layers of the mean's share of the error, overall and at each step, before and after correction."""
    layers = plan.trajectories.target.layers
    changes = {name: [_change(one, f, plan.source.storage) for f in FORMATS] for name, one in layers.items()}
    sums: dict[tuple[str, int, int], list[torch.Tensor]] = defaultdict(list)
    level: dict[str, list[float]] = defaultdict(list)

    def look(name: str, x: torch.Tensor) -> None:
        dims = tuple(i for i in range(x.ndim) if i != (1 if isinstance(layers[name], nn.Conv2d) else x.ndim - 1))
        level[name].append(float(x.mean(dims).square().sum() / x.square().mean(dims).sum()))
        for column, change in enumerate(changes[name]):
            err = _err(layers[name], change, x).double()
            sums[name, column, plan.trajectories.steps].append(torch.stack([err.mean(0), err.square().mean(0)]))

    with torch.no_grad(), _inputs(layers, look):
        list(plan.trajectories.latents(samples))
    steps = range(plan.trajectories.steps)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for name, layer in layers.items():
        kind = "after SiLU" if AFTER_SILU.search(name) else "after a norm" if AFTER_NORM.search(name) else "other"
        for column, format in enumerate(FORMATS):
            by_step = torch.stack([torch.stack(sums[name, column, step]).mean(0) for step in steps])  # T, 2, out
            corrected = layer.bias is not None
            shift = (
                bias_shift(layer, changes[name][column], reference.calibration.input_means[name]) if corrected else None
            )
            row = {"input mean": sum(level[name]) / len(level[name]), **_mean_shares(by_step, shift)}
            rows[f"{format.name}, {kind}"].append(row)
    return {kind: {"layers": len(found), **_medians(found)} for kind, found in sorted(rows.items())}


def _mean_shares(by_step: torch.Tensor, shift: torch.Tensor | None) -> dict[str, float]:
    mean, power = by_step[:, 0], by_step[:, 1].mean(0).sum()
    shares = {
        "mean": float(mean.mean(0).square().sum() / power),
        "mean of each step": float(mean.square().mean(0).sum() / power),
    }
    if shift is not None:
        shift = shift.double()
        after = power + (2 * shift * mean.mean(0) + shift.square()).sum()
        shares["power left"] = float(after / power)
        shares["corrected: mean"] = float((mean.mean(0) + shift).square().sum() / after)
        shares["corrected: mean of each step"] = float((mean + shift).square().mean(0).sum() / after)
    return shares


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(torch.tensor([row[name] for row in rows if name in row]).median()) for name in names}


def group_norm(plan: Plan, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """|GN(h + d) - GN(h)|^2 / |(gain / sigma) d|^2 for the INT4 error d of `conv1`, and for its channels' means."""
    denoiser = plan.trajectories.pipe.unet
    layers = {n: layer for n, layer in quantizable_layers(denoiser) if re.search(r"resnets\.\d+\.conv1$", n)}
    changes = {name: _change(one, FORMATS[0], plan.source.storage) for name, one in layers.items()}
    held: dict[str, torch.Tensor] = {}
    power: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, 2))

    def look(name: str, x: torch.Tensor) -> None:
        held[name] = layers[name]._conv_forward(x, changes[name], None)

    def normed(name: str, norm: nn.GroupNorm, h: torch.Tensor) -> None:
        sigma = h.unflatten(1, (norm.num_groups, -1)).flatten(2).var(-1, correction=0).add(norm.eps).sqrt()
        gain = norm.weight[None] / sigma.repeat_interleave(h.shape[1] // norm.num_groups, 1)
        for i, d in enumerate((held[name], held[name].mean((2, 3), keepdim=True).expand_as(h))):
            through = norm.forward(h + d) - norm.forward(h)
            power[name][i] += torch.stack([through.square().sum(), (gain[..., None, None] * d).square().sum()])

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_inputs(layers, look))
        for name in layers:
            norm = denoiser.get_submodule(name.replace("conv1", "norm2"))
            hook = norm.register_forward_pre_hook(lambda module, given, name=name: normed(name, module, given[0]))
            stack.callback(hook.remove)
        list(plan.trajectories.latents(samples))
    passed = torch.stack([p[:, 0] / p[:, 1] for p in power.values()])
    kinds = {"whole error": passed[:, 0], "means of the channels": passed[:, 1]}
    return {k: {"least": float(v.min()), "median": float(v.median()), "most": float(v.max())} for k, v in kinds.items()}


# How an error of the encoder reaches the output


def skips(plan: Plan, reference: ReferencePass, samples: Sequence[Sample]) -> dict[str, float]:
    """Error power of the denoiser's output with an INT4 encoder, by path, relative to that with all paths open."""
    unet: Any = plan.trajectories.pipe.unet
    choices = {layer.name: Choice(FORMATS[0], True) for layer in plan.layers if ENCODER.match(layer.name)}
    power: dict[str, float] = defaultdict(float)

    def compare(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with _recorded(unet) as clean:
            unet.forward(*args, **kwargs)
        for way, closed in {"every way": (), "skips only": ("below",), "from below only": ("skips",)}.items():
            with (
                quantized(
                    unet,
                    choices,
                    quantization=Quantization(calibration=reference.calibration, storage=plan.source.storage),
                ),
                _replaced(unet, clean, closed),
            ):
                power[way] += float((unet.forward(*args, **kwargs)[0] - output[0]).square().sum())

    handle = unet.register_forward_hook(compare, with_kwargs=True)
    try:
        with torch.no_grad():
            list(plan.trajectories.latents(samples))
    finally:
        handle.remove()
    return {way: found / power["every way"] for way, found in power.items()}


@contextmanager
def _recorded(unet: Any) -> Iterator[dict[str, Any]]:
    """Record the input of the middle block, and the skips that enter each block of the decoder."""
    clean: dict[str, Any] = {}
    with ExitStack() as stack:
        _hook(stack, unet.mid_block, lambda args, kwargs: clean.update(below=args[0]))
        for i, block in enumerate(unet.up_blocks):
            _hook(
                stack, block, lambda args, kwargs, i=i: clean.update({f"skips-{i}": kwargs["res_hidden_states_tuple"]})
            )
        yield clean


@contextmanager
def _replaced(unet: Any, clean: Mapping[str, Any], closed: Sequence[str]) -> Iterator[None]:
    """Put clean tensors on the closed paths while the block runs."""
    with ExitStack() as stack:
        if "below" in closed:
            _hook(stack, unet.mid_block, lambda args, kwargs: ((clean["below"], *args[1:]), kwargs))
        for i, block in enumerate(unet.up_blocks if "skips" in closed else ()):
            given = {"res_hidden_states_tuple": clean[f"skips-{i}"]}
            _hook(stack, block, lambda args, kwargs, given=given: (args, {**kwargs, **given}))
        yield


def _hook(stack: ExitStack, module: nn.Module, act: Callable[[Any, Any], Any]) -> None:
    handle = module.register_forward_pre_hook(lambda _module, args, kwargs: act(args, kwargs), with_kwargs=True)
    stack.callback(handle.remove)


def _show(name: str, numbers: Any, indent: str = "") -> None:
    if isinstance(numbers, dict):
        print(f"{indent}{name}")
        for key, value in numbers.items():
            _show(key, value, f"{indent}  ")
    elif isinstance(numbers, list):
        print(f"{indent}{name:<30} {' '.join(f'{value:.3g}' for value in numbers)}")
    else:
        print(f"{indent}{name:<30} {numbers if isinstance(numbers, int) else f'{numbers:.4g}'}")
