"""How far a long run has come, told to whoever watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what is being done; it must not decide anything."""

    def stage(self, name: str) -> None:
        """A new stage begins, and the one before it is done."""

    def advance(self, done: int, total: int) -> None:
        """So much of the present stage is done."""


class Silent:
    """Nobody watches."""

    def stage(self, name: str) -> None:
        """Tell nobody."""

    def advance(self, done: int, total: int) -> None:
        """Tell nobody."""
