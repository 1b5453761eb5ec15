"""Who is let in, who is not, and what cannot be a key at all."""

from __future__ import annotations

import hmac
import time

import pytest

from freehold.errors import ConfigError, InvalidRequest
from freehold.gateway.access import keys as keys_module
from freehold.gateway.access.keys import ANYBODY, SCOPES, Keys, check_admin_key, check_record, digest_of, new_token
from freehold.gateway.keeping.records import KeyRecord
from freehold.gateway.keeping.store import Store
from tests.unit.gateway.settings_text import settings

TOKEN, OTHER = new_token(), new_token()
CONFIGURED = f"""
[keys.app]
sha256 = "{digest_of(TOKEN)}"
team = "search"
models = ["glm"]
budget_per_day = 2.5
requests_per_minute = 60
"""
MADE = KeyRecord(key_id="made", digest=digest_of(OTHER), team="search", scopes=("chat",), budget_per_day=7)


def test_keys_of_the_settings_and_made_ones_open_the_door() -> None:
    keys = Keys(settings(CONFIGURED), [MADE])
    app, made = keys.authenticate(TOKEN), keys.authenticate(OTHER)
    assert app is not None
    assert made is not None
    assert (app.key_id, app.team, app.models, app.budget_per_day) == ("app", "search", frozenset({"glm"}), 2_500_000)
    assert (app.scopes, app.requests_per_minute, app.team_budget_per_day) == (frozenset(SCOPES), 60, 500_000)
    assert (made.key_id, made.scopes, made.budget_per_day) == ("made", frozenset({"chat"}), 7)
    assert "admin" not in app.scopes | made.scopes
    for wrong in ("", "fh-", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é", "\udcff", digest_of(TOKEN)):
        assert keys.authenticate(wrong) is None, wrong


def test_tokens_are_long_random_and_unlike() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) == 46 and token.startswith("fh-") for token in tokens)


def test_without_keys_anybody_is_let_in_until_there_is_one() -> None:
    keys = Keys(settings())
    assert keys.authenticate("") is keys.authenticate("EMPTY") is ANYBODY
    keys.replace([MADE])
    assert keys.required
    assert keys.authenticate("") is None
    # Revoking the last one does not open the door to everybody.
    keys.replace([KeyRecord(key_id="made", digest=digest_of(OTHER), revoked_at=1.0)])
    assert keys.authenticate(OTHER) is keys.authenticate("") is None


def test_a_name_that_is_taken_does_not_keep_others_from_being_revoked() -> None:
    digest = digest_of("fh-of-the-settings-0123456789")
    keys = Keys(settings(f'[keys.taken]\nsha256 = "{digest}"\n'), [MADE])
    assert keys.authenticate(OTHER)
    taken = KeyRecord(key_id="taken", digest=digest_of("fh-made-by-command-0123456789"))
    keys.replace([taken, KeyRecord(key_id="made", digest=digest_of(OTHER), revoked_at=1.0)])
    assert keys.authenticate(OTHER) is keys.authenticate("fh-made-by-command-0123456789") is None
    assert keys.authenticate("fh-of-the-settings-0123456789")


def test_a_key_expires() -> None:
    now = 100.0
    record = KeyRecord(key_id="made", digest=digest_of(OTHER), expires_at=200.0)
    keys = Keys(settings(), [record], clock=lambda: now)
    assert keys.authenticate(OTHER)
    now = 200.0
    assert keys.authenticate(OTHER) is None


def test_digests_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    keys = Keys(settings(CONFIGURED))
    assert keys.authenticate(TOKEN)
    assert compared == [bytes.fromhex(digest_of(TOKEN))]
    # Where in the table a digest stands is another in each process, and nothing that a caller can steer.
    assert set(keys._known) != set(Keys(settings(CONFIGURED))._known)


@pytest.mark.parametrize("weak", ["", "sk-1234", "EMPTY", "changeme", "test"])
def test_well_known_keys_are_refused(weak: str) -> None:
    with pytest.raises(ConfigError, match="well-known"):
        Keys(settings(f'[keys.app]\nsha256 = "{digest_of(weak)}"\n'))


@pytest.mark.parametrize("weak", ["", "admin", "sk-1234", "short", "a" * 40, " changeme "])
def test_an_admin_key_that_can_be_guessed_is_refused(weak: str) -> None:
    with pytest.raises(ConfigError, match="guessable"):
        check_admin_key(weak, "gateway.admin_key_env")


def test_an_admin_key_is_stripped() -> None:
    assert check_admin_key(f"{TOKEN}\n", "x") == TOKEN


def test_a_reload_that_cannot_be_changes_nothing() -> None:
    keys = Keys(settings(CONFIGURED), [MADE])
    for bad in (
        CONFIGURED.replace("[keys.app]", "[keys.made]"),
        CONFIGURED + CONFIGURED.replace("[keys.app]", "[keys.again]"),
    ):
        with pytest.raises(ConfigError):
            keys.configure(settings(bad))
        assert keys.authenticate(TOKEN)
    keys.configure(settings())
    assert keys.authenticate(TOKEN) is None
    assert keys.authenticate(OTHER)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_id": "app"},
        {"team": "none"},
        {"models": ("none",)},
        {"scopes": ("admin",)},
        {"requests_per_minute": 0},
        {"budget_per_day": -1},
    ],
)
def test_a_record_must_fit_the_settings(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"key_id": "new", "digest": "", **wrong}
    with pytest.raises(InvalidRequest):
        check_record(KeyRecord(**fields), settings(CONFIGURED))  # type: ignore[arg-type]


async def test_a_key_made_elsewhere_works_soon(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(settings())
    await keys.follow(store)
    await store.add_key(MADE, "me")
    await store._look_for_changes()
    assert keys.authenticate(OTHER)
    await store.revoke_key("made", "me")
    await store._look_for_changes()
    assert keys.authenticate(OTHER) is None


def test_telling_whose_key_it_is_takes_microseconds() -> None:
    keys = Keys(settings(CONFIGURED))
    started = time.perf_counter()
    for _ in range(1000):
        keys.authenticate(TOKEN)
    assert time.perf_counter() - started < 1.0
