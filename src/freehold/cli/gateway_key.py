"""`freehold gateway key`: keys that are made by command, and kept in the database as hashes."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from freehold.cli.gateway_store import CONFIG, ConfigOption, JsonOption, actor, utc, with_store
from freehold.errors import InvalidRequest

if TYPE_CHECKING:
    from freehold.gateway.config import Settings
    from freehold.gateway.keeping.store import Store

Name = Annotated[str, typer.Argument(metavar="NAME", help="What the ledger calls it.", show_default=False)]


def key() -> None:
    """Keys of the gateway: make, list, revoke."""


def key_new(
    name: Name,
    config: ConfigOption = CONFIG,
    team: Annotated[str, typer.Option(help="Of the settings; its budget counts too.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="chat, completions, responses, messages, embeddings, feedback [all].")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="An alias it may use [all].")] = None,
    data_class: Annotated[str, typer.Option(help="Class of the data in its prompts.")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(show_default=False)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(show_default=False)] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Calls at once.", show_default=False)] = None,
    budget_per_day: Annotated[float | None, typer.Option(help="USD a UTC day.", show_default=False)] = None,
    expires_in_days: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
) -> None:
    """Make a key and show it, once."""
    from freehold.gateway.access.keys import SCOPES, check_record, digest_of, micro_dollars, new_token
    from freehold.gateway.keeping.records import DAY_SECONDS, KeyRecord

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}", name):
        raise InvalidRequest("a name has letters, digits and . _ : / @ -, and begins with a letter or digit")
    now, token = time.time(), new_token()
    record = KeyRecord(
        key_id=name,
        digest=digest_of(token),
        team=team,
        scopes=tuple(scope or SCOPES),
        models=tuple(model or ()),
        data_class=data_class,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        budget_per_day=micro_dollars(budget_per_day),
        created_at=now,
        expires_at=None if expires_in_days is None else now + expires_in_days * DAY_SECONDS,
    )

    async def add(store: Store, settings: Settings) -> bool:
        await store.add_key(check_record(record, settings), actor())
        return settings.store.kind == "postgres"

    shared = with_store(config, add)
    typer.echo(token)
    typer.echo(f"Key {name!r}: this is the only time it is shown; the gateway keeps its hash.", err=True)
    if shared:
        late = (
            "Running gateways know it within a second. One that had no keys lets programs of its machine in till then."
        )
        typer.echo(late, err=True)


def key_list(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """All keys made by command, and what they may do."""
    import msgspec

    from freehold.gateway.access.budget import dollars

    async def listed(store: Store, settings: Settings) -> list[dict[str, object]]:
        found = [msgspec.to_builtins(record) for record in await store.keys()]
        return [{name: value for name, value in record.items() if name != "digest"} for record in found]

    records = with_store(config, listed)
    if as_json:
        typer.echo(json.dumps(records, indent=2))
        return
    if not records:
        typer.echo("No key was made by command.")
    for record in records:
        state = "revoked " + utc(record["revoked_at"]) if "revoked_at" in record else "valid"  # type: ignore[arg-type]
        if "expires_at" in record and "revoked_at" not in record:
            expires = float(record["expires_at"])  # type: ignore[arg-type]
            state = f"{'expired' if expires <= time.time() else 'expires'} {utc(expires)}"
        limits = []
        for name, value in record.items():
            if name in ("team", "data_class", "requests_per_minute", "tokens_per_minute", "max_concurrent"):
                limits.append(f"{name} {value}")
            elif name == "budget_per_day":
                limits.append(f"{dollars(int(value))} a day")  # type: ignore[call-overload]
            elif name in ("scopes", "models"):
                limits.append(f"{name} {', '.join(value)}")  # type: ignore[arg-type]
        typer.echo(f"{record['key_id']}: {state}; {'; '.join(limits)}")


def key_revoke(name: Name, config: ConfigOption = CONFIG) -> None:
    """Revoke a key: within a second it opens nothing."""

    async def revoke(store: Store, settings: Settings) -> None:
        if name in settings.keys:
            raise InvalidRequest(f"key {name!r} is one of the settings: take it out there")
        await store.revoke_key(name, actor())

    with_store(config, revoke)
    typer.echo(f"revoked {name}")
