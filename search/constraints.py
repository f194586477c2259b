"""What users fix in advance: formats of some layers (`--keep`), layers that share a format (`--share-qkv`), and a
program that must hold the result (`--target`), which may store several layers as one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import format_named
from bitpolicy.policies.exporters.exporter import Layer as ExportedLayer
from bitpolicy.policies.exporters.targets import exporter_named
from bitpolicy.sensitivity.inventory import Layer

_PROJECTIONS = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),  # T5
    ("query", "key", "value"),  # BERT, older autoencoders
)


def pinned(rules: Iterable[str], layers: Sequence[Layer]) -> dict[str, Format]:
    """Layer name -> the format that a `--keep` rule gives it.

    Args:
        rules: written GLOB=FORMAT, e.g. "*time_embedding*=fp16"; later rules win.

    Raises:
        BitPolicyError: a rule has another form, matches no layer, or names a format that does not fit a layer's shape.
        FormatError: there is no such format.
    """
    found: dict[str, Format] = {}
    for rule in rules:
        glob, equals, name = rule.rpartition("=")
        if not equals or not glob:
            raise BitPolicyError(
                f"--keep {rule!r} is not GLOB=FORMAT; write for example --keep '*time_embedding*=fp16'"
            )
        format = format_named(name)
        matching = [layer for layer in layers if fnmatchcase(layer.name, glob)]
        if not matching:
            raise BitPolicyError(
                f"--keep {rule!r} matches none of the {len(layers)} layers; `bitpolicy inspect` lists them"
            )
        for layer in matching:
            if not format.fits(layer.shape):
                raise BitPolicyError(
                    f"--keep {rule!r}: {layer.name} has shape {layer.shape}, which {format.name} cannot store; "
                    "keep it at another format"
                )
            found[layer.name] = format
    return found


def shared_qkv(layers: Sequence[Layer]) -> list[list[str]]:
    """Groups of two or more layers that are the query, key and value projections of one attention."""
    names = {layer.name for layer in layers}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    found = [
        [f"{parent}.{leaf}" for leaf in leaves if f"{parent}.{leaf}" in names]
        for parent in sorted(parents)
        for leaves in _PROJECTIONS
    ]
    return [group for group in found if len(group) > 1]


def joined(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups of layers that share a format, with those that overlap made one."""
    found: list[list[str]] = []
    for group in groups:
        touching = [other for other in found if not set(other).isdisjoint(group)]
        found = [other for other in found if other not in touching]
        found.append(list(dict.fromkeys(name for one in (*touching, group) for name in one)))
    return found


def require_one_pin(groups: Iterable[Sequence[str]], kept: Mapping[str, Format]) -> None:
    """Check that no two layers that share a format are kept at different ones.

    Args:
        kept: from `pinned`.

    Raises:
        BitPolicyError: two are.
    """
    for group in groups:
        there = {kept[name]: name for name in group if name in kept}
        if len(there) > 1:
            (one, first), (other, second), *_ = there.items()
            raise BitPolicyError(
                f"{first} and {second} must share a format, because of --share-qkv or --target, and --keep gives them "
                f"{one.name} and {other.name}; keep them at the same format"
            )


def not_held(
    program: str,
    layers: Sequence[Layer],
    formats: Iterable[Format],
    kept: Mapping[str, Format],
    merged: Container[str] = (),
) -> frozenset[tuple[str, Format]]:
    """The (layer name, format) pairs that another program cannot hold.

    Args:
        program: its name, one of `bitpolicy.policies.exporters.targets.NAMES`.
        kept: from `pinned`.
        merged: names of layers that the program stores as one with others.

    Raises:
        BitPolicyError: there is no such program, or `kept` has a format that it cannot hold.
    """
    exporter = exporter_named(program)
    found = frozenset(
        (layer.name, format)
        for layer in layers
        for format in formats
        if not exporter.holds(ExportedLayer(layer.name, layer.kind, layer.shape, format, layer.name in merged))
    )
    for name, format in kept.items():
        if (name, format) in found:
            raise BitPolicyError(
                f"--keep {name}={format.name}: {exporter.title} cannot hold that; "
                f"`bitpolicy formats --target {exporter.name}` lists what it supports"
            )
    return found
