"""What callers of the Python interface pass, and how a mistake in it is told.

Arguments are checked against the types that a function is annotated with. Messages name an argument as the command line
does, `--target-psnr 45`, wherever they are written; a function of the Python interface passes them on in Python's
spelling, `target_psnr=45`. What stands between backticks is a command, and stays one.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from functools import cache, wraps
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from diffusers import DiffusionPipeline
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import QUANTIZERS
from bitpolicy.pipelines.loading import DTYPES
from bitpolicy.policies.exporters.targets import NAMES as TARGETS
from bitpolicy.policies.policy import Policy
from bitpolicy.search.budget import SCOPES
from bitpolicy.search.study.samplers import SAMPLERS, SPACES
from bitpolicy.sensitivity.probes.probe import PROBES
from bitpolicy.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")
Named = Annotated[str, Field(min_length=1)]
"""A path or hub id: never empty, which would be the folder one stands in."""

_as_options: ContextVar[bool] = ContextVar("as_options", default=False)
_IN_PYTHON = {
    "model": "pipe",
    "num-inference-steps": "call",
    "guidance-scale": "call",
    "samples": "calibration_samples",
}
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?: (\w(?:[\w.%,-]*[\w%])?))?")  # and the word behind it
_FORMAT = re.compile(r"(int\d|nf\d|fp\d+)(-\w+)*|all")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_CHOICES = {*PROBES, *SCOPES, *DTYPES, *Compute, *QUANTIZERS, *TARGETS, *SAMPLERS, *SPACES, "auto", "cpu", "cuda"}
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


def python_call(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the Python interface: what is passed is checked before it runs, and its mistakes are Python's.

    Raises (the function that comes out, beside what it raises itself):
        BitPolicyError: there is no argument of that name, or it is of another type.
    """
    signature = inspect.signature(function)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        names = [*signature.parameters, *(_more(signature.parameters) if open_ended else ())]
        with _told(names):
            for name in kwargs:
                if name not in names or name == "options":
                    raise BitPolicyError(f"{function.__name__} has no argument {name!r}{_nearest(name, names)}")
            bound = signature.bind(*args, **kwargs)
            hints = get_type_hints(function, include_extras=True)
            for name in bound.arguments:
                if name != "options":
                    bound.arguments[name] = checked_value(name, bound.arguments[name], hints[name])
            return function(*bound.args, **bound.kwargs)

    return checked


@contextmanager
def as_options() -> Iterator[None]:
    """While the block runs, functions of the Python interface are called by a command: messages keep its spelling."""
    before = _as_options.set(True)
    try:
        yield
    finally:
        _as_options.reset(before)


def checked_value(name: str, value: Any, hint: Any) -> Any:
    """`value`, with NumPy's numbers as Python's.

    Raises:
        BitPolicyError: it is not of the type `hint`.
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
    """A type, for people."""
    origin = get_origin(hint)
    if origin is Annotated:
        return in_words(get_args(hint)[0])
    if hint in _WORDS or origin in _WORDS:
        return _WORDS[hint] if hint in _WORDS else _WORDS[origin]
    return " or ".join(dict.fromkeys(in_words(each) for each in get_args(hint))) or str(hint)


def in_python(text: str, names: Iterable[str]) -> str:
    """A message whose options are written as arguments of a function that has these `names`."""
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


def settings_for(options: Mapping[str, Any], **given: Any) -> Settings:
    """The settings that a function's arguments ask for.

    Args:
        options: fields of `Settings` that the function has no parameter for.
        given: the others, as they were passed.

    Raises:
        BitPolicyError: one of them is of another type, or makes no sense.
    """
    hints = get_type_hints(Settings)
    passed = {**given, **options}
    for name, read in (("keep", _rules), ("features", _text)):
        if name in options:
            passed[name] = read(options[name])
    return Settings(**{name: checked_value(name, value, hints[name]) for name, value in passed.items()})


def _rules(keep: Any) -> Any:
    """GLOB=FORMAT, of a mapping, a sequence of such, or one of them."""
    if isinstance(keep, Mapping):
        return tuple(f"{glob}={format}" for glob, format in keep.items())
    if isinstance(keep, str):
        return (keep,)
    return tuple(keep) if isinstance(keep, Sequence) else keep


def _text(path: Any) -> Any:
    return str(path) if isinstance(path, Path) else path


@contextmanager
def _told(names: Sequence[str]) -> Iterator[None]:
    """Spell the mistakes of the block as Python does."""
    if _as_options.get():
        yield
        return
    try:
        yield
    except BitPolicyError as error:
        error.args = (in_python(str(error), names), *error.args[1:])
        raise


def _more(parameters: Iterable[str]) -> list[str]:
    """Fields of `Settings` that are options of a function with these parameters."""
    return [field.name for field in fields(Settings) if field.name not in (*parameters, "model")]


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [n for n in names if n != "options"], n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(n for n in names if n != 'options')}"


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _is_flag(name: str) -> bool:
    """Whether an option of this name takes no value."""
    return name in ("overwrite", "requantize") or get_type_hints(Settings).get(name) is bool
