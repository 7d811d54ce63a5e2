"""Words for messages: how a value, a key and a near miss are shown, and what must not be shown."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

__all__ = [
    "closest",
    "did_you_mean",
    "dotted",
    "holds_secret",
    "is_path",
    "is_text",
    "names_secret",
    "no_such_file",
    "show",
]


def show(value: object, text: str | None = None) -> str:
    """A value for a message; `text` is how the file has it. Never calls a stranger's `repr()`."""
    kind = type(value).__name__
    if value is None:
        return "None" if text is None else "null"
    if isinstance(value, str):
        return f"{str.__repr__(value if len(value) <= 80 else value[:80] + '…')} ({kind})"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits ({kind})"
    if text is not None:
        return f"{text if len(text) <= 80 else text[:80] + '…'} ({kind})"
    if isinstance(value, (bool, int, float)):
        return f"{value!r} ({kind})"
    return f"a value of type {kind}"


def dotted(keys: tuple[str, ...]) -> str:
    """Keys in one word, as `database.sqlite.path`."""
    plain = str.maketrans("-<", "__")
    return ".".join(key if key.translate(plain).isidentifier() else repr(key) for key in keys)


def did_you_mean(word: str | None) -> str:
    """The question; empty where there is nothing to suggest."""
    return f"did you mean {word!r}?" if word else ""


def is_path(value: object) -> TypeGuard[os.PathLike[Any]]:
    """Whether a value is a `Path` or the like."""
    return isinstance(value, os.PathLike)


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text."""
    return isinstance(value, str)


def closest(word: str, known: Collection[str]) -> str | None:
    """The known word that was perhaps meant."""
    import difflib  # noqa: PLC0415 - only needed when something is wrong

    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(word[:80].lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def names_secret(key: str) -> bool:
    """Whether what stands under a key (or in a line) is not to be shown."""
    words = ("passw", "passphrase", "pwd", "secret", "token", "credential", "conninfo")
    return any(word in key.lower() for word in words)


def holds_secret(value: object) -> bool:
    """Whether a value that stands where it should not looks like a connection string."""
    return isinstance(value, str) and (("://" in value and "@" in value) or "password=" in value.lower())


def no_such_file(path: str) -> str:
    """That there is none, and where it was looked for."""
    try:
        return "no such file" if os.path.isabs(os.path.expanduser(path)) else f"no such file in {os.getcwd()!r}"
    except OSError:  # The working directory has been removed.
        return "no such file, nor is there a working directory"
