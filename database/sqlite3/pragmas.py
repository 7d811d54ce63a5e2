"""PRAGMAs of a connection: which the configuration may set, how they are written, and whether they took.

A PRAGMA cannot be given parameters. So a name is an identifier that SQLite knows, and a value a number or a quoted text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from database import errors
from database.engine.statement import quoted

__all__ = ["CIPHER", "CONFIGURABLE", "REFUSED", "Value", "read_back", "write"]

Value = bool | int | str

_OWN = "it has a setting of its own"
_FILE = "it belongs to the file, not to a connection: set it once, in init_sql or a migration"
_ACTION = "it does something once, and is no setting: run it by db.execute()"
_KEY = "a key does not belong in a configuration: key_env or key_file says where it is"
_PACKAGE = "the package depends on it: "
_DEPRECATED = "SQLite keeps it for old programs only"

REFUSED: Mapping[str, str] = {
    **{
        name: f"{_OWN}, `{name}`"
        for name in (
            "busy_timeout", "cache_size", "foreign_keys", "journal_mode", "synchronous", "wal_autocheckpoint",
        )
    },
    "default_cache_size": f"{_OWN}, `cache_size`",
    "locking_mode": f"{_PACKAGE}with an exclusive lock, the readers could not open the file",
    "query_only": f"{_PACKAGE}it says itself which connection may write",
    "writable_schema": f"{_PACKAGE}a statement could damage the schema, also from a read-only transaction",
    "schema_version": f"{_PACKAGE}setting it can damage the database",
    "read_uncommitted": f"{_PACKAGE}a read-only transaction sees what is committed, and nothing else",
    "defer_foreign_keys": "it holds for one transaction only: run it by db.execute() inside that",
    "count_changes": f"{_PACKAGE}statements would give rows that they do not have",
    "empty_result_callbacks": _DEPRECATED,
    "full_column_names": f"{_PACKAGE}the columns of a row would have other names",
    "short_column_names": f"{_PACKAGE}the columns of a row would have other names",
    "legacy_file_format": _DEPRECATED,
    "temp_store_directory": f"it holds for the whole process, and {_DEPRECATED[7:]}",
    "data_store_directory": f"it holds for the whole process, and {_DEPRECATED[7:]}",
    **dict.fromkeys(("application_id", "auto_vacuum", "encoding", "page_size", "user_version"), _FILE),
    **dict.fromkeys(
        (
            "data_version", "collation_list", "compile_options", "database_list", "foreign_key_check", "foreign_key_list",
            "freelist_count", "function_list", "index_info", "index_list", "index_xinfo", "module_list", "page_count",
            "pragma_list", "stats", "table_info", "table_list", "table_xinfo",
        ),
        "it tells something, and sets nothing",
    ),
    **dict.fromkeys(
        (
            "incremental_vacuum", "integrity_check", "optimize", "quick_check", "shrink_memory", "wal_checkpoint",
            "cipher_integrity_check", "cipher_migrate", "cipher_profile",
        ),
        _ACTION,
    ),
    **dict.fromkeys(("key", "hexkey", "textkey", "rekey", "hexrekey", "textrekey"), _KEY),
    "cipher_salt": _KEY,
    "activate_extensions": _KEY,
}  # fmt: skip
"""Those that cannot be set, and why."""

CONFIGURABLE = frozenset(
    [
        "analysis_limit",
        "automatic_index",
        "cache_spill",
        "case_sensitive_like",
        "cell_size_check",
        "checkpoint_fullfsync",
        "fullfsync",
        "hard_heap_limit",
        "ignore_check_constraints",
        "journal_size_limit",
        "legacy_alter_table",
        "max_page_count",
        "mmap_size",
        "recursive_triggers",
        "reverse_unordered_selects",
        "secure_delete",
        "soft_heap_limit",
        "temp_store",
        "threads",
        "trusted_schema",
    ]
)
"""Those that every SQLite has (one that it was built without is found out when it is read back)."""

CIPHER = frozenset(
    [
        "cipher_compatibility",
        "cipher_hmac_algorithm",
        "cipher_kdf_algorithm",
        "cipher_log",
        "cipher_log_level",
        "cipher_log_source",
        "cipher_memory_security",
        "cipher_page_size",
        "cipher_plaintext_header_size",
        "cipher_use_hmac",
        "kdf_iter",
    ]
)
"""SQLCipher's, which must be set between the key and the first look at the file."""

_TRUE = ("1", "on", "true", "yes")
_FALSE = ("0", "off", "false", "no")
_WORDS: Mapping[str, Mapping[str, str]] = {
    "temp_store": {"default": "0", "file": "1", "memory": "2"},
    "secure_delete": {"fast": "2"},
}


def write(name: str, value: Value, schema: str | None = None) -> str:
    """The statement that sets it."""
    if isinstance(value, str):
        text = "'" + value.replace("'", "''") + "'"
    else:
        text = str(int(value))
    return f"PRAGMA {'' if schema is None else quoted(schema) + '.'}{name} = {text}"


def read_back(raw: Any, path: str, name: str, value: Value, schema: str | None = None) -> None:
    """Looks whether a connection has it.

    Raises:
        ConnectionFailedError: It has not.
    """
    shown = name if schema is None else f"{schema}.{name}"
    if name == "case_sensitive_like":  # cannot be asked for; what it does can
        row = raw.execute("SELECT 'a' NOT LIKE 'A'").fetchone()
    else:
        row = raw.execute(f"PRAGMA {'' if schema is None else quoted(schema) + '.'}{name}").fetchone()
    if row is None:
        if name in CIPHER:  # some of which cannot be asked for either
            return
        raise errors.ConnectionFailedError(path, f"PRAGMA {shown} cannot be set: this SQLite was built without it")
    if not _same(name, value, row[0]):
        raise errors.ConnectionFailedError(
            path,
            f"PRAGMA {shown} did not take: it is {row[0]!r} instead of {value!r}; change {name} in the configuration",
        )


def _same(name: str, wanted: Value, found: object) -> bool:
    got = str(found).lower()
    if name == "cache_spill" and got not in _FALSE and (wanted is True or (isinstance(wanted, int) and wanted > 1)):
        return int(got) >= wanted  # it tells from how many pages on: the cache's size at the least
    word = str(int(wanted)) if isinstance(wanted, (bool, int)) else wanted.strip().lower()
    if word == got:
        return True
    word = _WORDS.get(name, {}).get(word, word)
    if word == got:
        return True
    if word in _TRUE:
        return got in _TRUE
    if word in _FALSE:
        return got in _FALSE
    return False
