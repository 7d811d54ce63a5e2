"""Reading query files: aiosql's own loader, which says where it met what it cannot read, and leaves literals as they are.

aiosql takes comments out and makes `:user__name` of `:user.name`. What stands in a literal (dollar quotes and E'…' among
them) is the user's, and a colon behind a name is a slice (`a[t.lo:t.hi]`): for those this module looks itself.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, cast

__all__ = ["loader"]

_PIECE = re.compile(
    r"""
    (?P<literal>(?<!\w)[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
        | (?P<dollar>\$(?:[^\W\d]\w*)?\$).*?(?P=dollar))
    | (?P<line>--[^\n]*)
    | (?P<block>/\*(?!\+))                          # not a hint: /*+ … */
    | (?<![\w\]):]):(?P<object>[^\W\d]\w*)\.(?P<attribute>[^\W\d]\w*)
    """,
    re.VERBOSE | re.DOTALL,
)
_BRACKET = re.compile(r"/\*|\*/")
_NAME = re.compile(r"--\s*name\s*:\s*")


def _without_blocks(text: str) -> str:
    """The text without its block comments, but with their lines, by which errors are found."""
    kept: list[str] = []
    position = 0
    for match in _PIECE.finditer(text):
        if match["block"] is None or match.start() < position:
            continue
        end = _end_of_block(text, match.end())
        kept += [text[position : match.start()], " ", "\n" * text.count("\n", match.start(), end)]
        position = end
    return "".join([*kept, text[position:]])


def _end_of_block(text: str, position: int) -> int:
    """Where a comment ends that was opened before this position: they nest, but where that does not come out."""
    depth = 1
    first: int | None = None
    for match in _BRACKET.finditer(text, position):
        depth += 1 if match.group() == "/*" else -1
        if match.group() == "*/" and first is None:
            first = match.end()
        if depth == 0:
            return match.end()
    return len(text) if first is None else first


def _without_lines(text: str) -> tuple[str, list[str]]:
    """The text without lines that hold nothing but a comment, and what these say: they describe the query."""
    kept: list[str] = []
    said: list[str] = []
    position = 0
    for match in _PIECE.finditer(text):
        if match["line"] is not None:
            start = text.rfind("\n", 0, match.start()) + 1
            if not text[start : match.start()].strip():
                kept.append(text[position:start])
                said.append(match["line"][2:].strip())
                position = min(match.end() + 1, len(text))
    return "".join([*kept, text[position:]]).strip(), said


def _with_attributes(text: str, mark: str) -> tuple[str, dict[str, dict[str, str]]]:
    """The text with `:user__name` for `:user.name`, and what was found."""
    found: dict[str, dict[str, str]] = {}

    def replaced(match: re.Match[str]) -> str:
        if match["object"] is None:
            return match.group()
        name = f"{match['object']}{mark}{match['attribute']}"
        found.setdefault(match["object"], {})[match["attribute"]] = name
        return f":{name}"

    return _PIECE.sub(replaced, text), found


@functools.cache
def loader() -> Any:
    """The class to be given to aiosql as `loader_cls`; made when it is first needed, for aiosql is imported late."""
    from aiosql.query_loader import QueryLoader  # noqa: PLC0415
    from aiosql.utils import SQLParseException  # noqa: PLC0415

    class Loader(QueryLoader):
        """Names file, line and query."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._mark, self._attribute = self._attribute, None

        def load_query_data_from_sql(self, sql: str, ns_parts: list[str], fname: Path | str = "<unknown>") -> Any:
            first, *queries = _NAME.split(_without_blocks(sql))
            line = 1 + first.count("\n")
            found: list[Any] = []
            for query in queries:
                found.append(self._make_query_datum(query, ns_parts, (fname, line)))
                line += query.count("\n")
            return found

        def _make_query_datum(self, query: str, ns_parts: list[str], floc: tuple[Path | str, int]) -> Any:
            try:
                datum = super()._make_query_datum(query, ns_parts, floc)
            except (ValueError, SQLParseException) as error:
                place = f"{floc[0]}:{floc[1]}"
                text = str(error)
                if place in text:
                    raise
                if text.startswith("duplicate parameter name"):
                    text = "a parameter cannot be named :self: each is passed on as a keyword argument"
                elif "is not a valid parameter name" in text:
                    text = f"{text}: each is passed on as a keyword argument"
                lines = query.strip().splitlines()
                name = lines[0].strip() if lines else ""
                raise SQLParseException(f"{place}: query {name!r}: {text}") from error
            text, said = _without_lines(query.strip().partition("\n")[2])
            if datum.record_class is not None:
                said = said[1:]
            attributes: dict[str, dict[str, str]] = {}
            if self._mark:
                text, attributes = _with_attributes(text, self._mark)
            return datum._replace(sql=text, attributes=attributes, doc_comments="\n".join(said).rstrip())

        def load_query_data_from_file(self, path: Path, *args: Any, **kwargs: Any) -> Any:
            try:
                load = cast("Any", super()).load_query_data_from_file
                return load(path, *args, **kwargs)
            except UnicodeDecodeError as error:
                raise SQLParseException(f"{path}: not {error.encoding}: {error.reason}") from error

    return Loader
