"""Who asks: keys from the settings and keys made by command, known by their SHA-256 alone.

A key is 32 random bytes, so a plain hash of it cannot be guessed back; keys that people make up are refused where they
can be recognised. Looking one up takes a time that tells nothing about the keys there are: the table is ordered by a
keyed hash whose key is new in each process, and what is found there is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence

from freehold.errors import ConfigError, InvalidRequest
from freehold.gateway.call import Caller
from freehold.gateway.config import Settings
from freehold.gateway.keeping.records import KeyRecord
from freehold.gateway.keeping.store import Store

logger = logging.getLogger("freehold.gateway")

PREFIX = "fh-"
ENDPOINTS = ("chat", "completions", "responses", "messages", "embeddings")
SCOPES = (*ENDPOINTS, "feedback")
MINIMUM = 16  # characters of an admin key

# What examples, other gateways and hurried people use. Any of them, in any case, opens nothing here.
_WELL_KNOWN = (
    "admin api-key api_key apikey bearer change-me changeme default demo dummy empty example fake freehold "
    "freehold-key gateway key letmein master master-key none null openai password placeholder secret sk sk-... "
    "sk-1234 sk-12345 sk-123456 sk-admin sk-default sk-dummy sk-fake sk-freehold sk-key sk-local sk-master "
    "sk-no-key-required sk-proxy sk-secret sk-test sk-xxx sk-xxxx test test-key testing token token-abc123 todo unused "
    "your-api-key your_api_key 123 1234 12345 123456 12345678 123456789 1234567890 abc abc123 qwerty "
    "xxx fh- fh-test fh-1234"
).split()
_WELL_KNOWN_DIGESTS = frozenset(
    hashlib.sha256(word.encode()).hexdigest() for each in ("", *_WELL_KNOWN) for word in (each, each.upper())
)


def new_token() -> str:
    """A key: 256 random bits behind a prefix that scanners for leaked secrets can look for."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(token: str) -> str:
    """What the settings and the database know of a key."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def check_digest(digest: str, name: str) -> None:
    """Raises ConfigError if it is that of a key that everybody knows."""
    if digest in _WELL_KNOWN_DIGESTS:
        raise ConfigError(f"keys.{name}: this is a well-known key, which anybody may try; `freehold gateway key new`")


def check_admin_key(token: str, where: str) -> str:
    """The admin key without surrounding space. Raises ConfigError if it is too easy to guess."""
    token = token.strip()
    known = token.lower() in _WELL_KNOWN or digest_of(token) in _WELL_KNOWN_DIGESTS
    if known or len(token) < MINIMUM or len(set(token)) < MINIMUM // 2:
        raise ConfigError(f"{where}: the admin key is missing or guessable; use 32 random characters")
    return token


class Keys:
    """The keys that are valid now. clock: epoch seconds."""

    def __init__(self, settings: Settings, records: Iterable[KeyRecord] = (), clock: Callable[[], float] = time.time):
        self._clock = clock
        self._order = secrets.token_bytes(32)
        self._settings = settings
        self._records = tuple(records)
        self._look: Callable[[], Sequence[KeyRecord]] = tuple  # the keys made by now; none without a store
        self._known = self._table(settings, self._records)

    def authenticate(self, token: str) -> Caller | None:
        """Whose key this is; None: nobody's. As long as there are no keys at all, whatever is sent is `ANYBODY`'s."""
        if not self.required:
            # The first key closes the door as it is made: to look for it is the price of an open one only.
            made = self._look()
            if not made:
                return ANYBODY
            self.replace(made)
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._known.get(self._place(digest))
        if known is None or not hmac.compare_digest(known[0], digest):
            return None
        if known[1] is not None and known[1] <= self._clock():
            return None
        return known[2]

    @property
    def required(self) -> bool:
        """Whether callers must show a key: as soon as one was made or is in the settings, also if it is revoked."""
        return bool(self._settings.keys or self._records)

    def configure(self, settings: Settings) -> None:
        """Take the keys of new settings. Raises ConfigError, and changes nothing, if one cannot be."""
        self._known = self._table(settings, self._records)
        self._settings = settings

    def replace(self, records: Iterable[KeyRecord]) -> None:
        """Take the keys made by command, as the database has them now."""
        kept = tuple(records)
        # A name that the settings have too is theirs: it must not keep the others from being revoked.
        usable = tuple(record for record in kept if record.key_id not in self._settings.keys)
        for record in kept:
            if record.key_id in self._settings.keys and record.revoked_at is None and record not in self._records:
                logger.error("the key %r made by command opens nothing: the settings have one so named", record.key_id)
        self._known = self._table(self._settings, usable)
        self._records = kept

    async def follow(self, store: Store) -> None:
        """Take the store's keys, and take them again whenever they change."""
        self.replace(await store.keys())
        self._look = store.keys_now

        async def changed(what: str) -> None:
            if what == "keys":
                self.replace(await store.keys())

        store.watch(changed)

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._order, digest_size=16).digest()

    def _table(
        self, settings: Settings, records: Iterable[KeyRecord]
    ) -> dict[bytes, tuple[bytes, float | None, Caller]]:
        """By place: the digest, when it expires, and who it is."""
        table: dict[bytes, tuple[bytes, float | None, Caller]] = {}
        for name, caller in _configured(settings).items():
            digest = bytes.fromhex(settings.keys[name].sha256)
            if self._place(digest) in table:
                raise ConfigError(f"keys.{name}: another key has the same sha256")
            table[self._place(digest)] = digest, None, caller
        for record in records:
            if record.revoked_at is not None:
                continue
            if record.key_id in settings.keys:
                raise ConfigError(
                    f"keys.{record.key_id}: a key made by command has this name; revoke it, or rename one"
                )
            digest = bytes.fromhex(record.digest)
            table.setdefault(self._place(digest), (digest, record.expires_at, _caller(record, settings)))
        return table


ANYBODY = Caller(key_id="", scopes=frozenset(SCOPES))
"""Who asks where there are no keys, which is so on loopback only."""


def _configured(settings: Settings) -> dict[str, Caller]:
    callers = {}
    for name, key in settings.keys.items():
        check_digest(key.sha256, name)
        callers[name] = Caller(
            key_id=name,
            team=key.team,
            scopes=frozenset(key.scopes),
            models=frozenset(key.models),
            data_class=key.data_class,
            requests_per_minute=key.requests_per_minute,
            tokens_per_minute=key.tokens_per_minute,
            max_concurrent=key.max_concurrent,
            budget_per_day=micro_dollars(key.budget_per_day),
            team_budget_per_day=_team_budget(key.team, settings),
        )
    return callers


def _caller(record: KeyRecord, settings: Settings) -> Caller:
    return Caller(
        key_id=record.key_id,
        team=record.team,
        scopes=frozenset(record.scopes),
        models=frozenset(record.models),
        data_class=record.data_class,
        requests_per_minute=record.requests_per_minute,
        tokens_per_minute=record.tokens_per_minute,
        max_concurrent=record.max_concurrent,
        budget_per_day=record.budget_per_day,
        team_budget_per_day=_team_budget(record.team, settings),
    )


def _team_budget(team: str, settings: Settings) -> int | None:
    found = settings.teams.get(team)
    return None if found is None else micro_dollars(found.budget_per_day)


def micro_dollars(dollars: float | None) -> int | None:
    """Dollars as the settings have them, exact in the sums that follow."""
    return None if dollars is None else round(dollars * 1_000_000)


def check_record(record: KeyRecord, settings: Settings) -> KeyRecord:
    """The record of a key to be made, if the settings know what it names. Raises InvalidRequest that says what not."""
    if record.key_id in settings.keys:
        raise InvalidRequest(f"the settings have a key {record.key_id!r} already", param="name")
    if record.team and record.team not in settings.teams:
        raise InvalidRequest(f"the settings have no team {record.team!r}", param="team")
    for what, given, known in (("model", record.models, settings.models), ("scope", record.scopes, SCOPES)):
        for name in given:
            if name not in known:
                raise InvalidRequest(f"there is no {what} {name!r}; there are: {', '.join(sorted(known))}", param=what)
    for name in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
        if (value := getattr(record, name)) is not None and value <= 0:
            raise InvalidRequest(f"{name} must be above 0", param=name)
    if record.budget_per_day is not None and record.budget_per_day < 0:
        raise InvalidRequest("a budget cannot be below 0", param="budget_per_day")
    return record
