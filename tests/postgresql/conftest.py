"""Fixtures for what only PostgreSQL has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.support import Engine
from tests.postgresql.proxy import Proxy
from tests.postgresql.server import shared


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """PostgreSQL alone."""
    from tests.conftest import alone

    with alone("postgresql", tmp_path) as engine:
        yield engine


@pytest.fixture
def proxy(engine: Engine) -> Iterator[Proxy]:
    """Between the pool and the server."""
    proxy = Proxy(shared())
    yield proxy
    proxy.close()
