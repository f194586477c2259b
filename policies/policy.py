"""The policy file: which format every layer gets, and what the choice was made from.

A policy is YAML that a person can read and edit. `defaults` apply to every layer, `rules` (globs) override them in
order, `layers` (exact names) override both. On use it is resolved against a model into exact names; a rule that matches
nothing, a layer the model does not have and a policy for another model are errors, never ignored.
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
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.named import FP8, format_named, from_parameters
from bitpolicy.kernels.kernel import Compute
from bitpolicy.kernels.quantizers.named import QUANTIZERS
from bitpolicy.policies.calibration import Calibration
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.components import from_text, to_text
from bitpolicy.policies.identity import config_hash
from bitpolicy.policies.storage.atomic import write_text
from bitpolicy.policies.storage.calibration_file import FILE, load_calibration, save_calibration
from bitpolicy.policies.storage.plain_yaml import YamlError, read_yaml
from bitpolicy.policies.target import Target

SCHEMA: Final = 1


class PolicyError(BitPolicyError):
    """A policy file that cannot be read, or that does not fit the model."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ModelReference(_Strict):
    """What a policy was made for. All but `id` and `revision` have an entry for each component, with commas between, as
    the file has them; the properties take them apart.

    `sha256` is of its tensors in the storage dtype, `config` of what its config says beyond the defaults of its class
    (`bitpolicy.policies.identity`); older files have none.
    """

    id: str
    revision: str | None = None
    component: str
    class_name: str = Field(alias="class")
    sha256: str
    config: str | None = None

    @model_validator(mode="after")
    def _has_an_entry_for_each_component(self) -> ModelReference:
        lists = ("component", "class_name", "sha256", *(("config",) if self.config is not None else ()))
        counts = {name: len(from_text(getattr(self, name))) for name in lists}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ValueError(f"needed one entry a component in component, class, sha256 and config, found {found}")
        return self

    @classmethod
    def of(cls, target: Target, hashes: Mapping[str, str], id: str, revision: str | None = None) -> ModelReference:
        """What is recorded of the components under study.

        Args:
            hashes: component -> hash of its tensors, as `target.weights_hashes` gives them.
        """
        return cls.model_validate(
            {
                "id": id,
                "revision": revision,
                "component": to_text(target),
                "class": to_text(target.class_names),
                "sha256": to_text(hashes[name] for name in target),
                "config": to_text(target.config_hashes().values()),
            }
        )

    @property
    def components(self) -> list[str]:
        return from_text(self.component)

    @property
    def hashes(self) -> dict[str, str]:
        """Component -> hash of its tensors."""
        return dict(zip(self.components, from_text(self.sha256), strict=True))

    @property
    def configs(self) -> dict[str, str | None]:
        """Component -> hash of its config; None where none is recorded."""
        found = [None] * len(self.components) if self.config is None else from_text(self.config)
        return dict(zip(self.components, found, strict=True))

    def require_config(self, component: str, model: nn.Module) -> None:
        """Raises:
        PolicyError: the config of one of the components is another than the one that the policy was made with.
        """
        wanted, found = self.configs[component], config_hash(model)
        if wanted is not None and found != wanted:
            raise PolicyError(
                f"the policy was made for {self.id}, whose {component} had a config with sha256 {wanted[:12]}...; this "
                f"config has {found[:12]}..., so it draws otherwise: give the model as it was, or run search-policy on "
                "this one"
            )

    def components_of(self, class_name: str) -> list[str]:
        """Which of the components are of a class."""
        classes = zip(self.components, from_text(self.class_name), strict=True)
        return [component for component, found in classes if found == class_name]


class BudgetRecord(_Strict):
    """The budget as it was asked, and in bytes of its scope.

    Attributes:
        scope: "weights" is what the policy is for; "pipeline" the other models, too; "peak" also what a call holds at
            once.
        other_bytes: what of `bytes` the other models take; with the scopes "pipeline" and "peak".
        activation_bytes: what of `bytes` is kept free for activations; with "peak", as are all that follow.
        height, width: of the image, in pixels.
        batch_size: images a call.
        device, compute_dtype: where and in what the call was observed, e.g. "cuda" and "float16".
    """

    asked: str
    bytes: int
    scope: Literal["weights", "pipeline", "peak"] = "weights"
    other_bytes: int | None = None
    activation_bytes: int | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int | None = None
    device: str | None = None
    compute_dtype: str | None = None

    @model_validator(mode="after")
    def _says_what_its_scope_needs(self) -> BudgetRecord:
        about = dict(self)
        peak = ("activation_bytes", "height", "width", "batch_size", "device", "compute_dtype")
        wanted = {"weights": (), "pipeline": ("other_bytes",), "peak": ("other_bytes", *peak)}[self.scope]
        for name in ("other_bytes", *peak):
            if (about[name] is not None) != (name in wanted):
                raise ValueError(f"scope {self.scope!r} goes {'with' if name in wanted else 'without'} {name}")
        return self


class LayerSettings(_Strict):
    """Settings of some layers; what is not set comes from a more general entry."""

    format: str | None = None
    quantizer: str | None = None
    bias_correction: bool | None = None

    @field_validator("quantizer")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in QUANTIZERS:
            raise ValueError(f"unknown quantizer {name!r}; write any of {', '.join(QUANTIZERS)}")
        return name


class Rule(LayerSettings):
    """Settings of every layer whose name matches the glob `match`."""

    match: str


class Result(_Strict):
    """What the search predicted and measured. `predicted_error` is E|dx_0|^2 / E|x_0|^2 of the final latents; of the
    images where the policy holds an autoencoder."""

    policy_bytes: int
    predicted_error: float | None = None
    psnr_db: float | None = None


class Policy(_Strict):
    """A policy file, schema version 1. `compute` is that of the packed layers, and of the images that were measured."""

    bitpolicy: Literal[1] = SCHEMA
    model: ModelReference
    budget: BudgetRecord | None = None
    storage_dtype: Literal["float16", "bfloat16"] = "float16"
    compute: Literal["exact", "int8", "fp8"] = "exact"
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
        """Whether both files would say the same, wherever they are; a calibration counts by the hash they record."""
        return isinstance(other, Policy) and self.model_dump() == other.model_dump()

    @property
    def calibration(self) -> Calibration | None:
        """What exporting it takes: E[x] per layer, and packed tensors of layers that were not rounded to nearest.

        A policy that a search returned holds it; one that was loaded finds it in calibration.safetensors, in the folder
        of its file. None where there is none.

        Raises:
            BitPolicyError: the file there is damaged, or of another policy.
        """
        beside = self.calibration_path
        if self._calibration is None and beside is not None and beside.is_file():
            self._calibration = load_calibration(beside, self.provenance.get("calibration"))
        return self._calibration

    @property
    def calibration_path(self) -> Path | None:
        """Where the calibration of a policy that was loaded should be; None for a policy that was made in memory."""
        return None if self._path is None else self._path.with_name(FILE)

    def with_calibration(self, calibration: Calibration | Mapping[str, torch.Tensor]) -> Policy:
        """The same policy, holding its calibration.

        Args:
            calibration: a `Calibration`, or tensors under the names that they have in the calibration file.
        """
        copy = self.model_copy()
        held = calibration if isinstance(calibration, Calibration) else Calibration.of(calibration)
        copy._calibration, copy._path = held, None
        return copy

    def under(self, compute: Compute) -> Policy:
        """The same choices under another compute; what was predicted and measured is not true of them there.

        Raises:
            PolicyError: no layer would be multiplied so.
        """
        if compute == self.compute:
            return self
        named = {entry.format for entry in (self.defaults, *self.rules, *self.layers.values())}
        if compute is Compute.FP8 and FP8.name not in named:
            raise PolicyError(
                "compute fp8 rounds the inputs of layers in fp8, and the policy has none; leave the compute it has, or "
                "search with fp8 among the formats"
            )
        result = None if self.result is None else Result(policy_bytes=self.result.policy_bytes)
        return self.model_copy(update={"compute": compute.value, "result": result})

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file; the calibration in its folder is read when it is asked for.

        Raises:
            PolicyError: it is missing, not YAML, or has unknown or malformed entries.
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
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PolicyError(f"{path}: {where}: {first['msg']}; mend that entry or make the policy anew") from error
        found._path = Path(path)
        return found

    def save(self, path: str | Path) -> None:
        """Write the file, aside and renamed, and its calibration, if it has one, to calibration.safetensors next to it.

        Raises:
            BitPolicyError: it was loaded, and the calibration there is damaged or of another policy.
        """
        beside, loaded = Path(path).with_name(FILE), self.calibration_path
        if (loaded is None or loaded.resolve() != beside.resolve()) and self.calibration:
            save_calibration(self.calibration, beside)
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
        """The policy that gives each layer its choice, with the commonest choice as the default."""
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
            unsupported: other layers of the model, which cannot be packed, and what they are.
            component: all names are of this one's layers, of several that the policy covers: what it says of others is
                passed over.

        Raises:
            PolicyError: a rule matches no layer, an entry names a layer that is not there, or a format is unknown or
                was defined differently.
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
                    f"the policy names layer {name!r}, a {unsupported[name]}, which cannot be packed: it stays in the "
                    "storage dtype whatever the policy says; take its entry out"
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
    """What to write of `choice` where `common` is the default; a format that is not packed has no bias to correct."""
    corrects = choice.format.packed and choice.bias_correction != common.bias_correction
    rounds = choice.format.packed and choice.quantizer != common.quantizer
    return LayerSettings(
        format=choice.format.name if choice.format != common.format else None,
        quantizer=choice.quantizer if rounds else None,
        bias_correction=choice.bias_correction if corrects else None,
    )


class _Readable(yaml.SafeDumper):
    """Short mappings of plain values on one line, as people write them; nothing by reference."""

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
