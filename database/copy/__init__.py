"""Moving house: copies tables from one configured database to another, whatever their engines.

    python -m database.copy sqlite:default postgresql:default

The target's tables must be there already (its `init_sql`, a migration), with the columns of the source's. Rows are read in
the order of the primary key and written chunk by chunk, each chunk in one transaction together with a note of how far the
copy has come: interrupted at any moment, it goes on from there when it is started again. A table without a primary key is
copied as one chunk. In the end both sides are read once more and compared, value by value, in an order of no importance.

The copy is no replication. What is written to the source meanwhile is missing, and the comparison says so: stop the
writers for the last run, which only has to copy what is new.

    work.py      the tables, their order, the chunks, the comparison
    columns.py   how values travel, and what makes two of them the same
    command.py   the command line
"""

from __future__ import annotations

from database.copy.command import find as find
from database.copy.command import main
from database.copy.work import Report, Table, copy

__all__ = ["Report", "Table", "copy", "main"]
