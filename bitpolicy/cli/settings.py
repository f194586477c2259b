"""From the options of a command to `Settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bitpolicy.cli.options import pipeline_call
from bitpolicy.kernels.formats.named import parse_formats
from bitpolicy.pipelines.prompting import load_requests
from bitpolicy.settings import Settings


def _names(formats: str) -> tuple[str, ...]:
    """Of the formats, "all" as it is: which of all are probed is decided when the model is known."""
    return ("all",) if formats.strip().lower() == "all" else tuple(f.name for f in parse_formats(formats))


def settings_of(options: Mapping[str, Any], **more: Any) -> Settings:
    """The settings that a command's options ask for.

    Args:
        options: option name -> value, among them formats, prompts, samples, num_inference_steps, guidance_scale and
            call; those that are no field of `Settings` are passed over.
        more: fields that have no option of their name.
    """
    known = {field.name for field in fields(Settings)}
    call = pipeline_call(options["num_inference_steps"], options["guidance_scale"], options["call"])
    prompts = options["prompts"]
    read = {
        "formats": _names(options["formats"]),
        "prompts": tuple(load_requests(prompts)) if prompts else None,
        "call": tuple(call.items()),
        "calibration_samples": options["samples"],
        "keep": tuple(options.get("keep") or ()),
        "features": str(options["features"]) if options.get("features") else None,
    }
    return Settings(**{name: value for name, value in {**options, **read, **more}.items() if name in known})
