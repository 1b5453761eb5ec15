"""What the ledger says: costs and tokens by anything, what versions of a prompt changed, budgets.

Plain SQL that both databases run; percentiles are taken by rank (nearest rank), because SQLite has none. Mirrored calls
are left out unless they are asked for: nobody waited for them, and no key paid.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from freehold.errors import InvalidRequest
from freehold.gateway.keeping.filters import Filter
from freehold.gateway.keeping.store import Store
from freehold.ledger import FAILURES
from freehold.stats import Interval, mean_ratio, wilson

GROUPS = tuple(
    "prompt_version prompt_name task model_id alias upstream replica key_id team experiment arm served_arm effort "
    "endpoint engine weights data_class error".split()
)
"""What rows can be grouped by."""
LEVEL = 0.99  # of the intervals of `regressions`, which looks at several metrics of several prompts
ROWS_COMPARED = 20_000  # of each version, the latest
RESAMPLED_UNITS = 2_000  # larger clusters of units make the bootstrap slower, not better

_FAILED = ", ".join(f"'{name}'" for name in sorted(FAILURES))


@dataclass(frozen=True, slots=True)
class Sums:
    """The rows of one group, added up. cost: micro-dollars; uncosted: answered attempts whose cost nobody knows."""

    group: tuple[str, ...]
    requests: int
    attempts: int
    failures: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    undelivered_tokens: int
    cost: int
    uncosted: int


@dataclass(frozen=True, slots=True)
class Spread:
    """How many tokens a request of a group takes: the mean, and percentiles by nearest rank. All its attempts count."""

    group: tuple[str, ...]
    requests: int
    mean: float
    p50: int
    p95: int
    largest: int


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of two versions of a prompt. worse: True or False where the interval of the difference leaves out 0;
    None: the data do not tell."""

    prompt_name: str
    before: str
    after: str
    metric: str
    rows: tuple[int, int]
    was: float
    now: float
    difference: Interval

    @property
    def worse(self) -> bool | None:
        if self.difference.low > 0:
            return True
        return False if self.difference.high < 0 else None


async def sums(store: Store, by: Sequence[str], which: Filter) -> list[Sums]:
    """Sums by one or several of `GROUPS`, the dearest first. Raises InvalidRequest if it is not one of them."""
    columns = _columns(by)
    condition, values = which.sql()
    rows = await store.fetch(
        f"SELECT {columns}, count(DISTINCT request_id), count(*),"
        f" sum(CASE WHEN error IN ({_FAILED}) THEN 1 ELSE 0 END),"
        " coalesce(sum(input_tokens), 0), coalesce(sum(cached_tokens), 0), coalesce(sum(output_tokens), 0),"
        " coalesce(sum(reasoning_tokens), 0), coalesce(sum(undelivered_tokens), 0), coalesce(sum(cost), 0),"
        " sum(CASE WHEN cost IS NULL AND status BETWEEN 200 AND 299 THEN 1 ELSE 0 END)"
        f" FROM calls WHERE {condition} GROUP BY {columns}",
        values,
    )
    n = len(by)
    found = [Sums(tuple(row[:n]), *(int(value) for value in row[n:])) for row in rows]
    return sorted(found, key=lambda each: (-each.cost, -each.requests, each.group))


async def tokens(store: Store, by: Sequence[str], column: str, which: Filter) -> list[Spread]:
    """Tokens a request by group, most first. column: input_tokens, output_tokens or reasoning_tokens."""
    if column not in ("input_tokens", "output_tokens", "reasoning_tokens"):
        raise InvalidRequest(f"there is no count {column!r}", param="count")
    columns = _columns(by)
    condition, values = which.sql()
    rows = await store.fetch(
        f"WITH per_request AS (SELECT {columns}, request_id, sum({column}) AS used FROM calls"
        f" WHERE {condition} AND {column} IS NOT NULL GROUP BY {columns}, request_id),"
        f" ranked AS (SELECT {columns}, used, row_number() OVER (PARTITION BY {columns} ORDER BY used) AS rank,"
        f" count(*) OVER (PARTITION BY {columns}) AS n FROM per_request)"
        f" SELECT {columns}, max(n), sum(used), max(CASE WHEN rank = (n * 50 + 99) / 100 THEN used END),"
        f" max(CASE WHEN rank = (n * 95 + 99) / 100 THEN used END), max(used) FROM ranked GROUP BY {columns}",
        values,
    )
    k = len(by)
    found = [
        Spread(tuple(row[:k]), int(row[k]), int(row[k + 1]) / int(row[k]), *(int(value) for value in row[k + 2 :]))
        for row in rows
    ]
    return sorted(found, key=lambda each: (-each.mean, each.group))


async def regressions(store: Store, which: Filter, before: str | None = None, after: str | None = None) -> list[Change]:
    """What the newest version of each prompt changed, against the one before; or two versions that are named.

    Newest: first seen last. Metrics: failed attempts (rate), and the mean cost, output tokens, TTFT and TPOT of those
    that were answered. Raises InvalidRequest if only one version is named.
    """
    if (before is None) != (after is None):
        raise InvalidRequest("name both versions, or none", param="from" if before is None else "to")
    condition, values = which.sql()
    seen = await store.fetch(
        f"SELECT prompt_name, prompt_version FROM calls WHERE {condition} AND prompt_version <> '' "
        "GROUP BY prompt_name, prompt_version ORDER BY prompt_name, min(at), prompt_version",
        values,
    )
    versions: defaultdict[str, list[str]] = defaultdict(list)
    for name, version in seen:
        versions[name].append(version)
    changes = []
    for name, known in versions.items():
        if before is not None and after is not None:
            pair = (before, after) if {before, after} <= set(known) else None
        else:
            pair = (known[-2], known[-1]) if len(known) > 1 else None
        if pair is not None:
            was, now = [
                await _measured(store, replace(which, prompt_name=name, prompt_version=version)) for version in pair
            ]
            changes += _changes(name, pair, was, now)
    return changes


_METRICS = ("cost", "output_tokens", "ttft", "tpot")


@dataclass(frozen=True, slots=True)
class _Measured:
    """attempts, failed: of a version. values: by metric, for each sticky unit the sum and the number of its values."""

    attempts: int
    failed: int
    values: dict[str, list[tuple[float, int]]]


async def _measured(store: Store, which: Filter) -> _Measured:
    condition, values = which.sql()
    rows = await store.fetch(
        f"SELECT unit, request_id, error, {', '.join(_METRICS)} FROM calls WHERE {condition} AND error NOT IN"
        f" ('client_gone', 'refused_here') ORDER BY at DESC, row_id DESC LIMIT {ROWS_COMPARED}",
        values,
    )
    by_unit: dict[str, dict[str, tuple[float, int]]] = {metric: {} for metric in _METRICS}
    for unit, request_id, error, *measured in rows:
        if error:
            continue
        for metric, value in zip(_METRICS, measured, strict=True):
            if value is not None:
                total, count = by_unit[metric].get(unit or request_id, (0.0, 0))
                by_unit[metric][unit or request_id] = total + value, count + 1
    failed = sum(row[2] in FAILURES for row in rows)
    return _Measured(len(rows), failed, {metric: list(units.values()) for metric, units in by_unit.items()})


def _changes(name: str, pair: tuple[str, str], was: _Measured, now: _Measured) -> list[Change]:
    found = []
    if was.attempts and now.attempts:
        rates = wilson(was.failed, was.attempts, LEVEL), wilson(now.failed, now.attempts, LEVEL)
        rows = (was.attempts, now.attempts)
        found.append(Change(name, *pair, "failures", rows, rates[0].value, rates[1].value, difference(*rates)))
    for metric in _METRICS:
        old, new = was.values[metric], now.values[metric]
        if len(old) > 1 and len(new) > 1:
            means = [_mean(units) for units in (old, new)]
            rows = (sum(count for _, count in old), sum(count for _, count in new))
            found.append(Change(name, *pair, metric, rows, means[0].value, means[1].value, difference(*means)))
    return found


def _mean(units: Sequence[tuple[float, int]]) -> Interval:
    """The mean of all values, units resampled whole; many units are first put together into `RESAMPLED_UNITS`."""
    groups = min(len(units), RESAMPLED_UNITS)
    totals = [math.fsum(total for total, _ in units[first::groups]) for first in range(groups)]
    counts = [sum(count for _, count in units[first::groups]) for first in range(groups)]
    return mean_ratio(totals, counts, LEVEL)


def difference(was: Interval, now: Interval) -> Interval:
    """The interval of now − was, from those of two independent figures: the square-and-add of G. Y. Zou and
    A. Donner (2008), which for Wilson intervals of rates is R. G. Newcombe's (1998, method 10)."""
    value = now.value - was.value
    return Interval(
        value,
        value - math.hypot(now.value - now.low, was.high - was.value),
        value + math.hypot(now.high - now.value, was.value - was.low),
    )


def _columns(by: Sequence[str]) -> str:
    for name in by:
        if name not in GROUPS:
            raise InvalidRequest(f"rows cannot be grouped by {name!r}; by: {', '.join(GROUPS)}", param="by")
    if not by or len(set(by)) < len(by):
        raise InvalidRequest("group by one thing or several different ones", param="by")
    return ", ".join(by)
