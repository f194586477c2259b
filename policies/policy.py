"""The policy file: the format of every layer, and what the choice was made from.

A policy is YAML that a person can read and edit. `defaults` apply to every layer, `rules` (globs) override them in
order, `layers` (exact names) override both. Before use, a policy is resolved against a model into exact layer names.
A rule that matches nothing, a layer that the model lacks and a policy for another model are errors, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import torch
import yaml
from pydantic import Field, PrivateAttr, ValidationError

from bitpolicy.kernels.dispatch import ROUNDED
from bitpolicy.kernels.formats.named import format_named, from_parameters
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.policy_records import (
    BudgetRecord,
    LayerSettings,
    ModelReference,
    PolicyError,
    Result,
    Rule,
    Strict,
)
from bitpolicy.policies.storage.atomic import write_text
from bitpolicy.policies.storage.calibration_file import FILE, load_calibration, save_calibration
from bitpolicy.policies.storage.plain_yaml import YamlError, read_yaml

SCHEMA: Final = 1


class Policy(Strict):
    """A policy file, schema version 1. `compute` applies to the packed layers, and to the images that were measured."""

    bitpolicy: Literal[1] = SCHEMA
    model: ModelReference
    budget: BudgetRecord | None = None
    storage_dtype: Literal["float16", "bfloat16"] = "float16"
    compute: Literal["exact", "int8", "fp8", "mxfp8", "nvfp4"] = "exact"
    formats: dict[str, dict[str, Any]] = Field(default_factory=dict)
    defaults: LayerSettings = Field(
        default_factory=lambda: LayerSettings(format="fp16", quantizer="rtn", bias_correction=False)
    )
    rules: list[Rule] = Field(default_factory=list)
    layers: dict[str, LayerSettings] = Field(default_factory=dict)
    result: Result | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)
    _calibration: Calibration | None = PrivateAttr(default=None)
    _path: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Whether both files would have the same content, wherever they are. Calibrations are compared by the hash that
        the files record."""
        return isinstance(other, Policy) and self.model_dump() == other.model_dump()

    @property
    def calibration(self) -> Calibration | None:
        """What an export needs besides the model: E[x] per layer, and packed tensors of layers that were not rounded to
        nearest; None if there is no calibration.

        A policy returned by a search holds it. A loaded policy reads it from calibration.safetensors in the folder of
        its file.

        Raises:
            BitPolicyError: that file is damaged or belongs to another policy.
        """
        file = self.calibration_path
        if self._calibration is None and file is not None and file.is_file():
            self._calibration = load_calibration(file, self.provenance.get("calibration"))
        return self._calibration

    @property
    def calibration_path(self) -> Path | None:
        """Where the calibration of a loaded policy should be; None for a policy that was made in memory."""
        return None if self._path is None else self._path.with_name(FILE)

    def with_calibration(self, calibration: Calibration | Mapping[str, torch.Tensor]) -> Policy:
        """A copy of the policy that holds this calibration.

        Args:
            calibration: a `Calibration`, or tensors under the names that they have in the calibration file.
        """
        copy = self.model_copy()
        held = calibration if isinstance(calibration, Calibration) else Calibration.of(calibration)
        copy._calibration, copy._path = held, None
        return copy

    def under(self, compute: Compute) -> Policy:
        """The same choices under another compute mode, without the predictions and measurements, which do not apply
        there.

        Raises:
            PolicyError: no layer would use that compute mode.
        """
        if compute == self.compute:
            return self
        named = {entry.format for entry in (self.defaults, *self.rules, *self.layers.values())}
        multiplied = [format.name for format in ROUNDED.get(compute, ())]
        if multiplied and named.isdisjoint(multiplied):
            raise PolicyError(
                f"compute {compute} rounds the inputs of {' and '.join(multiplied)} layers, but the policy has none; "
                f"keep the policy's compute, or search with {multiplied[0]} among the formats"
            )
        result = None if self.result is None else Result(policy_bytes=self.result.policy_bytes)
        return self.model_copy(update={"compute": compute.value, "result": result})

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file. The calibration in its folder is read on first use.

        Raises:
            PolicyError: the file is missing, not YAML, or has unknown or malformed entries.
        """
        try:
            data = read_yaml(Path(path))
        except OSError as error:
            raise PolicyError(
                f"cannot read policy {path}: {error.strerror or error}; give the policy.yaml that search-policy wrote"
            ) from error
        except YamlError as error:
            raise PolicyError(str(error)) from error
        if not isinstance(data, dict):
            raise PolicyError(
                f"{path} is not a policy: found {type(data).__name__}, needed a mapping with 'bitpolicy: {SCHEMA}'"
            )
        try:
            found = cls.model_validate(data)
        except ValidationError as error:
            errors = error.errors()
            first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # a misspelled entry
            where = ".".join(str(part) for part in first["loc"])
            raise PolicyError(f"{path}: {where}: {first['msg']}; fix that entry or make the policy again") from error
        found._path = Path(path)
        return found

    def save(self, path: str | Path) -> None:
        """Write the file atomically, and its calibration, if it has one, to calibration.safetensors next to it.

        Raises:
            BitPolicyError: the policy was loaded, and its calibration is damaged or belongs to another policy.
        """
        file, loaded = Path(path).with_name(FILE), self.calibration_path
        if (loaded is None or loaded.resolve() != file.resolve()) and self.calibration:
            save_calibration(self.calibration, file)
        write_text(Path(path), self.to_yaml())

    def to_yaml(self) -> str:
        data = self.model_dump(by_alias=True, exclude_none=True, exclude_defaults=False)
        for empty in ("rules", "provenance"):
            if not data[empty]:
                del data[empty]
        if self.compute == "exact":
            del data["compute"]
        return yaml.dump(data, Dumper=_Readable, sort_keys=False, width=120, explicit_start=True, explicit_end=True)

    @classmethod
    def of(cls, choices: Mapping[str, Choice], **fields: Any) -> Policy:
        """The policy that gives each layer its choice, with the most common choice as the default."""
        counts: dict[Choice, int] = {}
        for choice in choices.values():
            counts[choice] = counts.get(choice, 0) + 1
        common = max(counts, key=lambda choice: counts[choice])
        return cls(
            formats={f.name: f.parameters() for f in sorted({c.format for c in counts}, key=lambda f: f.name)},
            defaults=LayerSettings(
                format=common.format.name, quantizer=common.quantizer, bias_correction=common.bias_correction
            ),
            layers={name: _difference(choice, common) for name, choice in choices.items() if choice != common},
            **fields,
        )

    def resolve(
        self,
        names: Iterable[str],
        unsupported: Mapping[str, str] = MappingProxyType({}),
        component: str | None = None,
    ) -> dict[str, Choice]:
        """The choice for each layer in `names`, the layers of a model.

        Args:
            unsupported: layers of the model that cannot be packed -> their classes.
            component: the component that all names belong to, if the policy covers several; its entries for other
                components are skipped.

        Raises:
            PolicyError: a rule matches no layer, an entry names a layer that the model does not have, or a format is
                unknown or was defined differently.
        """
        names = list(names)
        for name, parameters in self.formats.items():
            from_parameters(name, parameters)
        for rule in self.rules:
            if component is None and not any(fnmatchcase(name, rule.match) for name in names):
                raise PolicyError(
                    f"rule {rule.match!r} matches none of the {len(names)} layers; `bitpolicy inspect` lists them"
                )
        for name in self.layers:
            if component is not None and not name.startswith(f"{component}."):
                continue
            if name in unsupported:
                raise PolicyError(
                    f"the policy names layer {name!r}, a {unsupported[name]}, which cannot be packed and always stays "
                    "in the storage dtype; remove its entry"
                )
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "`bitpolicy inspect` lists the layers"
                raise PolicyError(f"the policy names layer {name!r}, which this model does not have; {hint}")
        return {name: self._choice(name) for name in names}

    def _choice(self, name: str) -> Choice:
        settings = {"format": "fp16", "quantizer": "rtn", "bias_correction": False}
        matching = [rule for rule in self.rules if fnmatchcase(name, rule.match)]
        for entry in (self.defaults, *matching, self.layers.get(name, LayerSettings())):
            settings |= entry.model_dump(include={"format", "quantizer", "bias_correction"}, exclude_none=True)
        format = format_named(str(settings["format"]))
        if not format.packed:
            return Choice(format)
        return Choice(format, bool(settings["bias_correction"]), str(settings["quantizer"]))


def _difference(choice: Choice, common: Choice) -> LayerSettings:
    """The settings of `choice` to write if `common` is the default. A format that is not packed needs neither quantizer
    nor bias correction."""
    corrects = choice.format.packed and choice.bias_correction != common.bias_correction
    rounds = choice.format.packed and choice.quantizer != common.quantizer
    return LayerSettings(
        format=choice.format.name if choice.format != common.format else None,
        quantizer=choice.quantizer if rounds else None,
        bias_correction=choice.bias_correction if corrects else None,
    )


class _Readable(yaml.SafeDumper):
    """Writes short mappings of plain values on one line, as people do, and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _mapping(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.MappingNode:
    flat = (
        bool(data)
        and all(isinstance(v, str | int | float | bool | None) for v in data.values())
        and len(str(data)) < 100
    )
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=flat)


_Readable.add_representer(dict, _mapping)
