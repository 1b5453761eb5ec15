"""Upstreams and gateways that stop with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_gateway import LiveGateway
from tests.scripted_upstream import Reply, Scripted, fine


@pytest.fixture
def upstream() -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(reply: Reply = fine) -> Scripted:
        started.append(Scripted(reply))
        return started[-1]

    yield start
    for scripted in started:
        scripted.stop()


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[..., LiveGateway]]:
    """Starts gateways; at the end none may have a task left."""
    started: list[LiveGateway] = []

    def start(config: str, **options: Any) -> LiveGateway:
        started.append(LiveGateway(config, tmp_path, **options))
        return started[-1]

    yield start
    for live in started:
        live.wait(live.is_idle)
        live.stop()
