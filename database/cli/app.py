"""The commands: their names, options and help. What they do stands in the module of their name.

Another command: a function here, with `@app.command()` and `@guarded`, which imports its module when it is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, cast

import typer

from database.cli.support import Status, Target, guarded, speak

__all__ = ["app", "run"]

_EPILOG = (
    "Exit status: 0 done; 1 failed, or check found a fault; 2 wrong arguments or configuration; 130 interrupted;"
    " 141 the reader of the output has gone."
)

app = typer.Typer(
    name="python -m database",
    help="Looks after databases: the configured ones, or with --path any SQLite file.\n\n"
    "The configuration is config/database.yaml, the file that DATABASE_CONFIG names, or --config.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; gives the exit status."""
    speak()
    try:
        app(None if arguments is None else list(arguments))
    except SystemExit as end:
        code = end.code
        return 0 if code is None else code if isinstance(code, int) else Status.FAILED
    return Status.DONE


Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="FILE", help="The configuration, in place of config/database.yaml."),
]
Db = Annotated[
    str,
    typer.Option(
        "--db",
        "-d",
        metavar="NAME",
        help="The database's name in the configuration; sqlite:NAME or postgresql:NAME where both have one.",
    ),
]
MaybeDb = Annotated[
    str | None,
    typer.Option(
        "--db",
        "-d",
        metavar="NAME",
        help="Only this database of the configuration; sqlite:NAME or postgresql:NAME where both have one.",
    ),
]
Path = Annotated[
    str | None, typer.Option("--path", "-p", metavar="FILE", help="An SQLite file, in place of a configuration.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


def _show_version(value: bool) -> None:
    if not value:
        return
    import sqlite3  # noqa: PLC0415  - only here

    try:
        own = version("jobu-database")
    except PackageNotFoundError:  # run from a directory, not installed
        own = "(not installed)"
    print(f"jobu-database {own}, SQLite {sqlite3.sqlite_version}")
    raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]  - typer calls it
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Versions of this package and of SQLite.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def check(
    config: Config = None,
    db: MaybeDb = None,
    path: Path = None,
    quick: Annotated[bool, typer.Option("--quick", help="Does not compare indexes with their tables.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as faults.")] = False,
    json: Json = False,
) -> None:
    """Looks databases over: a verdict, and an exit status.

    SQLite: opens each with the configured PRAGMAs and reads them back; integrity, foreign keys, the version and its known
    bugs, WAL size, free space, file rights. PostgreSQL: version, role, encryption, settings, replicas, bloat, transactions,
    indexes, sequences. Pending migrations. Changes nothing.

    Example: `python -m database check --quick --json`
    """
    from database.cli.check import check  # noqa: PLC0415

    check(Target(config, db or "default", path), every=db is None, quick=quick, strict=strict, as_json=json)


@app.command()
@guarded
def stats(
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    count: Annotated[bool, typer.Option("--count/--no-count", help="Count the rows of each table.")] = True,
    json: Json = False,
) -> None:
    """A database in figures: size, and each table's rows and bytes.

    What the pools of running processes do is shown by `top`.
    """
    from database.cli.stats import stats  # noqa: PLC0415

    stats(Target(config, db, path), count=count, as_json=json)


@app.command()
@guarded
def top(
    config: Config = None,
    db: MaybeDb = None,
    folder: Annotated[
        str | None,
        typer.Option("--monitor", metavar="FOLDER", help="The folder of sockets, in place of the configured one."),
    ] = None,
    interval: Annotated[float, typer.Option("--interval", "-n", min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One look, then end.")] = False,
    json: Json = False,
) -> None:
    """Live view of the pools of running processes, and of PostgreSQL's sessions: who blocks whom; q or Ctrl-C ends it.

    Processes offer theirs where the setting `monitor` names a folder. It costs them nothing until somebody looks, and
    works while their event loop is busy.
    """
    from database.cli.top import top  # noqa: PLC0415

    top(Target(config, db or "default"), db, folder=folder, interval=interval, once=once or json, as_json=json)


@app.command()
@guarded
def init(config: Config = None, db: MaybeDb = None, json: Json = False) -> None:
    """Creates the configured databases: files, `init_sql`, then migrations if there are any.

    Harmless where a database exists: `init_sql` may run any number of times, and a migration runs once.
    """
    from database.cli.schema import init  # noqa: PLC0415

    init(Target(config, db or "default"), every=db is None, as_json=json)


@app.command()
@guarded
def migrate(
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    folder: Annotated[
        str | None, typer.Option("--folder", metavar="FOLDER", help="The migrations, in place of the configured ones.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Applies everything in one transaction and rolls it back.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Shows where the database stands; status 1 if anything is pending.")
    ] = False,
    to: Annotated[int | None, typer.Option("--to", metavar="NUMBER", help="The last migration to apply.")] = None,
    baseline: Annotated[
        int | None,
        typer.Option(
            "--baseline",
            metavar="NUMBER",
            help="Records migrations up to this one as applied, without running them: for a database that was there first.",
        ),
    ] = None,
    backup: Annotated[
        str | None, typer.Option("--backup", metavar="FILE", help="Makes a backup first, if anything is pending.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for other processes.")
    ] = 60,
    json: Json = False,
) -> None:
    """Applies pending migrations: numbered SQL files, each in a transaction of its own.

    Example: `python -m database migrate --dry-run`
    """
    from database.cli.schema import migrate  # noqa: PLC0415

    migrate(
        Target(config, db, path),
        folder,
        dry_run=dry_run,
        check=check,
        to=to,
        baseline=baseline,
        backup=backup,
        wait=wait,
        as_json=json,
    )


@app.command()
@guarded
def backup(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The copy: a file, or a folder for one named by date.")
    ],
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of the copy: quick_check, or pg_restore.")] = False,
    json: Json = False,
) -> None:
    """Copies a database as it is at one moment, while others read and write; PostgreSQL's by pg_dump.

    The copy appears under its name when it is complete, never before.

    Example: `python -m database backup backups/`
    """
    from database.cli.backup import backup  # noqa: PLC0415

    backup(Target(config, db, path), target, force=force, verify=verify, as_json=json)


@app.command(name="import")
@guarded
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .csv or .jsonl file; - is standard input.")],
    table: Annotated[str, typer.Argument(metavar="TABLE", help="Where the rows go.")],
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl", help="In place of the file's ending.")
    ] = None,
    create: Annotated[
        bool, typer.Option("--create", help="Create the table, with types that change no value.")
    ] = False,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="A,B,…", help="Names of the columns: the CSV file has no header.")
    ] = None,
    null: Annotated[
        str, typer.Option("--null", metavar="TEXT", help="The CSV field that means NULL; default: an empty one.")
    ] = "",
    delimiter: Annotated[str, typer.Option("--delimiter", metavar="CHAR", help="Between CSV fields.")] = ",",
    encoding: Annotated[str, typer.Option("--encoding", help="Of the file.")] = "utf-8-sig",
    conflict: Annotated[
        str, typer.Option("--on-conflict", metavar="fail|ignore|replace", help="When a row is there already.")
    ] = "fail",
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="ROWS", min=1, help="Commit every so many rows; default: all or nothing."),
    ] = None,
    json: Json = False,
) -> None:
    """Reads a CSV or JSONL file into a table: all of it, or with --batch as far as it went.

    Values are stored as their column's type says, NULL is an empty CSV field or JSON null.

    Example: `python -m database import people.csv people --create`
    """
    from database.cli.imports import import_file  # noqa: PLC0415
    from database.cli.records import Reading  # noqa: PLC0415
    from database.cli.support import utf8  # noqa: PLC0415

    names = None if columns is None else [name.strip() for name in utf8(columns).split(",")]
    reading = Reading(file, format, null, delimiter, encoding, names)
    import_file(Target(config, db, path), reading, table, create=create, conflict=conflict, batch=batch, as_json=json)


@app.command()
@guarded
def export(
    query: Annotated[str, typer.Argument(metavar="QUERY|TABLE", help="A SELECT, or the name of a table.")],
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to; - is standard output.")
    ] = "-",
    format: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl", help="In place of the output's ending; else csv.")
    ] = None,
    null: Annotated[
        str, typer.Option("--null", metavar="TEXT", help="What CSV shows for NULL; default: nothing.")
    ] = "",
    delimiter: Annotated[str, typer.Option("--delimiter", metavar="CHAR", help="Between CSV fields.")] = ",",
    param: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="A value for :NAME in the query; repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Writes the rows of a query as CSV or JSONL, as they come: one snapshot, however many rows.

    Example: `python -m database export "SELECT * FROM jobs WHERE enabled = :on" --param on=1 -o jobs.jsonl`
    """
    from database.cli.exports import Writing, export_query  # noqa: PLC0415

    export_query(Target(config, db, path), query, param or [], Writing(output, format, null, delimiter, force))


@app.command()
@guarded
def shell(
    config: Config = None,
    db: Db = "default",
    path: Path = None,
    readonly: Annotated[bool, typer.Option("--readonly", "-r", help="Refuse everything that writes.")] = False,
    command: Annotated[
        list[str] | None, typer.Option("--command", metavar="SQL", help="Run this and end; repeatable.")
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="table|line|csv|json", help="How rows are shown.")] = "table",
) -> None:
    """SQL, line by line: editing, history, completion, tables; `.help` tells the rest.

    Without a terminal it reads statements from standard input, and ends with status 1 at the first that fails.
    """
    from database.cli.shell import shell  # noqa: PLC0415

    shell(Target(config, db, path), readonly=readonly, commands=command or [], mode=mode)


@app.command()
@guarded
def bench(
    config: Config = None,
    db: Db = "default",
    folder: Annotated[
        str | None,
        typer.Option(
            "--folder", metavar="FOLDER", help="Where to put the test database; default: beside the configured one."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.05, help="For each workload, contender and round.")
    ] = 0.5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of which the median counts.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this workload or contender; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Measures this disk: this package, plain sqlite3, and whichever peers are installed.

    Takes about a minute, works in a temporary folder that it removes, and leaves your databases alone.
    """
    from database.cli.bench import bench  # noqa: PLC0415

    bench(Target(config, db), folder=folder, seconds=seconds, rounds=rounds, only=only or [], as_json=json)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@guarded
def stubs(context: typer.Context) -> None:
    """Writes typed stubs for a folder of query files; `stubs --help` tells the rest."""
    from database.stubs import main  # noqa: PLC0415

    raise typer.Exit(main(context.args))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
@guarded
def copy(context: typer.Context) -> None:
    """Copies tables from one engine to the other: `copy sqlite:default postgresql:default`; `copy --help` tells the rest."""
    from database.copy import main  # noqa: PLC0415

    raise typer.Exit(main(context.args))


# pyright sees no use of what only typer calls.
_ = cast("object", (check, stats, top, init, migrate, backup, import_, export, shell, bench, stubs, copy))
