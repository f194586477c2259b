"""The models of the experiment: each pipeline with its samples, and the calls that its unquantized denoiser makes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peers.entry import MODEL, ROOT
from peers.rivals import Rivals
from peers.samples import plan_of, write_samples
from safetensors.torch import load_file
from torch import nn

from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.quantization import Quantization
from bitpolicy.sensitivity.samples import Sample
from bitpolicy.workflow.plan import Plan

FORMATS = ("int4", "int4-channel", "int8")
STEPS = 6  # recorded steps at which single calls are measured, evenly spread over the trajectory
EVERY = (MODEL, *(ROOT / "scripts" / "trained" / name for name in ("unet", "lcm", "dit", "mmdit")))


@dataclass(frozen=True)
class Subject:
    """One pipeline under study.

    Attributes:
        folder: the pipeline.
        work: folder for recorded calls and probes.
        formats: names of the packed formats that are measured.
    """

    folder: Path
    work: Path
    formats: tuple[str, ...] = FORMATS

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def plan(self) -> Plan:
        """The plan of the pipeline."""
        plan = plan_of(self.folder, (*self.formats, "fp16"))
        if not (self.work / "calls.safetensors").is_file():
            write_samples(plan, self.work)
        return plan

    @cached_property
    def rivals(self) -> Rivals:
        """The adjoint probe of INT4, INT8 and FP16, rounded to nearest, and the reference's mean inputs."""
        return Rivals.of(plan_of(self.folder), self.work / "rules")

    @cached_property
    def calibration(self) -> Calibration:
        return self.rivals.calibration

    @property
    def denoiser(self) -> nn.Module:
        return self.plan.trajectories.denoisers[0]

    @property
    def samples(self) -> Sequence[Sample]:
        """Samples that no calibration used."""
        return self.plan.split.held_out

    def calls(self, rows: int | None = None) -> list[dict[str, torch.Tensor]]:
        """Calls of the unquantized denoiser on its own trajectories at STEPS steps, first to last.

        Args:
            rows: of each call; all of them if None.
        """
        assert self.plan
        recorded = load_file(self.work / "calls.safetensors")
        order = recorded["timestep"].unique().flip(0)
        chosen = [order[i] for i in torch.linspace(0, len(order) - 1, min(STEPS, len(order))).round().long()]
        return [{name: value[recorded["timestep"] == t][:rows] for name, value in recorded.items()} for t in chosen]

    def uniform(self, format: Format, corrected: bool) -> dict[str, Choice]:
        """`format` for every layer that it fits, rounded to nearest, with corrected or unchanged biases."""
        return {
            layer.name: Choice(format, corrected and layer.has_bias)
            for layer in self.plan.layers
            if format.fits(layer.shape)
        }

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.calibration, self.plan.source.storage)


def decibels(ratio: torch.Tensor | float) -> float:
    """How far an error is below its signal: -10 log10 of the ratio of their powers."""
    return -10 * math.log10(max(float(ratio), 1e-30))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact|^2 / |exact|^2."""
    return float((found - exact).double().square().sum() / exact.double().square().sum())


def interval(values: torch.Tensor) -> tuple[float, float]:
    """The mean of independent values and half the width of its 95% interval (normal approximation)."""
    spread = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), spread


class Rows:
    """Results kept in a JSON file as they come, so that an interrupted command continues."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def has(self, **key: object) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        print("  ".join(f"{name}={cell(value)}" for name, value in row.items()), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")

    def table(self) -> str:
        """The rows as a Markdown table."""
        heads = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(cell(row.get(name)) for name in heads) + " |" for row in self.rows]
        return "\n".join(lines)


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
