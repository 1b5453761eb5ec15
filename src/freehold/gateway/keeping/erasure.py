"""Forgetting people: one, by blanking the pseudonyms of their rows; or all, by destroying what made the pseudonyms."""

from __future__ import annotations

from freehold.gateway.identity import Hasher
from freehold.gateway.keeping.store import Store

IDENTITY = "identity"
"""The secret that pseudonyms are made with."""


async def forget_person(store: Store, user: str, actor: str) -> int:
    """Blank what rows say about a person. user: their id as requests have it. Returns how many rows there were.

    A person has another pseudonym for each team, or key without a team: all that the ledger knows are tried.
    """
    hasher = Hasher(await store.secret(IDENTITY))
    owners = await store.fetch("""SELECT DISTINCT team, key_id FROM calls WHERE "user" <> ''""")
    names = {hasher("user", team or key_id, user) for team, key_id in owners}
    return sum([await store.forget_user(name, actor) for name in sorted(names)])


async def forget_everyone(store: Store, actor: str) -> None:
    """Destroy the secret. No pseudonym in the ledger leads back to anybody, and no new one is like an old one:
    conversations and users are assigned to arms anew, so do it between experiments."""
    await store.forget_secret(IDENTITY)
    await store.record("forget.everyone", "", {}, actor)
