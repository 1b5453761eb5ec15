"""What a canary tells: the share that the router gives, and the record of each thing that happened.

Records are JSON, one a line; floats are written in full, so that a replayed record is the same bytes.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

State: TypeAlias = Literal["aa", "ramping", "hold", "promoted", "rolled_back", "inconclusive"]
Command: TypeAlias = Literal["pause", "resume", "force", "abort"]
COMMANDS: tuple[Command, ...] = ("pause", "resume", "force", "abort")
OVER: frozenset[State] = frozenset(("promoted", "rolled_back"))


class Plan(msgspec.Struct, frozen=True):
    """What the router does now: the canary's share of the units, and whether it is served by the control (A/A)."""

    state: State
    share: float
    aa: bool = False

    @property
    def band(self) -> None:
        """Nothing to agree about: the only gateway knows all conversations."""
        return None


class Seen(msgspec.Struct, frozen=True):
    """A guardrail in a record; effects as `guardrails.Finding`, None for infinite."""

    metric: str
    margin: float
    control: float
    canary: float
    effect: float
    low: float | None
    high: float | None
    worse: bool
    fine: bool
    detectable: float | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to an experiment: it started, was looked at, or got a command.

    rows, notes: positions in the ledger up to which they had been counted; with them the ledger gives the same record
    again.
    """

    experiment: str
    number: int
    at: float
    kind: Literal["start", "look", "command"]
    rows: int
    notes: int
    state: State
    step: int
    share: float
    aa: bool = False
    reason: str = ""
    changed: bool = False  # of state or step: a decision
    command: str = ""
    by: str = ""
    settings: str = ""  # of a start: the experiment's, as JSON
    requests: tuple[int, int] = (0, 0)  # of this step: control, canary
    units: tuple[int, int] = (0, 0)
    guardrails: tuple[Seen, ...] = ()

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes | str) -> Record:
        """Raises msgspec.DecodeError."""
        return msgspec.json.decode(data, type=cls)
