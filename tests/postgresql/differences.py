"""What differs from the contract on PostgreSQL, by the contract's test. Each reason is a row of the table in
docs/guides/postgresql.md, and `differences_test.py` holds what is true instead.
"""

from __future__ import annotations

from typing import Any

import pytest

WRITERS = "writers"
LOCKS = "locks"
FILES = "files"
BACKUP = "backup"
RAW = "raw"
VALUES = "values"
SYNTAX = "syntax"
GROUPS = "groups"

DIFFERENCES: dict[str, str] = {
    # Several writers at once: nobody waits for "the writer", and nothing is lost only if the transaction sees to it.
    "test_a_read_first_takes_the_write_lock_too": LOCKS,
    "test_no_update_is_lost": LOCKS,
    "test_transfers": LOCKS,
    "test_requires_new_where_it_could_only_deadlock": WRITERS,
    "test_detached_write_within_ones_own_write_transaction": WRITERS,
    "test_an_autocommit_write_waits_for_the_open_transaction": WRITERS,
    "test_readonly_neither_waits_for_the_writer_nor_holds_it_up": WRITERS,
    "test_which_unit_of_work_held_the_writer": WRITERS,
    "test_writes_at_once_share_commits": GROUPS,
    # There is no file.
    "test_a_directory_as_path": FILES,
    "test_a_file_as_parent_folder": FILES,
    "test_a_file_that_is_no_database": FILES,
    "test_it_can_be_opened_later": FILES,
    "test_a_scribbled_file": FILES,
    "test_an_orderly_close_leaves_no_wal": FILES,
    "test_configure_while_open": FILES,
    "test_console": FILES,
    "test_memory": FILES,
    "test_odd_paths": FILES,
    "test_silent_until_configured": FILES,
    "test_backup_is_a_complete_copy": BACKUP,
    "test_backup_while_others_write": BACKUP,
    "test_backup_during_an_open_transaction": BACKUP,
    "test_backup_whose_progress_fails": BACKUP,
    "test_backup_of_memory": BACKUP,
    # The driver's own connection is another one.
    "test_run_in_one_transaction_on_another_thread": RAW,
    "test_read_ahead_is_bounded": RAW,
    "test_readonly_refuses_on_the_raw_connection": RAW,
    # Types are real here, and SQL is PostgreSQL's.
    "test_values_survive": VALUES,
    "test_wrong_parameters[too-large]": VALUES,
    "test_execute_script": SYNTAX,
    "test_readonly_refuses_every_write": SYNTAX,
    "test_statement_that_rolls_back_the_transaction[or-rollback]": SYNTAX,
}

ONE_CONNECTION = frozenset(
    [
        "test_a_cancelled_waiter_leaves_the_queue",
        "test_close_tells_those_who_wait",
        "test_who_held_the_writer",
        "test_single_writes_and_transactions_share_one_line",
        "test_writers_are_served_in_their_order",
    ]
)
"""Tests of the order in which a single writer is given away; on PostgreSQL they run with one connection."""


def _name(item: Any) -> str:
    return str(getattr(item, "originalname", item.name))


def differs(item: pytest.Item) -> bool:
    """Whether this is a contract test of a behaviour that PostgreSQL does not have."""
    callspec = getattr(item, "callspec", None)
    if callspec is None or callspec.params.get("engine") != "postgresql":
        return False
    if item.path.parent.name not in ("contract", "postgresql"):
        return True  # the other modules are about SQLite
    name = _name(item)
    return name in DIFFERENCES or any(
        key.startswith(f"{name}[") and callspec.id.endswith(key[len(name) + 1 : -1]) for key in DIFFERENCES
    )


def needs_one_connection(item: pytest.Item) -> bool:
    """Whether this test means the one writer."""
    return _name(item) in ONE_CONNECTION
