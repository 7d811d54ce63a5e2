"""Which classes of records are such that making one runs no code of their author's."""

from __future__ import annotations

import collections
import dataclasses
from decimal import Decimal
from typing import Any, NamedTuple

import pytest

from database.engine.records import is_generated


@dataclasses.dataclass
class Plain:
    x: int
    y: str = "a"

    def double(self) -> int:
        return self.x * 2


@dataclasses.dataclass(slots=True, frozen=True)
class Slots:
    x: int
    y: str = "a"


@dataclasses.dataclass(frozen=True)
class Child(Slots):
    z: int = 3


class Named(NamedTuple):
    x: int
    y: str = "a"


GENERATED = [Plain, Slots, Child, Named, collections.namedtuple("Old", "x y")]


class Checked(Named):
    def __new__(cls, *values: Any, **named: Any) -> Checked:
        raise AssertionError


@dataclasses.dataclass
class After:
    x: int

    def __post_init__(self) -> None:
        raise AssertionError


@dataclasses.dataclass
class Factory:
    x: list[int] = dataclasses.field(default_factory=lambda: [][0])


@dataclasses.dataclass
class Own:
    x: int

    def __init__(self, x: int) -> None:
        raise AssertionError


@dataclasses.dataclass
class OwnOfTheParent(Own):
    def __init__(self, x: int) -> None:
        raise AssertionError


class Descriptor:
    def __set__(self, instance: object, value: object) -> None:
        raise AssertionError

    def __get__(self, instance: object, owner: type | None = None) -> int:
        return 5


@dataclasses.dataclass
class Described:
    x: int = Descriptor()  # type: ignore[assignment]


@dataclasses.dataclass
class Setting:
    x: int

    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError


class Meta(type):
    def __call__(cls, *values: Any, **named: Any) -> Any:
        raise AssertionError


@dataclasses.dataclass
class Made(metaclass=Meta):
    x: int


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, **named: Any) -> Any:
        raise AssertionError


class Simple:
    def __init__(self, **named: Any) -> None:
        raise AssertionError


OTHERS = [
    Checked,
    After,
    Factory,
    Own,
    OwnOfTheParent,
    Described,
    Setting,
    Made,
    Unhashable(),
    Simple,
    dict,
    Decimal,
    None,
]


@pytest.mark.parametrize("kind", GENERATED)
def test_generated(kind: Any) -> None:
    assert is_generated(kind)


def test_written() -> None:
    assert [kind for kind in OTHERS if is_generated(kind)] == []
