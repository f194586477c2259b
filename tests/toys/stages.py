"""What bitpolicy has to do with a pipeline, in the order a user meets it.

`run(toy, folder)` takes one toy through the stages and returns, for each, "pass" or the line with which it was refused.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
from toy_recipe import Toy
from toy_subject import Subject, made_up_means, subject_of

import bitpolicy
from bitpolicy.cli import main as command_line
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.apply import quantized
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.inventory import inventory
from bitpolicy.sensitivity.probes.adjoint import AdjointSketches
from bitpolicy.sensitivity.rounding.candidates import candidates
from bitpolicy.sensitivity.sketches.directions import Random
from bitpolicy.sensitivity.trajectory.trajectories import LoopError

PASS = "pass"
_INT4 = format_named("int4")
_VECTOR = 4
_ACCURACY = 5e-6  # of the largest slope that is possible; sketches are kept in float32
_SIZES: dict[str, Any] = {"calibration_samples": 1, "vectors": 1, "trials": 0}


class StageFailed(Exception):
    """A stage gave another result than it must."""


def run(toy: Toy, folder: Path) -> dict[str, str]:
    """Every stage with its outcome; a stage after one that did not pass is left out.

    The exception is a loop that cannot be differentiated: a search then probes step by step, and the later stages run.

    Args:
        folder: an empty folder for the pipeline, the policy and the checkpoint.

    Raises:
        Exception: whatever else than a refusal goes wrong in a stage, with the stage in a note.
    """
    outcomes: dict[str, str] = {}
    for name, stage in STAGES.items():
        try:
            stage(toy, folder)
        except LoopError as refusal:
            outcomes[name] = str(refusal)
            continue
        except BitPolicyError as refusal:
            return {**outcomes, name: _fails_alone(toy) or str(refusal)}
        except Exception as error:
            error.add_note(f"in stage {name!r} of {toy.name}")
            raise
        outcomes[name] = PASS
    return outcomes


def _fails_alone(toy: Toy) -> str:
    """Why the pipeline's own call fails without bitpolicy; empty if it does not."""
    try:
        subject = subject_of(toy)
        subject.own_call(subject.samples[0], toy.finished)
    except BitPolicyError:
        return ""
    except Exception as error:  # noqa: BLE001 (whatever diffusers raises)
        return f"diffusers' own call fails: {type(error).__name__}: {error}"
    return ""


def layers(toy: Toy, folder: Path) -> None:
    """The target's layers are found, and each has a role."""
    found = inventory(subject_of(toy).trajectories.target)
    _require(len(found) > 5, f"only {len(found)} layers")
    roles = {layer.role for layer in found}
    _require(len(roles) > 1 and "other" not in roles, f"roles {sorted(roles)}")


def inputs(toy: Toy, folder: Path) -> None:
    """Where a call needs more than a prompt, the error shows a line of JSON that would do."""
    subject = subject_of(toy)
    try:
        subject.trajectories.learn(replace(subject.samples[0], arguments={}))
    except BitPolicyError as refusal:
        shown = re.search(r"FILE\.jsonl, .* per line: (\{.*\})$", str(refusal))
        if shown is None or "..." in shown[1]:
            raise
        example = {name: value for name, value in json.loads(shown[1]).items() if name != "prompt"}
        unlike = {name: value for name, value in example.items() if not _is_like(toy.extra.get(name), value)}
        _require(not unlike, f"the example has {unlike}")
        arguments = {name: toy.extra[name] for name in example}
        subject_of(toy).trajectories.learn(replace(subject.samples[0], arguments=arguments))


def _is_like(value: Any, example: Any) -> bool:
    """Whether an example stands for a value: for the name of a file or a list of names, or by its type."""
    if isinstance(value, list) and isinstance(example, list):
        return _is_like(value[0], example[0])
    if isinstance(value, torch.Tensor):
        return str(example).endswith((".png", ".safetensors"))
    return str(example).endswith(".png") if isinstance(value, Image.Image) else type(value) is type(example)


def probe(toy: Toy, folder: Path) -> None:
    """The adjoint's slope along a change of all weights, with random signs, is that of central differences."""
    subject = subject_of(toy, torch.float64)
    means = made_up_means(subject)
    with subject.unrounded():
        quantization = Quantization(calibration=Calibration(means))
        adjoint = AdjointSketches(subject.trajectories, candidates((_INT4,)), quantization=quantization)
        (sketch,) = adjoint.sketches(subject.samples[0], [Random(_VECTOR)])
        found = sketch.weight.double().sum(0)[:, 0]
        draw = torch.Generator().manual_seed(1)
        signs = torch.randint(2, (len(found),), generator=draw).double() * 2 - 1
        moves: Any = {
            layer.weight: sign * subject.weight_change(name, _INT4)
            for sign, (name, layer) in zip(signs.tolist(), subject.layers.items(), strict=True)
        }
        expected = subject.slope(moves, _VECTOR)
    error, scale = abs(float(found @ signs) - expected), float(found.norm())
    _require(scale > 0, "every slope is zero")
    _require(error < _ACCURACY * scale, f"the slope is off by {error / scale:.1e} of the norm")


def search(toy: Toy, folder: Path) -> None:
    """A policy within the budget, and its checkpoint: as large as predicted, drawing what the policy does in memory."""
    subject = subject_of(toy)
    policy = bitpolicy.search(
        subject.pipe, toy.budget, call=subject.call, prompts=requests(subject), quiet=True, **_SIZES
    )
    nbytes = bitpolicy.export(subject.pipe, policy, folder / "checkpoint", component_dtype=torch.float32)
    assert policy.result is not None
    assert policy.calibration is not None
    _require(nbytes == policy.result.policy_bytes <= policy.budget.bytes, f"{nbytes} bytes")
    target, sample = subject.trajectories.target, subject.samples[1]
    plain = subject.own_call(sample, toy.finished)
    with quantized(target, policy.resolve(subject.layers), quantization=Quantization(calibration=policy.calibration)):
        expected = subject.own_call(sample, toy.finished)
    _require(not _equal(expected, plain), "quantization changed nothing")
    reloaded = replace(subject, pipe=bitpolicy.load_pipeline(folder / "checkpoint", torch.float32))
    if getattr(getattr(subject.pipe, "vae", None), "use_tiling", False):
        reloaded.pipe.vae.enable_tiling()  # a pipeline does not save that
    _require(
        _equal(reloaded.own_call(sample, toy.finished), expected), "the checkpoint draws something else than the policy"
    )


def command(toy: Toy, folder: Path) -> None:
    """`search-policy` on a saved folder, with requests from a file where the pipeline takes any."""
    subject = subject_of(toy)
    subject.pipe.save_pretrained(folder / "model")
    line = [
        "search-policy",
        "--model",
        folder / "model",
        "--budget",
        toy.budget,
        "--output-dir",
        folder / "out",
        "--quiet",
    ]
    line += ["--samples", "1", "--vectors", "1", "--trials", "0", "--held-out-samples", "2"]
    for name, value in subject.call.items():
        line += ["--call", f"{name}={json.dumps(value)}"]
    asked = requests(subject)
    if asked is not None:
        line += ["--prompts", _written(asked, folder)]
    said = io.StringIO()
    with patch.object(sys, "argv", [str(word) for word in line]), redirect_stderr(said):
        try:
            command_line.search_policy()
        except SystemExit as ended:
            _require(ended.code == 0, f"exit code {ended.code}: {said.getvalue()}")
    _require((folder / "out" / "compare.png").is_file(), "no compare.png")


STAGES: Mapping[str, Callable[[Toy, Path], None]] = {
    "layers": layers,
    "inputs": inputs,
    "probe": probe,
    "search": search,
    "command": command,
}


def requests(subject: Subject) -> list[Any] | None:
    """What a user would give as `prompts`; None if the pipeline takes no requests."""
    if subject.toy.extra:
        return [{**({"prompt": s.prompt} if s.prompt else {}), **s.arguments} for s in subject.samples]
    return None if subject.toy.takes == "nothing" else [s.prompt for s in subject.samples]


def _written(asked: list[Any], folder: Path) -> Path:
    """A file of requests: one prompt a line, or JSON with pictures and sounds by path."""
    if all(isinstance(request, str) for request in asked):
        path = folder / "prompts.txt"
        path.write_text("\n".join(asked), encoding="utf-8")
        return path
    path = folder / "prompts.jsonl"
    lines = [
        json.dumps({name: _by_path(value, folder / f"{i}-{name}") for name, value in request.items()})
        for i, request in enumerate(asked)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _by_path(value: Any, path: Path) -> Any:
    if isinstance(value, torch.Tensor):
        np.save(path.with_suffix(".npy"), value.numpy())
        return path.with_suffix(".npy").name
    if isinstance(value, Image.Image):
        value.save(path.with_suffix(".png"))
        return path.with_suffix(".png").name
    if isinstance(value, torch.Tensor):
        wavfile.write(path.with_suffix(".wav"), 2000, value[0].T.numpy())
        return path.with_suffix(".wav").name
    if isinstance(value, list):
        return [_by_path(item, path.with_name(f"{path.name}-{i}")) for i, item in enumerate(value)]
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise StageFailed(otherwise)
