"""`Settings` from the options of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bitpolicy.cli.options import CallOptions
from bitpolicy.kernels.formats.named import canonical_names
from bitpolicy.pipelines.prompting import load_requests
from bitpolicy.settings import Settings


def settings_of(options: Mapping[str, Any], **more: Any) -> Settings:
    """The settings that a command's options ask for.

    Args:
        options: option name -> value, including those of `CallOptions`; options that are not fields of `Settings` are
            ignored.
        more: fields for which the command has no option.
    """
    known = {field.name for field in fields(Settings)}
    given = CallOptions(**{field.name: options[field.name] for field in fields(CallOptions)})
    read = {
        "formats": canonical_names(options["formats"]),
        "prompts": tuple(load_requests(given.prompts)) if given.prompts else None,
        "call": tuple(given.arguments.items()),
        **{name: tuple(options.get(name) or ()) for name in ("keep", "lora")},
    }
    return Settings(**{name: value for name, value in {**options, **read, **more}.items() if name in known})
