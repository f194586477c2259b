"""The `quantization_config` of a packed model, one class for diffusers and for transformers.

In a checkpoint it says how each layer is stored. Given to `from_pretrained` of a full-precision model, it names a
policy instead, and the model is packed while it is read. A checkpoint's config may come from anyone, so nothing in it
is trusted: names must be module paths, formats must mean what they mean here, and a file cannot make a loader read a
policy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.kernels.formats.named import from_parameters
from bitpolicy.kernels.kernel import Compute
from bitpolicy.policies.loading.registration import METHOD
from bitpolicy.policies.measured_compute import measured_compute
from bitpolicy.policies.policy import Choice, Policy

FORMAT_VERSION = 1
_STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*")
_AGAIN = "download or export it again"


class _Method(StrEnum):  # diffusers reads its `.value`
    BITPOLICY = METHOD


class BitPolicyConfig(QuantizationConfigMixin, TransformersConfigMixin):
    """How a model is packed, or which policy to pack it by while it is read.

    Attributes:
        policy: a policy, or the path of a policy.yaml, with calibration.safetensors next to it if it needs one. Pass
            such a config to `from_pretrained` of the full-precision model that the policy was made for. It is never
            in a file.
        layers: layer name -> format name, for the packed layers only.
        formats: format name -> its parameters, as the policy file records them.
        storage_dtype: dtype of everything that is not packed: "float16", "bfloat16" or, if nothing is packed,
            "float32".
        written_by: version of bitpolicy that wrote the checkpoint.
        compute: "exact", "int8", "fp8", "mxfp8" or "nvfp4": compute mode of the packed layers after loading. A policy
            has its own.
        checksums: CRC-32 of every tensor's bytes, 8 hex digits each, in the order of their names; empty if the model
            was saved again.

    Raises:
        BitPolicyError: an entry is malformed, or belongs to a newer version than this one reads.
    """

    def __init__(
        self,
        policy: str | PathLike[str] | Policy | None = None,
        layers: Mapping[str, str] | None = None,
        formats: Mapping[str, Mapping[str, Any]] | None = None,
        storage_dtype: str = "float16",
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        written_by: str | None = None,
        checksums: str = "",
        compute: str = Compute.EXACT.value,
    ) -> None:
        _require_version(format_version, written_by)
        if quant_method != METHOD:
            raise BitPolicyError(f"quant_method is {quant_method!r}, needed {METHOD!r}; load it with its own library")
        if _text("storage_dtype", storage_dtype) not in _STORAGE:
            raise BitPolicyError(f"storage_dtype is {storage_dtype!r}, needed one of {', '.join(_STORAGE)}; {_AGAIN}")
        self.quant_method = _Method.BITPOLICY
        self.policy = policy
        self.layers = _strings("layers", layers)
        self.formats = {name: dict(_mapping(name, found)) for name, found in _mapping("formats", formats).items()}
        self.storage_dtype = storage_dtype
        self.format_version = format_version
        self.written_by = written_by
        self.checksums = _text("checksums", checksums)
        self.compute = _known_compute(compute)
        if policy is not None and self.compute != Compute.EXACT:
            raise BitPolicyError("a policy has its own compute; omit compute, or set it in the policy")
        for name in self.layers:
            if not _MODULE_PATH.fullmatch(name):
                raise BitPolicyError(f"the checkpoint packs {name!r}, which is not a layer name; {_AGAIN}")

    @classmethod
    def of(
        cls,
        choices: Mapping[str, Choice],
        storage: torch.dtype,
        checksums: str = "",
        compute: Compute = Compute.EXACT,
    ) -> BitPolicyConfig:
        """The config of a model whose layers are packed as `choices` say."""
        packed = {name: choice.format for name, choice in choices.items() if choice.format.packed}
        return cls(
            layers={name: format.name for name, format in packed.items()},
            formats={format.name: format.parameters() for format in packed.values()},
            storage_dtype=str(storage).removeprefix("torch."),
            written_by=_own_version(),
            checksums=checksums,
            compute=compute.value,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the `quantization_config` in a checkpoint's config.json.

        Raises:
            BitPolicyError: as for the class, or there are entries that this version does not know.
        """
        _require_version(config_dict.get("format_version", FORMAT_VERSION), config_dict.get("written_by"))
        unknown = sorted(map(str, config_dict.keys() - cls().__dict__.keys()))
        if unknown:
            raise BitPolicyError(f"quantization_config has the unknown entry {unknown[0]!r}; {_AGAIN}")
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def opened_policy(self) -> tuple[Policy, Path | None]:
        """The policy to pack by, and the path that it was read from, if any.

        Raises:
            PolicyError: there is no such file, or it is not a policy.
        """
        assert self.policy is not None
        if isinstance(self.policy, Policy):
            return self.policy, None
        path = Path(self.policy)
        return Policy.load(path), path

    def require_use(self, pre_quantized: bool) -> None:
        """Refuse a checkpoint's config that names a policy, and a config without a policy for an unpacked model.

        Raises:
            BitPolicyError: it is one of the two.
        """
        if pre_quantized and self.policy is not None:
            raise BitPolicyError(f"the checkpoint's quantization_config names a policy, {self.policy!r}; {_AGAIN}")
        if not pre_quantized and self.policy is None:
            raise BitPolicyError(
                "this model is not packed; make a checkpoint with search-policy or `bitpolicy export` and load that, "
                "or give the policy: BitPolicyConfig(policy='policy.yaml')"
            )

    @property
    def storage(self) -> torch.dtype:
        """The storage dtype."""
        return _STORAGE[self.storage_dtype]

    def packs(self, tensor: str) -> bool:
        """Whether a tensor of this name belongs to the packed weight of a layer."""
        layer, _, leaf = tensor.rpartition(".")
        return layer in self.layers and leaf != "bias"

    def format_of(self, layer: str) -> Format:
        """The format of one packed layer.

        Raises:
            FormatError: its name is unknown here, or means a different format.
        """
        name = self.layers[layer]
        return from_parameters(name, self.formats.get(name, {}))

    def to_dict(self) -> dict[str, Any]:
        """The entries for config.json. A policy appears as its path, and only until the model is packed."""
        given = {} if self.policy is None else {"policy": _shown(self.policy)}
        compute = "" if self.compute == Compute.EXACT else self.compute
        optional = {"written_by": self.written_by, "checksums": self.checksums, "compute": compute}
        return given | {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "storage_dtype": self.storage_dtype,
            "formats": self.formats,
            "layers": self.layers,
            **{name: value for name, value in optional.items() if value},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: there are no defaults to leave out."""
        return self.to_dict()


def _require_version(found: object, written_by: object) -> None:
    if type(found) is int and found == FORMAT_VERSION:
        return
    own = _own_version()
    newer = f"{METHOD} {written_by}" if isinstance(written_by, str) and written_by != own else f"a newer {METHOD}"
    raise BitPolicyError(
        f"the checkpoint has format_version {found}, but {METHOD} {own} reads {FORMAT_VERSION}; install {newer}"
    )


def _own_version() -> str:
    try:
        return version(METHOD)
    except PackageNotFoundError:  # a source tree on the path
        return "from source"


def _mapping(entry: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found or {}, Mapping):
        raise BitPolicyError(f"{entry} is {type(found).__name__}, needed a mapping; {_AGAIN}")
    return found or {}


def _strings(entry: str, found: Any) -> dict[str, str]:
    return {name: _text(f"{entry}: {name}", value) for name, value in _mapping(entry, found).items()}


def _text(entry: str, found: object) -> str:
    if not isinstance(found, str):
        raise BitPolicyError(f"{entry} is {found!r}, needed text; {_AGAIN}")
    return found


def _known_compute(found: object) -> str:
    try:
        return measured_compute(_text("compute", found)).value
    except BitPolicyError as error:
        raise BitPolicyError(f"{error}, or install the {METHOD} that wrote the checkpoint") from None


def _shown(policy: str | PathLike[str] | Policy) -> str:
    return f"policy for {policy.model.id}" if isinstance(policy, Policy) else str(policy)
