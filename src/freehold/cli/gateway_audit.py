"""`freehold gateway audit`: the log of changes, and whether it is whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli.gateway_store import CONFIG, ConfigOption, JsonOption, utc, with_store
from freehold.errors import FreeholdError

if TYPE_CHECKING:
    from freehold.gateway.config import Settings
    from freehold.gateway.keeping.records import Entry
    from freehold.gateway.keeping.store import Store


def audit() -> None:
    """The log of changes to settings, keys and experiments."""


def audit_verify(
    config: ConfigOption = CONFIG,
    head: Annotated[
        str, typer.Option(metavar="HASH", help="A hash shown before, which must still be in it.", show_default=False)
    ] = "",
) -> None:
    """Check that nobody changed the log."""
    from freehold.gateway.keeping.audit import START, fault_of

    entries = _entries(config)
    fault = fault_of(entries, head)
    if fault:
        raise FreeholdError(f"the audit log was tampered with: {fault}")
    typer.echo(f"whole: {len(entries)} entries; the last has the hash {entries[-1].hash if entries else START}")


def audit_show(
    config: ConfigOption = CONFIG,
    last: Annotated[int, typer.Option(min=1, help="How many entries.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show the last entries of the log."""
    import msgspec

    entries = _entries(config, last)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(entries), indent=2))
        return
    for entry in entries:
        typer.echo(f"{entry.seq} {utc(entry.at)} {entry.actor} {entry.kind} {entry.subject} {json.dumps(entry.detail)}")


def _entries(config: ConfigOption, last: int | None = None) -> list[Entry]:
    async def read(store: Store, settings: Settings) -> list[Entry]:
        return await store.audit(last)

    return with_store(config, read)
