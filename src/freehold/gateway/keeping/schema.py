"""The tables of the gateway's database, and how an older database becomes a current one.

A migration is a list of statements that is never changed once it was released; a new column is a new migration. Almost
all of it is SQL that SQLite and PostgreSQL read alike: `bigint`, `boolean` and `double precision` are types to one and
affinities to the other. What differs stands apart.

Tables:

    calls          `freehold.ledger.Row`, one an attempt; a trigger refuses changes, but for the erasure of a person
    notes          `freehold.ledger.Note`, only ever added to
    texts          prompts and answers, if they are kept at all
    spend          micro-dollars by budget and UTC day, written with the rows that they come from
    reservations   what running calls may still cost; what a killed gateway leaves here stays reserved for its day
    keys           hashed keys made by `freehold gateway key new`
    decisions      what happened to experiments and on which figures, only ever added to
    leases         of PostgreSQL only: which gateway decides about which experiment now
    followers      of PostgreSQL only: how far each gateway is with an experiment's share (`routing.crossing`)
    pins           of PostgreSQL only: where conversations began, as far as a rising share made that a question
    audit          the hash-chained log
    secrets        of PostgreSQL only; with SQLite they are files beside it
    writers        the last batch of each gateway, so that a batch whose commit was in doubt is not written twice
    counters       `keys` rises when keys change, so that other gateways read them again; `position` with each row and
                   note, in the order in which they were committed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

Dialect: TypeAlias = Literal["sqlite", "postgres"]


class Migration(NamedTuple):
    """Statements for both databases, and those for one."""

    both: tuple[str, ...]
    sqlite: tuple[str, ...] = ()
    postgres: tuple[str, ...] = ()

    def statements(self, dialect: Dialect) -> tuple[str, ...]:
        return self.both + (self.sqlite if dialect == "sqlite" else self.postgres)


_TABLES = """
CREATE TABLE calls (
    row_id text PRIMARY KEY, request_id text NOT NULL, attempt bigint NOT NULL, at double precision NOT NULL,
    endpoint text NOT NULL, key_id text NOT NULL, team text NOT NULL, unit text NOT NULL, conversation text NOT NULL,
    "user" text NOT NULL, alias text NOT NULL, model_id text NOT NULL, upstream text NOT NULL, replica text NOT NULL,
    engine text NOT NULL, weights text NOT NULL, prompt_name text NOT NULL, prompt_version text NOT NULL,
    task text NOT NULL, effort text NOT NULL, streamed boolean NOT NULL, data_class text NOT NULL,
    route text NOT NULL, would text NOT NULL,
    experiment text NOT NULL, arm text NOT NULL, served_arm text NOT NULL, shadow_of text NOT NULL,
    warm_up boolean NOT NULL, status bigint NOT NULL, error text NOT NULL, finish_reason text NOT NULL,
    input_tokens bigint, cached_tokens bigint, output_tokens bigint, reasoning_tokens bigint,
    undelivered_tokens bigint NOT NULL, counted text NOT NULL, cost bigint, ttft double precision,
    itl_p50 double precision, itl_p99 double precision, tpot double precision, duration double precision NOT NULL,
    position bigint NOT NULL
);
CREATE INDEX calls_at ON calls (at);
CREATE INDEX calls_experiment ON calls (experiment, position) WHERE experiment <> '';
CREATE INDEX calls_user ON calls ("user") WHERE "user" <> '';
CREATE TABLE notes (
    row_id text NOT NULL, at double precision NOT NULL, name text NOT NULL, value double precision NOT NULL,
    source text NOT NULL, position bigint NOT NULL
);
CREATE INDEX notes_row ON notes (row_id);
CREATE TABLE texts (
    row_id text PRIMARY KEY, at double precision NOT NULL, request text NOT NULL, answer text NOT NULL
);
CREATE TABLE spend (scope text NOT NULL, day bigint NOT NULL, spent bigint NOT NULL, PRIMARY KEY (scope, day));
CREATE TABLE reservations (
    id text NOT NULL, scope text NOT NULL, day bigint NOT NULL, amount bigint NOT NULL, writer text NOT NULL,
    at double precision NOT NULL, PRIMARY KEY (id, scope)
);
CREATE INDEX reservations_scope ON reservations (scope, day);
CREATE TABLE keys (
    key_id text PRIMARY KEY, digest text NOT NULL UNIQUE, record text NOT NULL, revoked_at double precision
);
CREATE TABLE leases (name text PRIMARY KEY, holder text NOT NULL, until double precision NOT NULL);
CREATE TABLE decisions (
    experiment text NOT NULL, number bigint NOT NULL, at double precision NOT NULL, record text NOT NULL,
    PRIMARY KEY (experiment, number)
);
CREATE TABLE audit (
    seq bigint PRIMARY KEY, at double precision NOT NULL, actor text NOT NULL, kind text NOT NULL,
    subject text NOT NULL, detail text NOT NULL, previous text NOT NULL, hash text NOT NULL
);
CREATE TABLE secrets (name text PRIMARY KEY, value text NOT NULL);
CREATE TABLE writers (writer text PRIMARY KEY, batch bigint NOT NULL, at double precision NOT NULL);
CREATE TABLE counters (name text PRIMARY KEY, number bigint NOT NULL);
INSERT INTO counters (name, number) VALUES ('keys', 0), ('position', 0)
"""
_AGREEING = """
CREATE TABLE pins (
    experiment text NOT NULL, conversation text NOT NULL, on_canary boolean NOT NULL, at double precision NOT NULL,
    PRIMARY KEY (experiment, conversation)
);
CREATE TABLE followers (
    experiment text NOT NULL, writer text NOT NULL, number bigint NOT NULL, level bigint NOT NULL,
    until double precision NOT NULL, PRIMARY KEY (experiment, writer)
)
"""
# What no statement may change afterwards: all of a row but the pseudonyms of a person who asks to be forgotten.
_FIXED = """
    row_id, request_id, attempt, at, endpoint, key_id, team, alias, model_id, upstream, replica, engine, weights,
    prompt_name, prompt_version, task, effort, streamed, data_class, route, would, experiment, arm, served_arm,
    shadow_of, warm_up,
    status, error, finish_reason, input_tokens, cached_tokens, output_tokens, reasoning_tokens, undelivered_tokens,
    counted, cost, ttft, itl_p50, itl_p99, tpot, duration, position"""

_SQLITE_TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_no_{event.lower()} BEFORE {event} {columns} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed'); END"
    for table, event, columns in (
        ("calls", "UPDATE", f"OF {_FIXED}"),
        ("notes", "UPDATE", ""),
        ("decisions", "UPDATE", ""),
        ("decisions", "DELETE", ""),
        ("audit", "UPDATE", ""),
        ("audit", "DELETE", ""),
    )
)
_POSTGRES_TRIGGERS = (
    """
CREATE FUNCTION freehold_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are never changed', TG_TABLE_NAME;
END $$""",
    f"CREATE TRIGGER fixed BEFORE UPDATE OF {_FIXED} ON calls FOR EACH ROW EXECUTE FUNCTION freehold_refuse()",
    "CREATE TRIGGER fixed BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION freehold_refuse()",
    "CREATE TRIGGER fixed BEFORE UPDATE OR DELETE ON decisions FOR EACH ROW EXECUTE FUNCTION freehold_refuse()",
    "CREATE TRIGGER fixed BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION freehold_refuse()",
)
# Several gateways reserve from one budget: the budgets' rows are locked in one order, then looked at, then all or none
# is reserved. NULL: it was reserved; otherwise what stood in the way: position in `scopes` (from 1), spent, reserved.
_POSTGRES_RESERVE = """
CREATE FUNCTION freehold_reserve(
    reservation text, writer_id text, made_at double precision, of_day bigint,
    scopes text[], limits bigint[], wanted bigint
) RETURNS bigint[] LANGUAGE plpgsql AS $$
DECLARE
    i int;
    so_far bigint;
    running bigint;
BEGIN
    INSERT INTO spend (scope, day, spent)
        SELECT s, of_day, 0 FROM unnest(scopes) AS s ORDER BY s ON CONFLICT DO NOTHING;
    PERFORM 1 FROM spend WHERE scope = ANY (scopes) AND day = of_day ORDER BY scope FOR UPDATE;
    FOR i IN 1 .. array_length(scopes, 1) LOOP
        SELECT spent INTO so_far FROM spend WHERE scope = scopes[i] AND day = of_day;
        SELECT coalesce(sum(amount), 0) INTO running FROM reservations WHERE scope = scopes[i] AND day = of_day;
        IF so_far + running + wanted > limits[i] THEN
            RETURN ARRAY[i, so_far, running];
        END IF;
    END LOOP;
    INSERT INTO reservations (id, scope, day, amount, writer, at)
        SELECT reservation, s, of_day, wanted, writer_id, made_at FROM unnest(scopes) AS s;
    RETURN NULL;
END $$"""

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        both=tuple(statement.strip() for statement in _TABLES.split(";")),
        sqlite=_SQLITE_TRIGGERS,
        postgres=(*_POSTGRES_TRIGGERS, _POSTGRES_RESERVE),
    ),
    Migration(both=tuple(statement.strip() for statement in _AGREEING.split(";"))),
)


def missing(found: int, migrations: Sequence[Migration] = MIGRATIONS) -> Sequence[Migration]:
    """The migrations that a database of version `found` (0: empty) still needs. Raises ValueError if it is newer."""
    if found > len(migrations):
        raise ValueError(
            f"the database has schema {found}, and this Freehold knows {len(migrations)}: it was written by a newer one"
        )
    return migrations[found:]


def column_types() -> dict[str, str]:
    """The columns of `calls` that hold a row's fields, in their order, and the types they have in SQL."""
    text = " ".join(MIGRATIONS[0].both[0].split())
    definitions = text[text.index("(") + 1 : -1].split(",")
    columns = {}
    for definition in definitions:
        name, kind, *rest = definition.replace("NOT NULL", "").replace("PRIMARY KEY", "").split()
        columns[name.strip('"')] = " ".join((kind, *rest))
    del columns["position"]
    return columns
