"""The one family of exceptions that bitpolicy raises for a mistake its user can mend."""

from __future__ import annotations


class BitPolicyError(ValueError):
    """Says what was found, what was needed and what to do. The command line prints it on one line and exits 2."""


class BitPolicyWarning(UserWarning):
    """What a user should know of a result that is made all the same. The command line prints it on one line."""


class FormatError(BitPolicyError):
    """An unknown format, or weights that a format cannot hold."""
