"""Checks whether a value fits a type hint, and describes type hints in words.

Only plain values are checked, those that an option or a JSON file can hold: numbers, strings, booleans, null, lists and
mappings. Likewise, only hints about such values are checked; any other hint accepts every value.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

_PLAIN = (str, Real, Sequence, Mapping, type(None))
_UNIONS = (Union, types.UnionType)
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Argument name -> type hint; empty if the function's hints cannot be resolved."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether an argument with this hint accepts `value`. Integers count as numbers; True and False are neither."""
    if not isinstance(value, _PLAIN):
        return True
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if (origin or hint) in _LISTS:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes) and _items_fit(value, parts)
    if (origin or hint) in _MAPPINGS:
        return isinstance(value, Mapping)
    return _fits_one(value, hint)


def _fits_one(value: Any, hint: Any) -> bool:
    match hint:
        case types.NoneType:
            return value is None
        case _ if hint is bool or hint is str:
            return isinstance(value, hint)
        case _ if hint is int:
            return isinstance(value, Integral) and not isinstance(value, bool)
        case _ if hint is float:
            return isinstance(value, Real) and not isinstance(value, bool)
    return True


def _items_fit(value: Sequence[Any], parts: tuple[Any, ...]) -> bool:
    """Whether the items fit: each has to be an X for `list[X]` and `tuple[X, ...]`; `tuple[X, Y]` takes exactly two."""
    if len(parts) > 1 and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(fits, value, parts))
    return not parts or all(fits(item, parts[0]) for item in value)


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}


def in_words(hint: Any) -> str:
    """The hint in words, e.g. "an integer, or a list, each item an integer"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        named = dict.fromkeys(in_words(part) for part in parts if part is not types.NoneType)
        return ", or ".join(named)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if (origin or hint) in _LISTS:
        return _list_in_words(parts)
    if (origin or hint) in _MAPPINGS:
        return "a mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _list_in_words(parts: tuple[Any, ...]) -> str:
    if len(parts) > 1 and parts[-1] is not Ellipsis:
        return f"a list of {len(parts)}: {', '.join(map(in_words, parts))}"
    return f"a list, each item {in_words(parts[0])}" if parts else "a list"
