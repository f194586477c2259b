"""The formats of a policy that was searched for another model, such as the one that this model was fine-tuned from.

Which layers a format harms depends on the architecture more than on the weights, so the formats are kept. Everything
that depends on the weights is made again: they are rounded, mean inputs are measured, and biases are corrected where
the policy corrects them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from bitpolicy.kernels.errors import BitPolicyError
from bitpolicy.kernels.formats.format import Format
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.choice import Choice
from bitpolicy.policies.components import from_text
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.policy_records import PolicyError
from bitpolicy.policies.target import Target
from bitpolicy.settings import Settings

_NAMED = 3  # layers that an error names


def for_transfer(settings: Settings) -> Settings:
    """The settings with what a given policy leaves to do: its components are studied, nothing is scored on images, and
    no trial runs. Without a policy, the settings as they are.

    Raises:
        BitPolicyError: the file is not a policy, or an option would change its formats.
    """
    if settings.policy is None:
        return settings
    given = Policy.load(settings.policy)
    chosen = {"--keep": settings.keep, "--share-qkv": settings.share_qkv, "--target": settings.target}
    for name in (name for name, value in chosen.items() if value):
        raise BitPolicyError(f"--policy fixes the format of every layer; leave out {name}, or edit {settings.policy}")
    if settings.compute != given.compute:
        raise BitPolicyError(
            f"{settings.policy} is for --compute {given.compute}, and {settings.compute} was asked for; "
            f"add --compute {given.compute}"
        )
    component = settings.component or given.model.component
    return replace(settings, component=component, probe="weight", trials=0)


def transferred(policy: Policy, path: str | Path, target: Target, account: ByteAccount) -> dict[str, Choice]:
    """The choice for every layer of `target`, from the policy of another model with the same layers.

    Args:
        path: of its file, for messages.

    Raises:
        PolicyError: the other model has another class, other layers, or layers of other shapes.
    """
    theirs = (policy.model.components, from_text(policy.model.class_name))
    if theirs != (target.names, target.class_names):
        raise PolicyError(
            f"{path} is for {policy.model.class_name} ({policy.model.component}), and this model has "
            f"{','.join(target.class_names)} ({','.join(target.names)}); its formats fit only the same classes"
        )
    choices = policy.resolve(target.layers)
    if different := _of_other_shapes(policy, target.layers):
        raise PolicyError(
            f"{len(different)} layers have other shapes than in {policy.model.id}, which {path} was made for: "
            f"{', '.join(different[:_NAMED])}; search a policy for this model"
        )
    nbytes = account.total(formats_of(choices))
    if policy.result is not None and policy.result.policy_bytes != nbytes:
        raise PolicyError(
            f"the formats of {path} take {policy.result.policy_bytes:,} bytes in {policy.model.id} and {nbytes:,} "
            "here, so some layers differ in number or shape; search a policy for this model"
        )
    return choices


def formats_of(choices: Mapping[str, Choice]) -> dict[str, Format]:
    """Layer name -> format."""
    return {name: choice.format for name, choice in choices.items()}


def corrected_as(given: Mapping[str, Choice], found: Mapping[str, Choice]) -> dict[str, Choice]:
    """`found`, with bias correction only where the given policy has it as well."""
    return {
        name: replace(choice, bias_correction=choice.bias_correction and given[name].bias_correction)
        for name, choice in found.items()
    }


def _of_other_shapes(policy: Policy, layers: Mapping[str, nn.Module]) -> Sequence[str]:
    """The layers whose inputs are not as large as the policy's calibration says, as far as it knows them."""
    means = {} if policy.calibration is None else policy.calibration.input_means
    return [name for name, layer in layers.items() if name in means and means[name].shape != _input_shape(layer)]


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (layer.in_channels, *layer.kernel_size)
