"""The signature of a pipeline's `__call__`: which arguments it takes, and of which types."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from diffusers import DiffusionPipeline

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.policies.components import class_count
from bitpolicy.sensitivity.calls.hints import fits, hints_of, in_words
from bitpolicy.sensitivity.input_files import names_files

STEPS = "num_inference_steps"
_LABELS = re.compile(r"(class_)?labels?|class_ids?|classes")
_ONE_EACH = re.compile(r"(negative_)?prompt(_\d)?")
_OURS = re.compile(r"prompt|batch_size|generator|output_type|return_dict|latents|num_\w+_per_prompt")


@dataclass(frozen=True)
class Signature:
    """The arguments of one pipeline's call.

    Attributes:
        pipeline: name of the class.
        file: where its call is defined.
        hints: argument name -> type hint, for all arguments; `Any` if the type is unknown.
        defaults: argument name -> default, for arguments that have one.
        labels: name of the argument that takes class labels; None if there is none, or if the argument is optional and
            the denoiser has no classes.
    """

    pipeline: str
    file: str
    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]
    labels: str | None

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Signature:
        call = type(pipe).__call__
        named = {
            name: parameter
            for name, parameter in inspect.signature(call).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
        }
        defaults = {name: p.default for name, p in named.items() if p.default is not p.empty}
        known = hints_of(call)
        hints = {name: _widened(known.get(name, Any), defaults.get(name)) for name in named}
        file = inspect.unwrap(call).__code__.co_filename
        return cls(type(pipe).__name__, file, hints, defaults, _labels(pipe, hints, defaults))

    def __contains__(self, name: object) -> bool:
        return name in self.hints

    @property
    def takes_text(self) -> bool:
        return self.labels is None and "prompt" in self

    def require(self, arguments: Mapping[str, Any]) -> None:
        """Check names and values of call arguments.

        Raises:
            BitPolicyError: the pipeline takes no argument of that name, every sample sets it, or the signature says
                another type.
        """
        unknown = [name for name in arguments if name not in self]
        if unknown:
            raise BitPolicyError(f"{self.pipeline} does not take {', '.join(unknown)}; leave it out")
        ours = [name for name in arguments if is_set_by_samples(name)]
        if ours:
            raise BitPolicyError(f"{', '.join(ours)} cannot be given: every sample sets its own; leave it out")
        for name, value in arguments.items():
            if not self._takes(name, value):
                needed = in_words(self.hints[name])
                raise BitPolicyError(f"{name} is {value!r}; {self.pipeline} needs {needed}")

    def _takes(self, name: str, value: Any) -> bool:
        """Whether the argument accepts the value.

        None is always accepted. A string that names a picture or a sound is loaded before the call, and a string that
        each sample needs may go into a list.
        """
        hint = self.hints[name]
        return (
            value is None
            or names_files(name, value)
            or fits(value, hint)
            or (is_of_each_sample(name) and fits([value], hint))
        )


def is_set_by_samples(name: str) -> bool:
    """Whether every sample sets the argument of this name."""
    return bool(_OURS.fullmatch(name) or _LABELS.fullmatch(name))


def is_of_each_sample(name: str) -> bool:
    """Whether a call takes one string per sample for this argument."""
    return _ONE_EACH.fullmatch(name) is not None


def _widened(hint: Any, default: Any) -> Any:
    """The hint, extended by the type of the default if that does not fit, as in `eta: int = 0.5`."""
    return hint if default is None or fits(default, hint) else Union[hint, type(default)]  # noqa: UP007


def _labels(pipe: DiffusionPipeline, hints: Mapping[str, Any], defaults: Mapping[str, Any]) -> str | None:
    name = next((name for name in hints if _LABELS.fullmatch(name)), None)
    return name if name is not None and (name not in defaults or class_count(pipe)) else None
