"""Texts are kept only when asked for, only redacted, and not at all if that fails."""

from __future__ import annotations

import logging
import re

import pytest

from freehold.errors import ConfigError
from freehold.gateway.call import Caller, Decision, Request
from freehold.gateway.identity import Hasher
from freehold.gateway.keeping.erasure import forget_everyone, forget_person
from freehold.gateway.keeping.store import Store
from freehold.gateway.keeping.texts import TextKeeper
from tests.unit.gateway.ledger_rows import NOON, row
from tests.unit.gateway.settings_text import settings

REQUEST = Request("r", NOON, "chat", Caller("k"), "glm", b'{"mail":"ann@example.org"}')
NONE = Decision(())


def without_mail(text: str) -> str:
    return re.sub(r"[\w.]+@[\w.]+", "[mail]", text)


def failing(text: str) -> str:
    raise ValueError(f"cannot redact {text}")


def silent(text: str) -> None:
    return None


def keeper(store: Store, share: float, redact: str = "") -> TextKeeper:
    return TextKeeper(
        settings(f'[gateway]\nsample_prompts = {share}\nredact = "{redact}"\n'), store, chance=lambda: 0.4
    )


async def test_a_share_of_the_texts_is_kept_redacted(store: Store) -> None:
    assert not keeper(store, 0.0).wants(REQUEST, NONE)
    assert not keeper(store, 0.4).wants(REQUEST, NONE)
    redacting = keeper(store, 0.5, f"{__name__}:without_mail")
    assert redacting.wants(REQUEST, NONE)
    redacting.take(REQUEST, row(row_id="1"), "write to bob@example.org")
    await store.flush()
    assert await store.fetch("SELECT * FROM texts") == [("1", NOON, '{"mail":"[mail]"}', "write to [mail]")]


@pytest.mark.parametrize("hook", ["failing", "silent"])
async def test_what_cannot_be_redacted_is_not_kept(store: Store, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        keeper(store, 1.0, f"{__name__}:{hook}").take(REQUEST, row(), "answer")
    await store.flush()
    assert await store.fetch("SELECT * FROM texts") == []
    assert "not kept" in caplog.text
    assert "ann@example.org" not in caplog.text


@pytest.mark.parametrize("hook", ["nowhere:f", "re:nothing", "re", "math:pi"])
async def test_a_hook_that_is_not_there_is_an_error(store: Store, hook: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.redact"):
        keeper(store, 1.0, hook)


async def test_people_are_forgotten_by_the_id_that_requests_have(store: Store) -> None:
    hasher = Hasher(await store.secret("identity"))
    mine = [("team", "k"), ("", "k2")]
    for team, key in mine:
        store.append(row(team=team, key_id=key, user=hasher("user", team or key, "ann"), unit="u"))
    store.append(row(team="team", user=hasher("user", "team", "bob")))
    await store.flush()
    assert await forget_person(store, "ann", "me") == 2
    assert await forget_person(store, "ann", "me") == 0
    assert len({each.user async for each in store.rows()} - {""}) == 1
    await forget_everyone(store, "me")
    assert await forget_person(store, "bob", "me") == 0
    assert [each.kind for each in await store.audit()] == ["forget.user", "forget.user", "forget.everyone"]
