"""Fixtures of the engine's tests."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator

import pytest

from freehold.engine.async_engine import AsyncEngine
from tests.gated_engine import Gate, make


@pytest.fixture
async def running() -> AsyncIterator[tuple[AsyncEngine, Gate]]:
    before = set(threading.enumerate())  # a server that other tests share may be running
    engine, gate = make()
    await engine.start()
    yield engine, gate
    gate.open.set()
    await engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "freehold-engine" and thread not in before]
