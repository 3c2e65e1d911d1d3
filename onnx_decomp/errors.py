"""What can go wrong, each with the exit code that the command ends with.

Every message is one line that says what is wrong, where (file, node or option), and how to mend it.
"""

from __future__ import annotations


class DecompError(Exception):
    """Base of everything this package raises on purpose; `exit_code` is what the command returns."""

    exit_code = 1


class UsageError(DecompError):
    """An option that makes no sense, alone or with the others."""

    exit_code = 2


class InputError(DecompError):
    """A model, statistics or calibration data that can't be used."""

    exit_code = 3


class RequireChangeError(DecompError):
    """`--require-change` was given and nothing was kept."""

    exit_code = 4


class CannotVerifyError(DecompError):
    """The original itself fails, is not deterministic or gives NaN on the user's own data."""

    exit_code = 5


class ProviderError(DecompError):
    """The execution provider that was asked for is not available here."""

    exit_code = 7


class InternalError(DecompError):
    """An invariant of the compiler does not hold: a bug in it, never in the user's input."""

    exit_code = 1
