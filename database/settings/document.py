"""A document: a file's YAML nodes, or a mapping, as values that know where they stand.

A value is an `Item`: it knows the keys it stands under and, in a file, the line. Nothing is read beyond what the schema
asks for, so that aliases which lead in circles or multiply are harmless. The line is the key's own, also where an alias
brings the value from elsewhere; a key that came through `<<` has the line where it was written.

No object is ever constructed but by PyYAML's `SafeLoader`, and from scalars only.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from database.errors import ConfigurationError
from database.settings.model import MEMORY
from database.settings.words import closest, did_you_mean, dotted, holds_secret, names_secret, no_such_file, show

if TYPE_CHECKING:
    import yaml
# Imported where a file is read: importing it takes longer than all else here, and a mapping needs none.

__all__ = ["Item", "MappingItem", "YamlItem", "open_document"]


@contextmanager
def open_document(path: str, advice: str) -> Generator[Item]:
    """The root of a YAML file; what is wrong with the file, also below the root, is raised with its line.

    Args:
        path: The file.
        advice: What to do where there is none.
    """
    import yaml  # noqa: PLC0415 - see the top of the module

    text = _read_text(path, advice)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigurationError(f"{path}:1: database: missing; the file is empty")
        _refuse_duplicates(path, node)
        yield YamlItem(path, (), loader, node)
    except yaml.YAMLError as error:
        # `from None`: the YAML error quotes the line, and that line may hold a password.
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise ConfigurationError(f"{path}:1: not a configuration: it is nested too deeply") from None


def _read_text(path: str, advice: str) -> str:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(f"{path}: {no_such_file(path)}; {advice}") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # NUL or a lone surrogate
        raise ConfigurationError(f"{path!r}: not a file name: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        # `from None`: the repr of the decoding error is the whole file, passwords included.
        raise ConfigurationError(f"{path}:{line}: not UTF-8: {error.reason}") from None


def _syntax_error(path: str, text: str, error: yaml.YAMLError) -> ConfigurationError:
    import yaml  # noqa: PLC0415 - see the top of the module

    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, cast("int", error.position)) + 1
        return ConfigurationError(f"{path}:{line}: not valid YAML: {error.reason}")
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigurationError(f"{path}:1: not valid YAML")
    marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
    line = marks[0].line + 1 if marks else 1
    lines = text.splitlines()
    near = [each for mark in marks for each in lines[max(0, mark.line - 1) : mark.line + 1]]
    if any(names_secret(each) or holds_secret(each) for each in near):
        # The problem may quote a part of the value, as with an unquoted `*` or `!` at its beginning.
        problem = "the details are withheld, for hereabouts stands a secret; perhaps it needs quotes"
    else:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in problem:
            problem += " (YAML is indented with spaces, not tabs)"
        if any(f" {MEMORY}" in each for each in near):
            problem += f' (put quotes round it: "{MEMORY}")'
    return ConfigurationError(f"{path}:{line}: not valid YAML: {problem}")


def _refuse_duplicates(path: str, root: yaml.Node) -> None:
    # Before any merge key is resolved, for that is done in place, and a key that overrides a merged one would
    # then look like a duplicate. Visits each node once, however many aliases lead to it, in the file's order.
    import yaml  # noqa: PLC0415 - see the top of the module

    seen: set[int] = set()
    todo: list[tuple[yaml.Node, tuple[str, ...]]] = [(root, ())]
    while todo:
        node, keys = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        children: list[tuple[yaml.Node, tuple[str, ...]]] = []
        if isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, value in _pairs(node):
                if not isinstance(key, yaml.ScalarNode):
                    continue  # Refused by the walk.
                word = cast("str", key.value)
                below = (*keys, word)
                if (first := lines.get((key.tag, word))) is not None:
                    raise ConfigurationError(
                        f"{path}:{_line(key)}: {dotted(below)}: duplicate key; first on line {first}"
                    )
                if key.tag != "tag:yaml.org,2002:merge":  # Several of them are fine, as in safe_load.
                    lines[key.tag, word] = _line(key)
                children.append((value, below))
        elif isinstance(node, yaml.SequenceNode):
            children.extend((each, keys) for each in cast("list[yaml.Node]", node.value))
        todo.extend(reversed(children))


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    return cast("list[tuple[yaml.Node, yaml.Node]]", node.value)


def _line(node: yaml.Node) -> int:
    return cast("int", node.start_mark.line) + 1


class Item:
    """A value of the document.

    Attributes:
        source: The document, as messages name it.
        keys: The keys that lead here.
        line: The line of the last of them, counted from 1; None in a mapping.
        text: The scalar as the file has it, without quotes; None in a mapping and for whatever is no scalar.
        value: The scalar; an empty mapping or list stands for any.
    """

    __slots__ = ("keys", "line", "source", "text", "value")

    value: object

    def __init__(self, source: str, keys: tuple[str, ...], line: int | None, text: str | None, value: object) -> None:
        self.source = source
        self.keys = keys
        self.line = line
        self.text = text
        self.value = value

    def error(self, text: str, *below: str) -> ConfigurationError:
        """An error that names file, line and key; `below`: keys that are missing here."""
        place = self.source if self.line is None else f"{self.source}:{self.line}"
        keys = (*self.keys, *below)
        return ConfigurationError(f"{place}: {dotted(keys)}: {text}" if keys else f"{place}: {text}")

    def shown(self) -> str:
        """The value for a message, unless it may be a secret."""
        if any(map(names_secret, self.keys[-1:])) or holds_secret(self.text or self.value):
            return "something else (not shown here: it may be a secret)"
        return show(self.value, self.text)

    def entries(self) -> dict[str, Item]:
        """The mapping's values by key; a section whose lines are all commented out is null, and so empty."""
        if self.value is None:
            return {}
        if not isinstance(self.value, Mapping):
            raise self.error(f"expected a mapping, got {self.shown()}")
        entries: dict[str, Item] = {}
        for key, item in self.children():
            if not isinstance(key.value, str):
                raise key.error(f"expected keys that are strings, got {show(key.value, key.text)}; put it in quotes")
            entries[key.value] = item
        return entries

    def fields(self, known: Collection[str]) -> dict[str, Item]:
        """The mapping's values by key, which must be a known one."""
        entries = self.entries()
        for key, item in entries.items():
            if key not in known:
                meant = closest(key, known)
                raise item.error(f"unknown key; {did_you_mean(meant) or 'known: ' + ', '.join(known)}")
        return entries

    def elements(self, expected: str) -> list[Item]:
        """The list's values; null is an empty list."""
        if self.value is None:
            return []
        if not isinstance(self.value, (list, tuple)):
            raise self.error(f"expected {expected}, got {self.shown()}")
        return list(self.members())

    def children(self) -> Iterator[tuple[Item, Item]]:
        """The mapping's keys and values; of equal keys, the last counts."""
        raise NotImplementedError

    def members(self) -> Iterator[Item]:
        """The list's values, each under the list's own key."""
        raise NotImplementedError


class MappingItem(Item):
    """A value of a mapping."""

    __slots__ = ()

    def __init__(self, source: str, keys: tuple[str, ...], value: object) -> None:
        super().__init__(source, keys, None, None, value)

    def children(self) -> Iterator[tuple[Item, Item]]:
        """The keys and values."""
        for key, value in cast("Mapping[object, object]", self.value).items():
            word = key if isinstance(key, str) else ""
            yield (
                MappingItem(self.source, self.keys, key),
                MappingItem(self.source, (*self.keys, word), value),
            )

    def members(self) -> Iterator[Item]:
        """The values."""
        for value in cast("list[object]", self.value):
            yield MappingItem(self.source, self.keys, value)


class YamlItem(Item):
    """A node of a YAML file."""

    __slots__ = ("loader", "node")

    def __init__(
        self,
        source: str,
        keys: tuple[str, ...],
        loader: yaml.SafeLoader,
        node: yaml.Node,
        line: int | None = None,
    ) -> None:
        import yaml  # noqa: PLC0415 - see the top of the module

        super().__init__(source, keys, line or _line(node), None, None)
        self.loader: Any = loader  # The stubs leave it half typed, which pyright refuses.
        self.node = node
        if isinstance(node, yaml.ScalarNode):
            self.text = cast("str", node.value)
            self.value = self.construct()
        elif isinstance(node, yaml.SequenceNode):
            self.value = []
        elif node.tag == "tag:yaml.org,2002:map":
            self.value = {}
        else:
            raise self.error("expected a plain mapping, got one with a YAML tag")

    def construct(self) -> object:
        """The scalar as Python has it."""
        try:
            return self.loader.construct_object(self.node, deep=True)
        except Exception:  # PyYAML lets out whatever int(), date() and the like raise.
            # No cause, no tag: with a tag of its own (`!x`), the value itself is part of it.
            raise self.error("a value that YAML cannot read as what it claims to be; put it in quotes") from None

    def children(self) -> Iterator[tuple[Item, Item]]:
        """The keys and values."""
        import yaml  # noqa: PLC0415 - see the top of the module

        node = cast("yaml.MappingNode", self.node)
        try:
            # Resolves merge keys, in place; the second time there are none.
            self.loader.flatten_mapping(node)
        except yaml.constructor.ConstructorError as error:
            line = self.line if error.problem_mark is None else error.problem_mark.line + 1
            raise ConfigurationError(f"{self.source}:{line}: {dotted((*self.keys, '<<'))}: {error.problem}") from None
        for key, value in _pairs(node):
            item = YamlItem(self.source, self.keys, self.loader, key)
            word = item.value if isinstance(item.value, str) else ""
            yield item, YamlItem(self.source, (*self.keys, word), self.loader, value, item.line)

    def members(self) -> Iterator[Item]:
        """The values."""
        for value in cast("list[yaml.Node]", self.node.value):
            yield YamlItem(self.source, self.keys, self.loader, value)
