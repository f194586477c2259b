"""The layout of a model's original checkpoint: where each tensor of diffusers' model is in it.

diffusers renames the tensors of an original checkpoint, splits merged weights into query, key and value, and swaps the
halves of a few. All of that acts on whole rows (output channels), so its inverse is exact for any format whose scales
belong to rows:

    original[name] = rows of part 0, rows of part 1, ...      (merged)
    original[name] = second half of the rows, first half      (swapped)

A family of models has a table of rules. A rule's key is the beginning of a tensor's name in diffusers, its value the
beginning of the name in the original checkpoint; the rule with the longest match applies. In both, `*` stands for the
number of a block and `%` for one part of a name; they are filled in from left to right. Braces list the parts of a
merged layer, in order: `attn.{to_q,to_k,to_v}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from bitpolicy.kernels.errors import BitPolicyError

_WILD = {"*": r"(\d+)", "%": r"([^.]+)"}
_TOKENS = re.compile(r"[*%]|\{[^}]*\}|[^*%{]+")


@dataclass(frozen=True)
class Place:
    """Where a tensor of diffusers' model is in the original checkpoint.

    Attributes:
        name: there.
        parts: the tensors, by their names in diffusers, whose rows it consists of, in order.
        swapped: whether the halves of its rows are in the other order.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Family:
    """The original layout of a family of models.

    Attributes:
        rules: beginnings of names in diffusers -> in the original checkpoint.
        swapped: layers, in diffusers, whose halves are swapped. `$` stands for the last block of a list.
        same: whether tensors without a rule have the same name in both.
        measured: layers, in diffusers, whose stored width tells ComfyUI which model it is (comfy/model_detection.py).
        marks: entries of diffusers' config -> tensors whose presence in the file means that the entry is set.
    """

    rules: Mapping[str, str] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    same: bool = False
    measured: tuple[str, ...] = ()
    marks: Mapping[str, str] = field(default_factory=dict)

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """The place of every tensor of a model, by name in diffusers.

        Raises:
            BitPolicyError: the original checkpoint has no place for a tensor, or a merged one lacks a part.
        """
        names = list(names)
        swapped = [regex(_last(pattern, names)) for pattern in self.swapped]
        found = {}
        for name in names:
            place, parts = self._place(name)
            is_swapped = any(pattern.match(name) for pattern in swapped)
            found[name] = Place(place, parts, is_swapped)
        missing = {part: name for name, place in found.items() for part in place.parts if part not in found}
        if missing:
            part, name = next(iter(missing.items()))
            raise BitPolicyError(
                f"the original checkpoint merges {name} with {part}, which this model does not have; "
                "export it without --target"
            )
        return found

    def tied(self, layers: Iterable[str]) -> list[list[str]]:
        """Groups of layers that are one layer in the original checkpoint.

        Args:
            layers: names in diffusers; those without a place are in no group.
        """
        groups: dict[str, list[str]] = {}
        for layer in layers:
            if (match := self._match(layer)) is not None:
                groups.setdefault(match[0], []).append(layer)
        return [group for group in groups.values() if len(group) > 1]

    def _place(self, name: str) -> tuple[str, tuple[str, ...]]:
        match = self._match(name)
        if match is None:
            raise BitPolicyError(f"the original checkpoint has no place for {name}; export this model without --target")
        return match

    def _match(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Name in the original checkpoint, and names of all parts in diffusers, by the longest rule that matches."""
        matches = [(found, rule) for rule in self._rules if (found := rule.pattern.match(name))]
        if not matches:
            return (name, (name,)) if self.same else None
        found, rule = max(matches, key=lambda match: match[0].end())
        return rule.original(found), rule.siblings(found)

    @cached_property
    def _rules(self) -> list[_Rule]:
        return [_Rule(regex(key), target, _listed(key)) for key, target in self.rules.items()]


@dataclass(frozen=True)
class _Rule:
    """One rule of a table.

    Attributes:
        pattern: matches the beginning of a name in diffusers.
        target: the beginning of the name in the original checkpoint, with placeholders.
        parts: of a merged layer, in order; empty if it is not merged.
    """

    pattern: re.Pattern[str]
    target: str
    parts: tuple[str, ...]

    def original(self, found: re.Match[str]) -> str:
        """The name in the original checkpoint."""
        part = self.pattern.groupindex.get("part")
        values = iter(value for i, value in enumerate(found.groups(), start=1) if i != part)
        filled = "".join(next(values) if token in _WILD else token for token in _TOKENS.findall(self.target))
        return filled + found.string[found.end() :]

    def siblings(self, found: re.Match[str]) -> tuple[str, ...]:
        """The names in diffusers of all parts of the merged layer, or the one name."""
        name = found.string
        if not self.parts:
            return (name,)
        start, end = found.span("part")
        return tuple(name[:start] + part + name[end:] for part in self.parts)


def within(old: str, new: str, rules: Mapping[str, str]) -> dict[str, str]:
    """The rules of a block, for names that begin with `old` in diffusers and with `new` in the original checkpoint."""
    return {f"{old}{name}": f"{new}{place}" for name, place in rules.items()}


def regex(pattern: str, start: str = "", end: str = r"(?=\.|$)") -> re.Pattern[str]:
    """Matches names that begin with the pattern, up to a dot or the end."""
    return re.compile(start + "".join(_piece(token) for token in _TOKENS.findall(pattern)) + end)


def _piece(token: str) -> str:
    if parts := _listed(token):
        return f"(?P<part>{'|'.join(map(re.escape, parts))})"
    return _WILD.get(token) or re.escape(token)


def _listed(pattern: str) -> tuple[str, ...]:
    """What the braces of a pattern list, if it has any."""
    braces = re.search(r"\{(.*)\}", pattern)
    return tuple(braces[1].split(",")) if braces else ()


def _last(pattern: str, names: Iterable[str]) -> str:
    """The pattern with `$` replaced by the highest number that a name has there."""
    before, dollar, after = pattern.partition("$")
    if not dollar:
        return pattern
    numbers = re.compile(re.escape(before) + r"(\d+)\.")
    return f"{before}{max(int(match[1]) for name in names if (match := numbers.match(name)))}{after}"
