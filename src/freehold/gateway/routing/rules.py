"""Which `[[routes]]` rule a request falls under: the first whose conditions all hold.

A rule in shadow mode sends nothing anywhere: the first of them that holds is only noted, and the search goes on. What
it would have saved is in `freehold.gateway.routing.savings`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from freehold.gateway.call import Request
from freehold.gateway.config import Route, Settings, When
from freehold.gateway.policy import classes_of
from freehold.gateway.routing.paths import PathRules, Way


class Asked:
    """A request, and what was already worked out about it."""

    __slots__ = ("_paths", "_way", "request")

    def __init__(self, request: Request, paths: PathRules) -> None:
        self.request = request
        self._paths = paths
        self._way: Way | None = None

    @property
    def way(self) -> Way:
        if self._way is None:
            self._way = self._paths(self.request)[0]
        return self._way


Condition = Callable[[Asked], bool]


@dataclass(frozen=True, slots=True)
class Match:
    """applied: the rule that decides, if any holds; would: the first one in shadow mode that held before it."""

    applied: Route | None = None
    would: Route | None = None


_NOTHING = Match()


class Rules:
    """All rules, sorted by the alias that they can apply to."""

    def __init__(self, settings: Settings) -> None:
        self._paths = PathRules(settings.paths)
        self._of: dict[str, list[tuple[tuple[Condition, ...], Route]]] = {
            alias: [
                (conditions(route.when), route)
                for route in settings.routes
                if not route.when.model or alias in route.when.model
            ]
            for alias in settings.models
        }

    def match(self, request: Request) -> Match:
        """request.alias is known."""
        rules = self._of[request.alias]
        if not rules:
            return _NOTHING
        asked = Asked(request, self._paths)
        would: Route | None = None
        for tests, route in rules:
            if not all(test(asked) for test in tests):
                continue
            if route.mode == "on":
                return Match(route, would)
            would = would or route
        return Match(None, would) if would is not None else _NOTHING


def conditions(when: When) -> tuple[Condition, ...]:
    """One test for each condition that is given, but for the alias; the cheap ones first."""
    tests: list[Condition] = []
    if when.key:
        tests.append(lambda asked: asked.request.caller.key_id in when.key)
    if when.team:
        tests.append(lambda asked: asked.request.caller.team in when.team)
    if when.task:
        tests.append(lambda asked: asked.request.task in when.task)
    if when.effort:
        tests.append(lambda asked: asked.request.effort in when.effort)
    if when.prompt_name:
        tests.append(lambda asked: asked.request.prompt_name in when.prompt_name)
    if when.prompt_version:
        tests.append(lambda asked: asked.request.prompt_version in when.prompt_version)
    if when.data_class:
        tests.append(lambda asked: not {*classes_of(asked.request)}.isdisjoint(when.data_class))
    if when.body_bytes_over is not None:
        over = when.body_bytes_over
        tests.append(lambda asked: len(asked.request.body) > over)
    if when.body_bytes_under is not None:
        under = when.body_bytes_under
        tests.append(lambda asked: len(asked.request.body) < under)
    if when.header:
        wanted = {name.lower(): value for name, value in when.header.items()}.items()
        tests.append(lambda asked: all(asked.request.headers.get(name) == value for name, value in wanted))
    if when.path is not None:
        tests.append(lambda asked: asked.way == when.path)
    return tuple(tests)
