"""The records that a policy file is made of: the model, the budget, settings of layers, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.quantizers.named import QUANTIZERS
from bitpolicy.policies.components import from_text, to_text
from bitpolicy.policies.identity import config_hash
from bitpolicy.policies.target import Target


class PolicyError(BitPolicyError):
    """A policy file that cannot be read, or that does not fit the model."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ModelReference(Strict):
    """The model that a policy was made for.

    Every field except `id` and `revision` has one entry per component, separated by commas as in the file; the
    properties split them. `sha256` is the hash of the tensors in the storage dtype, `config` the hash of the config
    without the defaults of its class (`bitpolicy.policies.identity`). Older files have no `config`. `lora` names what
    was merged into the weights, in order, each FILE or FILE:SCALE; the hashes are of the merged weights.
    """

    id: str
    revision: str | None = None
    component: str
    class_name: str = Field(alias="class")
    sha256: str
    config: str | None = None
    lora: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _has_an_entry_for_each_component(self) -> ModelReference:
        lists = ("component", "class_name", "sha256", *(("config",) if self.config is not None else ()))
        counts = {name: len(from_text(getattr(self, name))) for name in lists}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ValueError(f"needed one entry per component in component, class, sha256 and config, found {found}")
        return self

    @classmethod
    def of(
        cls,
        target: Target,
        hashes: Mapping[str, str],
        id: str,
        revision: str | None = None,
        lora: Sequence[str] = (),
    ) -> ModelReference:
        """The record of the components under study.

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
                "lora": tuple(lora) or None,
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
        """Component -> hash of its config; None if none is recorded."""
        found = [None] * len(self.components) if self.config is None else from_text(self.config)
        return dict(zip(self.components, found, strict=True))

    def require_config(self, component: str, model: nn.Module) -> None:
        """Refuse a model whose config differs from the one that the policy was made with.

        Raises:
            PolicyError: the hash of the config is not the recorded one.
        """
        wanted, found = self.configs[component], config_hash(model)
        if wanted is not None and found != wanted:
            raise PolicyError(
                f"the policy was made for {self.id}, whose {component} had a config with sha256 {wanted[:12]}...; this "
                f"config has {found[:12]}..., so its images differ; give the model with its original config, or run "
                "search-policy on this one"
            )

    def components_of(self, class_name: str) -> list[str]:
        """The components of this class."""
        classes = zip(self.components, from_text(self.class_name), strict=True)
        return [component for component, found in classes if found == class_name]


class BudgetRecord(Strict):
    """The budget as the user wrote it, and in bytes of its scope.

    Attributes:
        scope: "weights" covers the components under study; "pipeline" also the other models; "peak" also the memory
            that a call needs at once.
        other_bytes: the part of `bytes` that the other models take; set with the scopes "pipeline" and "peak".
        activation_bytes: the part of `bytes` kept free for activations; set with "peak", like all fields below.
        height, width: of the image, in pixels.
        batch_size: images per call.
        device, compute_dtype: device and dtype of the observed call, e.g. "cuda" and "float16".
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
    def _has_what_its_scope_needs(self) -> BudgetRecord:
        fields = dict(self)
        peak = ("activation_bytes", "height", "width", "batch_size", "device", "compute_dtype")
        wanted = {"weights": (), "pipeline": ("other_bytes",), "peak": ("other_bytes", *peak)}[self.scope]
        for name in ("other_bytes", *peak):
            if (fields[name] is not None) != (name in wanted):
                raise ValueError(f"scope {self.scope!r} {'needs' if name in wanted else 'does not allow'} {name}")
        return self


class LayerSettings(Strict):
    """Settings of some layers; unset ones come from a more general entry."""

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


class Result(Strict):
    """What the search predicted and measured. `predicted_error` is E|dx_0|^2 / E|x_0|^2 of the final latents, or of the
    images if the policy covers an autoencoder."""

    policy_bytes: int
    predicted_error: float | None = None
    psnr_db: float | None = None
