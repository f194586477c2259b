"""Checks the arguments of the Python interface, and words its error messages.

Arguments are checked against the annotations of the function. The code writes every message with the names of the
command line, `--target-psnr 45`; the functions of the Python interface translate them to Python's spelling,
`target_psnr=45`. Text between backticks is a command and is left as it is.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin

import torch
from diffusers import DiffusionPipeline
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bitpolicy.command import in_a_command
from bitpolicy.declared import Declared, declared_options
from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import canonical_names
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import QUANTIZERS
from bitpolicy.pipelines.prompting import requests_of
from bitpolicy.policies.exporters.names import NAMES as TARGETS
from bitpolicy.policies.policy import Policy
from bitpolicy.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")
Named = Annotated[str, Field(min_length=1)]
"""A path or hub id. It is never empty, as an empty path would mean the current folder."""

_IN_PYTHON = {
    "model": "pipe",
    "num-inference-steps": "call",
    "guidance-scale": "call",
}
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?: (\w(?:[\w.%,-]*[\w%])?))?")  # and the word after it
_FORMAT = re.compile(r"(int\d|nf\d|fp\d+)(-\w+)*|all")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_CHOICES = {choice for one in declared_options(Settings) for choice in one.choices}
_CHOICES |= {*Compute, *QUANTIZERS, *TARGETS, "auto", "cpu", "cuda"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "True or False",
    Path: "a path",
    NoneType: "None",
    DiffusionPipeline: "a diffusers pipeline",
    Policy: "a policy",
    Mapping: "a mapping",
    Sequence: "a sequence",
    tuple: "a sequence",
    torch.dtype: "a torch dtype",
    torch.device: "a torch device",
}


def python_call(*kinds: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function of the Python interface: its arguments are checked before it runs, and its messages are worded
    for Python.

    Args:
        kinds: groups of search options that the function takes as keywords, in its `**options`.

    Raises (the decorated function, in addition to its own errors):
        BitPolicyError: there is no argument of that name, or its type is wrong.
    """
    options = _options(*kinds)

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function, eval_str=True)
        own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        names = [*own, *options]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            with _in_python_words(names):
                for name in kwargs:
                    if name not in names:
                        raise BitPolicyError(f"{function.__name__} has no argument {name!r}{_nearest(name, names)}")
                bound = signature.bind(*args, **kwargs)
                for name in bound.arguments:
                    if name in own:
                        bound.arguments[name] = checked_value(name, bound.arguments[name], own[name].annotation)
                return function(*bound.args, **bound.kwargs)

        others = [one for name, one in options.items() if name == one.keyword and name not in own]
        checked.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own.values(), *map(_parameter, others)]
        )
        return checked

    return decorated


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """`value`, with NumPy numbers converted to Python's.

    Raises:
        BitPolicyError: the value does not have the type `hint`.
    """
    kind: Any = type(value)
    if issubclass(kind, numbers.Real) and kind not in (bool, int, float):
        value = int(value) if issubclass(kind, numbers.Integral) else float(value)
    try:
        _adapter(hint).validate_python(value)
    except ValidationError as error:
        shown = "empty" if value == "" else f"{_short(value)} ({type(value).__name__})"
        raise BitPolicyError(f"{name} is {shown}; give {in_words(hint)}") from error
    return value


def in_words(hint: Any) -> str:
    """A type in words, for messages."""
    origin = get_origin(hint)
    if origin is Annotated:
        return in_words(get_args(hint)[0])
    if hint in _WORDS or origin in _WORDS:
        return _WORDS[hint] if hint in _WORDS else _WORDS[origin]
    return " or ".join(dict.fromkeys(in_words(each) for each in get_args(hint))) or str(hint)


def in_python(text: str, names: Iterable[str]) -> str:
    """Translate the options in a message to the arguments of a function that has these `names`."""
    known = set(names)

    def spelled(found: re.Match[str]) -> str:
        option, word = found[1], found[2] or ""
        plain = option.replace("-", "_")
        name = plain if plain in known else _IN_PYTHON.get(option, plain)
        if _is_flag(plain):
            name += "=True"
        elif _NUMBER.fullmatch(word) or word.isupper():
            return f"{name}={word}"
        elif word and all(part in _CHOICES or _FORMAT.fullmatch(part) for part in word.split(",")):
            return f'{name}="{word}"'
        return f"{name} {word}".rstrip()

    pieces = text.split("`")
    return "`".join(piece if i % 2 else _OPTION.sub(spelled, piece) for i, piece in enumerate(pieces))


def settings_for(options: Mapping[str, Any], model: str | None) -> Settings:
    """The settings that a function's arguments ask for.

    Args:
        options: Python name -> value as passed from Python.
        model: path or hub id of a pipeline that is not in memory.

    Raises:
        BitPolicyError: an option has the wrong type or value.
    """
    found: dict[str, Any] = {"model": model}
    for name, value in options.items():
        declared = _options(Settings)[name]
        checked = checked_value(name, value, str if declared.choices else declared.python)
        found[declared.name] = _READ[declared.name](checked) if declared.name in _READ else checked
    return Settings(**found)


def _budget(budget: int | float | str | None) -> str | None:
    """The budget as the command line spells it."""
    if isinstance(budget, float) and not budget.is_integer():
        raise BitPolicyError(f'--budget {budget:g} is no number of bytes; write 5000000, "3GB", "45%" or "4.5bit"')
    return budget if budget is None or isinstance(budget, str) else str(int(budget))


def _call(call: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((call or {}).items()))


def _requests(prompts: Any) -> tuple[str | Mapping[str, Any], ...] | None:
    return None if prompts is None else tuple(requests_of(prompts))


def _rules(keep: Any) -> Any:
    """GLOB=FORMAT rules from a mapping, a sequence of rules, or a single rule."""
    if isinstance(keep, Mapping):
        return tuple(f"{glob}={format}" for glob, format in keep.items())
    if isinstance(keep, str):
        return (keep,)
    return tuple(keep) if isinstance(keep, Sequence) else keep


def _text(path: Any) -> Any:
    return str(path) if isinstance(path, Path) else path


@contextmanager
def _in_python_words(names: Sequence[str]) -> Iterator[None]:
    """Translate the errors that the block raises to Python's spelling."""
    if in_a_command():
        yield
        return
    try:
        yield
    except BitPolicyError as error:
        error.args = (in_python(str(error), names), *error.args[1:])
        raise


@cache
def _options(*kinds: type) -> dict[str, Declared]:
    """The options of these groups under each name that Python accepts."""
    declared = [one for kind in kinds for one in declared_options(kind) if one.name != "model"]
    return {one.name: one for one in declared} | {one.keyword: one for one in declared}


def _parameter(declared: Declared) -> inspect.Parameter:
    """A search option as a keyword parameter."""
    return inspect.Parameter(
        declared.keyword, inspect.Parameter.KEYWORD_ONLY, default=declared.default, annotation=declared.python
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(dict.fromkeys(names))}"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _is_flag(name: str) -> bool:
    """Whether this option is a flag, which takes no value."""
    return name in ("overwrite", "requantize") or (name in _options(Settings) and _options(Settings)[name].is_flag)


_READ: dict[str, Callable[[Any], Any]] = {
    "budget": _budget,
    "probe_memory": lambda size: None if size is None else str(size),
    "formats": canonical_names,
    "prompts": _requests,
    "call": _call,
    "keep": _rules,
    "lora": _rules,
    "features": _text,
    "policy": _text,
}
