"""Values in the server's texts.

PostgreSQL quotes what it was given: `value "99999999999" is out of range`, `relation "secret" does not exist` (a
`regclass`), `syntax error in tsquery: "secret"`, whatever a function RAISEs. Messages go to logs, and parameters are
where secrets are, so each value of the parameters that occurs in a text is replaced in it. DETAIL, HINT and CONTEXT are
left out altogether.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

__all__ = ["HIDDEN", "hide"]

HIDDEN = "<value>"

LEAST = 3
"""Letters from which a value is looked for outside quotes, too: shorter ones would hit the server's own words."""

MOST = 2000
"""Values that are looked at."""

_QUOTED = re.compile(r'"((?:[^"]|"")*)"|\'((?:[^\']|\'\')*)\'')


def _scalars(parameters: Any, depth: int = 0) -> Iterator[str]:
    if parameters is None or isinstance(parameters, bool) or depth > 4:
        return
    if isinstance(parameters, str):
        yield parameters
    elif isinstance(parameters, (bytes, bytearray, memoryview)):
        held = bytes(cast("bytes", parameters))
        yield held.hex()
        yield held.decode("utf-8", "replace")
    elif isinstance(parameters, Mapping):
        for value in cast("dict[str, Any]", parameters).values():
            yield from _scalars(value, depth + 1)
    elif isinstance(parameters, (list, tuple, set, frozenset)):
        for value in cast("Iterable[Any]", parameters):
            yield from _scalars(value, depth + 1)
    elif hasattr(parameters, "__dict__") and depth == 0:
        yield from _scalars(vars(parameters), depth + 1)
    else:
        with contextlib.suppress(Exception):  # a class of the user's
            yield str(parameters)


def _values(parameters: Any) -> list[str]:
    found: set[str] = set()
    for number, value in enumerate(_scalars(parameters)):
        if number >= MOST:
            break
        if value:
            found.add(value)
    return sorted(found, key=len, reverse=True)


def hide(text: str, parameters: Any) -> str:
    """The text without any value of the parameters.

    Args:
        text: A message of the server's, or of psycopg's.
        parameters: As they were given: a mapping, a sequence, an object with attributes, or rows of these.
    """
    values = _values(parameters)
    if not values:
        return text
    folded = [value.casefold() for value in values]

    def quoted(match: re.Match[str]) -> str:
        mark = match.group()[0]
        inner = (match[1] if match[1] is not None else match[2]).replace(mark * 2, mark).casefold().removesuffix("...")
        for value in folded:
            # Also a part of a value, for the server cuts long ones and picks the word that it stumbles over.
            if value == inner or (len(inner) >= LEAST and inner in value) or (len(value) >= LEAST and value in inner):
                return f"{mark}{HIDDEN}{mark}"
        return match.group()

    text = _QUOTED.sub(quoted, text)
    for value in values:
        if LEAST <= len(value) <= len(text):  # to compile what cannot occur takes seconds for megabytes
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text, flags=re.IGNORECASE)
    return text
