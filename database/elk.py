"""Log records as JSON of the Elastic Common Schema (extra `elk`), for Elasticsearch, Logstash, Filebeat, or any reader of JSON.

The package's own attributes (see `database.logs`) go where ECS and OpenTelemetry's database conventions have a place
for them (`event.duration`, `event.outcome`, `error.type`, `db.query.text`, …); the rest stands below `database.`. Records
of other loggers are formatted as `ecs_logging` does it.
"""

from __future__ import annotations

import logging
from typing import Any, Final

try:
    from ecs_logging import StdlibFormatter
except ImportError as error:
    raise ImportError("database.elk needs ecs-logging: install the extra `elk` of this package") from error

__all__ = ["EcsFormatter"]

_PLACES: Final = {
    "sql": "db.query.text",
    "operation": "db.operation.name",
    "rows": "db.response.returned_rows",
    "code_name": "db.response.status_code",
    "error": "error.type",
    "database": "database.name",
    "parameters": "database.parameters",
    "transaction": "database.transaction",
    "worker": "database.worker",
    "waited": "database.waited",
    "slow": "database.slow",
    "code": "database.code",
    "outcome": "database.outcome",
    "holder": "database.holder",
    "readonly": "database.readonly",
    "waiting": "database.waiting",
}


class EcsFormatter(StdlibFormatter):
    """Formats a record as one line of JSON.

    Takes the arguments of `ecs_logging.StdlibFormatter`, for example `extra={"service.name": "jobu"}` and
    `exclude_fields=["process", "log.origin", "log.original"]`.
    """

    def format_to_ecs(self, record: logging.LogRecord) -> dict[str, Any]:
        """The record as a nested mapping; override it to add fields or to take some away."""
        if record.name.partition(".")[0] == "database":
            record = _rearranged(record)
        return super().format_to_ecs(record)


def _rearranged(record: logging.LogRecord) -> logging.LogRecord:
    """A copy, for other handlers get the same record."""
    attributes = dict(record.__dict__)
    fields: dict[str, Any] = {"event.kind": "event", "event.category": ["database"], "event.dataset": record.name}
    for name, place in _PLACES.items():
        value = attributes.pop(name, None)
        if value is not None:
            # One type a field, whatever the parameters are, else Elasticsearch refuses the document.
            fields[place] = value if name != "parameters" or isinstance(value, str) else repr(value)
    duration = attributes.pop("duration", None)
    if duration is not None:
        fields["event.duration"] = round(duration * 1e9)  # nanoseconds, says ECS
        fields["event.outcome"] = "failure" if "error.type" in fields else "success"
    elif record.levelno >= logging.ERROR:
        fields["event.outcome"] = "failure"
    return logging.makeLogRecord({**attributes, **fields})
