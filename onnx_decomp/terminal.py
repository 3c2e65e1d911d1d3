"""Text that is safe to show: names in a model are untrusted."""

from __future__ import annotations

import unicodedata

UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Categories of characters that move the cursor, reorder or hide text, break a line, or can't be encoded."""


def printable(text: str) -> str:
    """`text` with every unsafe character shown as an escape such as `\\x1b`."""
    return "".join(_escape(c) if unicodedata.category(c) in UNSAFE else c for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(text: str, longest: int = 800) -> str:
    """`text`, its middle left out if it is long: a name in a model may be a book, and how to mend it comes last."""
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
