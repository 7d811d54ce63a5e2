"""Reading query files: aiosql's own loader, which says where it met what it cannot read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

__all__ = ["loader"]


@functools.cache
def loader() -> Any:
    """The class to be given to aiosql as `loader_cls`; made when it is first needed, for aiosql is imported late."""
    from aiosql.query_loader import QueryLoader  # noqa: PLC0415
    from aiosql.utils import SQLParseException  # noqa: PLC0415

    class Loader(QueryLoader):
        """Names file, line and query."""

        def _make_query_datum(self, query: str, ns_parts: list[str], floc: tuple[Path | str, int]) -> Any:
            try:
                return super()._make_query_datum(query, ns_parts, floc)
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

        def load_query_data_from_file(self, path: Path, *args: Any, **kwargs: Any) -> Any:
            try:
                load = cast("Any", super()).load_query_data_from_file
                return load(path, *args, **kwargs)
            except UnicodeDecodeError as error:
                raise SQLParseException(f"{path}: not {error.encoding}: {error.reason}") from error

    return Loader
