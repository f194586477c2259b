"""Warn if a policy takes more than the budget that it records, which can happen after it was edited."""

from __future__ import annotations

import warnings

import torch

from bitpolicy.kernels.errors import BitPolicyWarning
from bitpolicy.policies.accounting import ByteAccount
from bitpolicy.policies.apply import choices_for
from bitpolicy.policies.policy import Policy
from bitpolicy.policies.target import Target
from bitpolicy.search.budget import BudgetError, read, readable


def warn_if_over_budget(policy: Policy, target: Target) -> None:
    """Warn, in one line with both sizes, if a policy is over the budget that it records.

    Args:
        target: the model to pack; it may be on `meta`.
    """
    budget = policy.budget
    if budget is None or not _is_size(budget.asked):
        return
    stored = budget.compute_dtype if budget.scope == "peak" else policy.storage_dtype  # as the scope counts weights
    formats = {name: choice.format for name, choice in choices_for(target, policy).items()}
    nbytes = ByteAccount.of(target, getattr(torch, str(stored))).total(formats)
    whole = nbytes + (budget.other_bytes or 0) + (budget.activation_bytes or 0)
    if whole <= budget.bytes:
        return
    takes = (
        "" if budget.scope == "weights" else f", or {whole:,} bytes with everything that scope {budget.scope} counts"
    )
    warnings.warn(
        f"the policy takes {nbytes:,} bytes ({readable(nbytes)}){takes}, over its recorded budget: "
        f"{budget.asked}, which is {budget.bytes:,} bytes; it is exported anyway",
        BitPolicyWarning,
        stacklevel=2,
    )


def _is_size(asked: str) -> bool:
    """Whether the policy was made for a size, and not for a quality."""
    try:
        read(asked)
    except BudgetError:
        return False
    return True
