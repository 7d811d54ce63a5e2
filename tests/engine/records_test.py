"""Records: a field gets back the type that was stored, where its class says so; any other class is made as ever."""

from __future__ import annotations

import datetime as dt
import enum
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, NamedTuple, NewType, Optional
from uuid import UUID

import pytest

from database import errors
from database.engine.records import records

attrs = pytest.importorskip("attrs")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Odd(enum.Enum):
    """Members that are not stored as the values they have."""

    DAY = dt.date(2024, 2, 29)
    PRICE = Decimal("1.50")


When = NewType("When", dt.datetime)


@dataclass
class Job:
    id: int
    at: dt.datetime
    day: dt.date
    clock: dt.time
    price: Decimal
    ident: UUID
    colour: Colour
    level: Level
    rights: Right
    odd: Odd
    active: bool
    path: Path
    pure: PurePosixPath
    maybe: dt.datetime | None
    old: Optional[Decimal]  # noqa: UP045
    noted: Annotated[dt.date, "a note"]
    since: When
    text: str = ""
    either: dt.date | str = ""
    known: ClassVar[dt.date] = dt.date(2000, 1, 1)
    made: dt.datetime = field(init=False, default=dt.datetime(2000, 1, 1))


VALUES: dict[str, Any] = {
    "id": 1,
    "at": dt.datetime(2024, 2, 29, 12, 30, 0, 5, tzinfo=dt.UTC),
    "day": dt.date(2024, 2, 29),
    "clock": dt.time(12, 30),
    "price": Decimal("12.340"),
    "ident": UUID(int=5),
    "colour": Colour.BLUE,
    "level": Level.HIGH,
    "rights": Right.READ | Right.WRITE,
    "odd": Odd.PRICE,
    "active": True,
    "path": Path("/tmp/a b"),
    "pure": PurePosixPath("x/y"),
    "maybe": None,
    "old": Decimal("1E+3"),
    "noted": dt.date(1999, 12, 31),
    "since": dt.datetime(2024, 1, 1),
    "text": "2024-01-01",
    "either": "2024-01-01",
}


class Named(NamedTuple):
    at: dt.datetime
    flag: bool | None = None


@attrs.define
class Attrs:
    _at: dt.datetime
    flag: bool = attrs.field(converter=lambda value: f"converted {value}")
    price: Decimal | None = None


async def test_what_goes_in_comes_out(db: Any, engine: Any) -> None:
    """A record that is stored field by field is read back as it was, by every method, also from NUMERIC columns."""
    names = list(VALUES)
    columns = ", ".join(
        f"{name} {'BIGINT' if isinstance(VALUES[name], (int, enum.Flag)) else 'TEXT'}" for name in names
    )
    await db.execute(f"CREATE TABLE record ({columns})")
    marks = ", ".join(f":{name}" for name in names)
    job = Job(**VALUES)
    for _ in range(70):  # so many that `fetch_all` takes another way
        await db.execute(f"INSERT INTO record VALUES ({marks})", job)
    query = "SELECT * FROM record"
    assert await db.fetch_one(query, record_class=Job) == job
    assert await db.fetch_all(query, record_class=Job) == [job] * 70
    async with db.stream(query, chunk_size=30, record_class=Job) as rows:
        assert [row async for row in rows] == [job] * 70
    async with db.transaction():
        assert await db.fetch_one(query, record_class=Job) == job
    named = "SELECT at, active AS flag FROM record LIMIT 1"
    assert await db.fetch_one(named, record_class=Named) == Named(job.at, True)
    made = await db.fetch_one("SELECT at, 3 AS flag, price FROM record LIMIT 1", record_class=Attrs)
    assert (made._at, made.flag, made.price) == (job.at, "converted 3", job.price)
    if engine.name == "sqlite3":
        await db.execute("CREATE TABLE price (price NUMERIC)")
        await db.execute_many("INSERT INTO price VALUES (?)", [(Decimal("12.34"),), (Decimal("5"),)])
        got = await db.fetch_all("SELECT '2024-01-01' AS at, 1 AS flag, price FROM price", record_class=Attrs)
        assert [each.price for each in got] == [Decimal("12.34"), Decimal("5")]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("at", "secret"),
        ("day", "2024-02-29 12:00"),
        ("clock", "secret"),
        ("price", "secret"),
        ("ident", "secret"),
        ("colour", "secret"),
        ("level", 7),
        ("active", 2),
        ("active", "secret"),
        ("path", 5),
        ("maybe", "secret"),
        ("at", 1709200000),
    ],
)
async def test_a_value_that_does_not_fit(column: str, value: Any, db: Any, engine: Any) -> None:
    """It is an error that names column and row and says what is expected; what is stored is nowhere to be read."""
    if engine.name != "sqlite3":
        pytest.skip("PostgreSQL gives values of the columns' types")
    kind = Job.__annotations__[column]

    @dataclass
    class One:
        n: int

    One.__annotations__[column] = kind
    one = dataclass(type("One", (), {"__annotations__": {"n": int, column: kind}, "__module__": __name__}))
    query = f"SELECT n, iif(n = 3, :wrong, NULL) AS {column} FROM (SELECT 1 AS n UNION SELECT 2 UNION SELECT 3 UNION SELECT 4)"
    for read in (db.fetch_all, streamed(db)):
        with pytest.raises(errors.QueryExecutionError) as caught:
            await read(query, {"wrong": value}, record_class=one)
        text = str(caught.value)
        assert f"column {column!r} of row 3" in text, text
        assert "One" in text, text
        if read == db.fetch_all:
            assert (caught.value.sql, caught.value.parameters) == (query, {"wrong": value})
        assert caught.value.__context__ is None or "secret" not in repr(caught.value.__context__)
        assert "secret" not in text.replace("<wrong>", "")
    assert await db.fetch_value("SELECT 1") == 1


def streamed(db: Any) -> Any:
    async def read(query: str, params: Any, *, record_class: Any) -> None:
        async with db.stream(query, params, chunk_size=2, record_class=record_class) as rows:
            async for _ in rows:
                pass

    return read


def test_classes_that_are_left_alone() -> None:
    """Functions, plain classes, pydantic models and annotations that cannot be resolved get the values as they are."""
    pydantic = pytest.importorskip("pydantic")

    class Plain:
        at: dt.datetime

        def __init__(self, at: Any) -> None:
            self.at = at

    class Model(pydantic.BaseModel):
        at: dt.datetime

    class Unhashable:
        __hash__ = None

        def __call__(self, at: Any) -> Any:
            return at

    unknown = dataclass(type("Unknown", (), {"__annotations__": {"at": "Nowhere.datetime"}, "__module__": __name__}))
    row = [("2024-01-01 10:00:00",)]
    assert records(["at"], row, dict) == [{"at": row[0][0]}]
    assert records(["at"], row, Plain)[0].at == row[0][0]
    assert records(["at"], row, Unhashable()) == [row[0][0]]
    assert records(["at"], row, unknown)[0].at == row[0][0]
    assert records(["at"], row, Model)[0].at == dt.datetime(2024, 1, 1, 10)
    with pytest.raises(TypeError):  # the class's own error, as it was raised
        records(["nothing"], row, Named)


def test_plain_classes_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a class wants is found out once; one without such fields is made as ever, with no look at any value."""
    from database.engine import records as module

    @dataclass
    class Plain:
        a: int
        b: str

    class Untouchable:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("looked at")

    looked: list[Any] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda kind: looked.append(kind) or read(kind))
    value = Untouchable()
    for _ in range(3):
        made = records(["a", "b"], [(value, "x")] * 10, Plain)
    assert looked == [Plain]
    assert made[9].__dict__["a"] is value
