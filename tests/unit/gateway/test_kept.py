"""A gateway's database and what lives on it, opened together."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from freehold.errors import ConfigError
from freehold.gateway.access.keys import digest_of, new_token
from freehold.gateway.config import Settings
from freehold.gateway.keeping.kept import has_keys, open_kept
from freehold.gateway.keeping.records import KeyRecord
from freehold.gateway.keeping.store import open_store
from tests.unit.gateway.settings_text import settings


def kept_in(folder: Path, more: str = "") -> Settings:
    return settings(f'[gateway]\ndata_dir = "{folder}"\n{more}')


async def test_all_of_it_works_and_a_second_gateway_is_refused(tmp_path: Path) -> None:
    kept = await open_kept(kept_in(tmp_path))
    await kept.store.start()  # the server does so too
    assert kept.identity == (tmp_path / "identity.key").read_bytes()
    assert [entry.kind for entry in await kept.store.audit()] == ["config.start"]
    with pytest.raises(ConfigError, match="another gateway"):
        await open_kept(kept_in(tmp_path))
    await kept.store.stop()
    again = await open_kept(kept_in(tmp_path))
    assert again.identity == kept.identity
    await again.store.stop()


async def test_what_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "identity.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        await open_kept(kept_in(tmp_path))
    (tmp_path / "identity.key").unlink()
    kept = await open_kept(kept_in(tmp_path))
    await kept.store.stop()


def test_a_key_made_by_command_is_a_key(tmp_path: Path) -> None:
    assert not has_keys(kept_in(tmp_path))
    assert has_keys(kept_in(tmp_path, f'[keys.a]\nsha256 = "{digest_of(new_token())}"\n'))

    async def make() -> None:
        store = open_store(kept_in(tmp_path))
        await store.start()
        await store.add_key(KeyRecord(key_id="a", digest=digest_of(new_token())), "me")
        await store.stop()

    asyncio.run(make())
    assert has_keys(kept_in(tmp_path))


@pytest.mark.parametrize(
    ("store", "wrong"),
    [('kind = "postgres"', "name the environment"), ('dsn_env = "NO_SUCH"\nkind = "postgres"', "NO_SUCH")],
)
def test_postgres_needs_its_address(tmp_path: Path, store: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        open_store(kept_in(tmp_path, f"[store]\n{store}\n"))


async def test_two_gateways_share_a_database(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER", database)
    gateways = [
        await open_kept(kept_in(tmp_path / name, '[store]\nkind = "postgres"\ndsn_env = "LEDGER"\n')) for name in "ab"
    ]
    assert gateways[0].identity == gateways[1].identity
    for kept in gateways:
        await kept.store.stop()


async def test_a_postgres_that_is_not_there_is_a_settings_error_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("asyncpg", reason="needs asyncpg, the extra `postgres`")
    monkeypatch.setenv("LEDGER", "postgresql://me:hunter2@127.0.0.1:1/none")
    with pytest.raises(ConfigError, match="PostgreSQL") as error:
        await open_kept(kept_in(tmp_path, '[store]\nkind = "postgres"\ndsn_env = "LEDGER"\n'))
    assert "hunter2" not in str(error.value)
