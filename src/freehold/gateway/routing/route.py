"""Where a request goes: from the alias that it names to the places that may answer it, in the order to try them.

    alias ── [[routes]] rule ──▶ alias, effort ── policy, wire format ──▶ arms ── unit ──▶ one arm, then the others,
                                                                                          then those of `fallback`

An arm's own effort stands above that of the rule. Where an alias has an experiment, its two arms share one place among
the arms of the alias, with the weights of both, and the canary's share divides the units of that place. A request that
one of the two may not or cannot answer takes no part in the experiment, whichever arm it would have had: what is
compared must not depend on what was left out. The canary fails over to the control; the control does not fail over to
a canary that is not promoted yet. Torch-free, and on the hot path: what can be worked out from the settings is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, get_args

from freehold.errors import FreeholdError, NotFound, PolicyRefused, Unavailable, UnsupportedField
from freehold.gateway import config
from freehold.gateway.call import Caller, Decision, Effort, Request, Target
from freehold.gateway.config import Settings
from freehold.gateway.policy import Policy, classes_of
from freehold.gateway.prices import price_of
from freehold.gateway.routing.assign import Pins, Points, ranking
from freehold.gateway.routing.rules import Rules
from freehold.ledger import Row

# What the gateway can say to an upstream in the other one's words.
_TRANSLATED: Mapping[str, str] = {"chat": "messages", "messages": "chat"}


class Standing(Protocol):
    """How an experiment stands now."""

    @property
    def share(self) -> float:
        """Of the units that the canary has. 0: it was rolled back, 1: it was promoted."""

    @property
    def aa(self) -> bool:
        """Both arms are the control, under two names."""

    @property
    def band(self) -> tuple[float, float] | None:
        """The units whose new conversations gateways agree about one by one, while the share rises."""


class Experiments(Protocol):
    """Who decides how far each canary has come."""

    def standing(self, experiment: str) -> Standing | None:
        """None: it is not known yet, and the canary gets nothing. Called for each request."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A standing that is just said."""

    share: float
    aa: bool = False
    band: tuple[float, float] | None = None


class Unclaimed(Unavailable):
    """Which arm a conversation has must be agreed with the other gateways first: `Router.settle`."""

    def __init__(self, experiment: str, conversation: str) -> None:
        super().__init__("the gateways are just agreeing about an experiment", retry_after=1)
        self.experiment, self.conversation = experiment, conversation


class FirstSteps:
    """Every experiment at the first step of its ramp, for good: a plain sticky split that nobody watches."""

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        self._standings = {name: Fixed(each.steps[0]) for name, each in settings.experiments.items()}

    def standing(self, experiment: str) -> Standing | None:
        return self._standings.get(experiment)


@dataclass(frozen=True, slots=True)
class _Arm:
    """The target for each effort that a rule may set; None: no rule did."""

    name: str
    upstream: str
    targets: Mapping[Effort | None, Target]


@dataclass(frozen=True, slots=True)
class _Split:
    """An experiment on an alias. points: of its units; mirror: of single requests, for shadowing."""

    settings: config.Experiment
    name: str
    control: _Arm
    canary: _Arm
    canary_as_control: _Arm  # while A/A: the control under the canary's name
    points: Points
    mirror: Points
    pins: Pins


@dataclass(frozen=True, slots=True)
class _Model:
    """arms: (points, weight, arm); pooled: the same where the control stands for both arms of the experiment. All
    requests are divided among `pooled`; whether the canary gets some of the control's is the experiment's affair."""

    arms: tuple[tuple[Points, float, _Arm], ...]
    pooled: tuple[tuple[Points, float, _Arm], ...]
    fallback: tuple[str, ...]
    split: _Split | None


class Table:
    """All decisions that one file of settings can lead to."""

    def __init__(
        self, settings: Settings, secret: bytes, experiments: Experiments, pins: Mapping[str, Pins] | None = None
    ) -> None:
        """secret: 16 to 64 bytes, equal on all gateways of one store. pins: by experiment, of the table before."""
        self.pins = {name: (pins or {}).get(name) or Pins() for name in settings.experiments}
        self._experiments = experiments
        self._policy = Policy(settings)
        self._rules = Rules(settings)
        self._models = {alias: self._model(settings, secret, alias) for alias in settings.models}
        self._speakers = {
            endpoint: frozenset(
                name
                for name, upstream in settings.upstreams.items()
                if endpoint in upstream.speaks or _TRANSLATED.get(endpoint) in upstream.speaks
            )
            for endpoint in ("chat", "completions", "responses", "messages", "embeddings")
        }

    def aliases(self, caller: Caller) -> list[str]:
        """What this caller may ask for, in the order of the settings."""
        return [alias for alias in self._models if not caller.models or alias in caller.models]

    def decide(self, request: Request) -> Decision:
        """See `parts.Router`. Raises NotFound, PolicyRefused, UnsupportedField, Unclaimed."""
        alias, caller = request.alias, request.caller
        if alias not in self._models or (caller.models and alias not in caller.models):
            raise NotFound(f"there is no model {alias[:128]!r} for this key; see /v1/models", param="model")
        match = self._rules.match(request)
        effort: Effort | None = None
        if match.applied is not None:
            alias, effort = match.applied.to or alias, match.applied.effort
        usable = self._policy.allowed(classes_of(request)) & self._speakers[request.endpoint]
        model = self._models[alias]
        experiment = arm = unit = why = ""
        shadow: Target | None = None
        split = model.split
        standing = None if split is None else self._experiments.standing(split.name)
        arms = _ranked(model, usable, request.unit, standing)
        if split is not None and standing is not None and _takes_part(split, arms, usable):
            experiment, unit = split.name, _unit(split, request)
            chosen = self._assign(split, standing, unit, request)
            arm = split.control.name if chosen is split.control else split.canary.name
            arms = _in_order(split, standing, chosen, arms)
            why = f" experiment={experiment} arm={arm}"
            if chosen is split.control and _mirrored(split, standing, request):
                shadow = split.canary.targets[effort]
        targets = [each.targets[effort] for each in arms]
        for other in model.fallback:
            self._fall_back(self._models[other], usable, request.unit, effort, targets)
        if not targets:
            raise self._refusal(request, alias)
        route = match.applied.name if match.applied is not None else ""
        why = f"{alias}{f' route={route}' if route else ''}{why}"
        would = match.would.name if match.would is not None else ""
        return Decision(tuple(targets), experiment, arm or targets[0].arm, shadow, why, unit, route, would)

    def learn(self, row: Row) -> None:
        """That a conversation is on the control: from a row."""
        self.recall(row.experiment, row.arm, row.conversation, row.at)

    def recall(self, experiment: str, arm: str, conversation: str, at: float) -> None:
        """The same from what is known of a row of before the start: at what time (epoch) it had which arm."""
        pins = self.pins.get(experiment)
        split = next((m.split for m in self._models.values() if m.split and m.split.name == experiment), None)
        if pins is not None and split is not None and conversation and arm == split.control.name:
            pins.pin(conversation, at)

    def _assign(self, split: _Split, standing: Standing, unit: str, request: Request) -> _Arm:
        conversation, at = request.conversation, request.at
        point = split.points(unit)
        drawn = point < standing.share
        if standing.band is not None and conversation and standing.band[0] <= point < standing.band[1]:
            if conversation in split.pins.canary:
                return split.canary
            if not split.pins.holds(conversation, at):
                raise Unclaimed(split.name, conversation)
        if standing.aa:
            # Whatever name it has: this conversation began on the control's model, and must stay there.
            if conversation:
                split.pins.pin(conversation, at)
            return split.canary_as_control if drawn else split.control
        if not drawn:
            if conversation:
                split.pins.pin(conversation, at)
            return split.control
        if conversation and split.pins.holds(conversation, at):
            split.pins.hold(conversation, at)
            return split.control
        return split.canary

    def _fall_back(
        self, model: _Model, usable: frozenset[str], unit: str, effort: Effort | None, targets: list[Target]
    ) -> None:
        """Append the arms of another alias, but for places that are there already."""
        split = model.split
        standing = None if split is None else self._experiments.standing(split.name)
        arms = _ranked(model, usable, unit, standing)
        if split is not None and standing is not None and _takes_part(split, arms, usable) and _promoted(standing):
            arms = [split.canary, *arms]
        tried = {(target.upstream, target.model_id, target.effort) for target in targets}
        for arm in arms:
            target = arm.targets[effort]
            if (target.upstream, target.model_id, target.effort) not in tried:
                targets.append(target)

    def _refusal(self, request: Request, alias: str) -> FreeholdError:
        """Why there is nowhere to go: policy, if it forbade places that could answer; otherwise there are none."""
        model = self._models[alias]
        behind = {arm.upstream for each in (alias, *model.fallback) for _, _, arm in self._models[each].arms}
        if behind.isdisjoint(self._speakers[request.endpoint]):
            return UnsupportedField(f"model {request.alias!r} does not answer {request.endpoint}", param="model")
        named = " and ".join(repr(each) for each in dict.fromkeys(classes_of(request)) if each)
        what = f"data of class {named}" if named else "anything while the gateway is air-gapped"
        return PolicyRefused(f"nothing behind model {request.alias!r} may be sent {what}")

    def _model(self, settings: Settings, secret: bytes, alias: str) -> _Model:
        given = settings.models[alias]
        arms = {arm.name: _arm(settings, arm) for arm in given.arms}
        points = {arm.name: Points(secret, f"arm/{alias}/{arm.name}") for arm in given.arms}
        weights = {arm.name: arm.weight for arm in given.arms}
        plain = tuple((points[name], weights[name], arm) for name, arm in arms.items())
        name, experiment = next(((n, e) for n, e in settings.experiments.items() if e.alias == alias), ("", None))
        if experiment is None:
            return _Model(plain, plain, given.fallback, None)
        control, canary = experiment.control, experiment.canary
        weights[control] += weights[canary]
        pooled = tuple((points[name], weights[name], arm) for name, arm in arms.items() if name != canary)
        split = _Split(
            settings=experiment,
            name=name,
            control=arms[control],
            canary=arms[canary],
            canary_as_control=_renamed(arms[control], canary),
            points=Points(secret, f"experiment/{name}"),
            mirror=Points(secret, f"mirror/{name}"),
            pins=self.pins[name],
        )
        return _Model(plain, pooled, given.fallback, split)


def _arm(settings: Settings, arm: config.Arm) -> _Arm:
    price = price_of(settings.upstreams[arm.upstream].models[arm.model].prices)
    efforts: tuple[Effort | None, ...] = (None, *get_args(Effort))
    targets = {
        effort: Target(arm.upstream, arm.model, arm.name, effort if arm.effort is None else arm.effort, price)
        for effort in efforts
    }
    return _Arm(arm.name, arm.upstream, targets)


def _renamed(arm: _Arm, name: str) -> _Arm:
    return _Arm(name, arm.upstream, {effort: replace(target, arm=name) for effort, target in arm.targets.items()})


def _ranked(model: _Model, usable: frozenset[str], unit: str, standing: Standing | None) -> list[_Arm]:
    """The arms that may answer, in this unit's order. The control stands for both arms of an experiment, also before
    it is known how that stands; a canary that was promoted stands in where the control may not answer."""
    found = ranking([each for each in model.pooled if each[2].upstream in usable], unit)
    split = model.split
    if split is None or standing is None or not _promoted(standing) or split.control in found:
        return found
    return [split.canary, *found] if split.canary.upstream in usable else found


def _promoted(standing: Standing) -> bool:
    return standing.share >= 1 and not standing.aa


def _takes_part(split: _Split, arms: Sequence[_Arm], usable: frozenset[str]) -> bool:
    """Whether a request is in the experiment: its unit is on the arms' common place, and both arms may answer it."""
    return bool(arms) and arms[0] is split.control and split.canary.upstream in usable


def _unit(split: _Split, request: Request) -> str:
    sticky = split.settings.sticky
    if sticky == "conversation":
        return request.unit
    of_key = request.caller.key_id
    return (of_key if sticky == "key" else request.user or of_key) or request.unit


def _in_order(split: _Split, standing: Standing, chosen: _Arm, arms: Sequence[_Arm]) -> list[_Arm]:
    """The chosen arm and what it fails over to. arms: the control, then those outside the experiment."""
    if chosen is split.canary:
        return [chosen, *arms]
    if chosen is split.control and _promoted(standing):
        return [chosen, split.canary, *arms[1:]]
    return [chosen, *arms[1:]]


def _mirrored(split: _Split, standing: Standing, request: Request) -> bool:
    """Whether the control's request is copied to the canary: not to one that is equal, rolled back or promoted."""
    running = 0 < standing.share < 1 and not standing.aa
    share = split.settings.shadow
    return running and share > 0 and split.mirror(request.request_id) < share
