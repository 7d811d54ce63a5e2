"""A state machine of hypothesis drives the public API with several tasks and databases against a simple model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from database import transactional
from database.sqlite3 import close_all, configure, errors, get_db  # type: ignore[attr-defined]
from tests.robustness.faults import FAULTS, Fault, faulty
from tests.robustness.support import FIGURES

EXAMPLES = int(os.environ.get("STATEFUL_EXAMPLES", "25"))
"""Runs of the machine for each event loop; more by the environment variable."""
