"""A policy that was edited may take more than the budget it records; whoever exports it should know."""

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
    """Warn, in one line that says both sizes, of a policy that is over the budget that it records.

    Args:
        target: what is packed; it may lie on `meta`.
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
    takes = "" if budget.scope == "weights" else f" and, with all that scope {budget.scope} counts, {whole:,} bytes"
    warnings.warn(
        f"the policy takes {nbytes:,} bytes ({readable(nbytes)}){takes}, over the budget that it records: "
        f"{budget.asked}, which is {budget.bytes:,} bytes; it is exported all the same",
        BitPolicyWarning,
        stacklevel=2,
    )


def _is_size(asked: str) -> bool:
    """Whether a size was asked for, and not a quality."""
    try:
        read(asked)
    except BudgetError:
        return False
    return True
