"""The exceptions that bitpolicy raises for mistakes a user can fix."""

from __future__ import annotations


class BitPolicyError(ValueError):
    """Says what was found, what was needed and what to do. The command line prints it in one line and exits with 2."""


class BitPolicyWarning(UserWarning):
    """A caveat about a result that is still produced. The command line prints it in one line."""


class FormatError(BitPolicyError):
    """An unknown format, or weights that a format cannot store."""
