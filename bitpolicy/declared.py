"""The declaration of an option: a field of a dataclass whose annotation says what it does and which values it takes.

This module imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bitpolicy.kernels.errors import BitPolicyError

MOST_SEED = 2**31 - 1  # NumPy's generators accept twice that; a study adds the trial's number


@dataclass(frozen=True)
class Option:
    """The description of one option.

    Attributes:
        help: what the option does, in a sentence or two.
        least, most: inclusive bounds of a number.
        above: an exclusive lower bound of a number.
        allowed: the allowed values in words; None derives them from the bounds.
        typed: the type on the command line, if it differs from the field's.
        python: the type in the Python interface, if it differs from the field's.
        name: the name on the command line and in Python, if it differs from the field's.
        metavar: the placeholder for the value in `--help`.
        only_python: whether commands lack this option, or have another one in its place.
        positional: whether it is a positional argument of the command.
    """

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    allowed: str | None = None
    typed: Any = None
    python: Any = None
    name: str | None = None
    metavar: str | None = None
    only_python: bool = False
    positional: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is within the bounds. NaN never is."""
        low = self.least is None or value >= self.least
        high = self.most is None or value <= self.most
        return value == value and low and high and (self.above is None or value > self.above)

    @property
    def needed(self) -> str:
        """The allowed values in words."""
        return self.allowed or f"at least {self.least:g}"


def seed_option(help: str) -> Option:
    """The description of a seed that every random generator accepts."""
    return Option(help, least=0, most=MOST_SEED, allowed=f"a whole number from 0 to {MOST_SEED}")


@dataclass(frozen=True)
class Declared:
    """A field that is an option.

    Attributes:
        name: of the field.
        kind: its type.
        option: its description.
        default: its default; `MISSING` if it is required.
        group: the heading that it is listed under.
    """

    name: str
    kind: Any
    option: Option
    default: Any
    group: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed names, if the option is a choice between names."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def keyword(self) -> str:
        """Its name in Python."""
        return self.option.name or self.name

    @property
    def is_flag(self) -> bool:
        return self.kind is bool

    @property
    def python(self) -> Any:
        """Its type in the Python interface."""
        return self.kind if self.option.python is None else self.option.python

    def checked(self, value: Any) -> Any:
        """The value itself.

        Raises:
            BitPolicyError: it is not allowed.
        """
        if self.choices and value not in self.choices:
            raise BitPolicyError(f"unknown {self.name} {value!r}; write any of {', '.join(self.choices)}")
        if isinstance(value, int | float) and not self.is_flag and not self.option.holds(value):
            raise BitPolicyError(f"--{self.keyword.replace('_', '-')} is {value}; give {self.option.needed}")
        return value


@cache
def declared_options(kind: type) -> tuple[Declared, ...]:
    """The fields of a dataclass that are options, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _declared(field.name, hints[field.name], field.default, _group(kind, field.name)) for field in fields(kind)
    )


def _declared(name: str, hint: Any, default: Any, group: str) -> Declared:
    kind, option = get_args(hint)
    return Declared(name, kind, option, default, group)


def _group(kind: type, name: str) -> str:
    """The group of the class that declares the field."""
    owner: Any = next(base for base in kind.__mro__ if name in vars(base).get("__annotations__", {}))
    return owner.group
