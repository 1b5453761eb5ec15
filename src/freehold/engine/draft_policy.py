"""How many tokens to draft: as many as give the most tokens a second, or none while drafts do not pay. Torch-free.

With k drafts a step gives 1 + a1 + a1·a2 + … + a1·…·ak tokens, where ai is the chance that the i-th draft is accepted
if those before it were, and takes as long as verifying k drafts and proposing the next k. Both are measured while the
engine runs: acceptance over all requests, as a mean that forgets; times as medians of the last steps, for each number
of requests that decode together (`_Load`), because verifying takes as many more rows as there are requests. Times that
were not measured yet are taken to lie on a line between those that were.

Where no k pays, the load *rests*: the MTP layer is not computed at all, and a step costs what it costs without it.
After a while it is tried again, first only extending the layer, so that drafts have something to attend to, then with
one draft; each time that fails the rest gets longer. A trial that comes near to paying is followed by real drafts: for
prompts that arrive then, the layer sees the whole prompt, which a trial did not.

What is chosen changes how fast tokens come, and never, for greedy and seeded requests, which ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

_PRIOR, _PRIOR_WEIGHT = 0.7, 3.0  # acceptance before anything was seen: worth a try
_MEMORY = 100.0  # drafts after which an observation counts half as much, about
_KEPT = 7  # times of the last steps of a kind
_ENOUGH = 2  # of them before they are relied on
_REFRESH = 128  # a load that drafts has one step without drafts in so many, to know what that takes
_EXPLORE = 16  # and one, in so many, with a number of drafts that was not timed yet
_SHORTEST_REST, _LONGEST_REST = 128, 4096  # steps
_TRIAL_EXTENDS, _TRIAL_DRAFTS = 8, 6  # steps of a trial
_NEARLY = 0.95  # of the speed without drafts: a trial that reaches it is followed by drafts
_STAY = 24  # steps that drafts get then, before they must pay


class Policy(Protocol):
    def plan(self, decoding: int, most: int) -> int | None:
        """Drafts to propose for each of `decoding` requests, up to `most`; None: leave the MTP layer out."""
        ...

    def note_verified(self, outcomes: Iterable[tuple[int, int]]) -> None:
        """Drafts that a step verified: (proposed, accepted) of each request that had some."""
        ...

    def note_target(self, decoding: int, drafts: int, seconds: float) -> None:
        """How long a step of `decoding` requests, each with `drafts` drafts and nothing else, took to verify."""
        ...

    def note_drafting(self, decoding: int, drafts: int, seconds: float) -> None:
        """How long extending the layer and proposing `drafts` drafts took behind such a step."""
        ...


class FixedDrafts:
    """The same number always: for measurements and tests."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts

    def plan(self, decoding: int, most: int) -> int | None:
        return min(self.drafts, most)

    def note_verified(self, outcomes: Iterable[tuple[int, int]]) -> None:
        return

    def note_target(self, decoding: int, drafts: int, seconds: float) -> None:
        return

    def note_drafting(self, decoding: int, drafts: int, seconds: float) -> None:
        return


@dataclass(slots=True)
class _Rate:
    """A mean that forgets."""

    hits: float = _PRIOR * _PRIOR_WEIGHT
    tries: float = _PRIOR_WEIGHT

    def note(self, hit: bool) -> None:
        keep = 1.0 - 1.0 / _MEMORY
        self.hits, self.tries = keep * self.hits + hit, keep * self.tries + 1.0

    def fade(self) -> None:
        """What was seen until now is an old story: let the next few observations decide."""
        weight = min(1.0, 1.0 / self.tries)
        self.hits, self.tries = self.hits * weight, self.tries * weight

    @property
    def value(self) -> float:
        return self.hits / self.tries


class _Times:
    """Seconds by number of drafts."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[float]] = {}

    def note(self, drafts: int, seconds: float) -> None:
        self._seen.setdefault(drafts, deque(maxlen=_KEPT)).append(seconds)

    def known(self, drafts: int) -> bool:
        return len(self._seen.get(drafts, ())) >= _ENOUGH

    def estimate(self, drafts: int) -> float:
        """On the line through the nearest measured numbers of drafts; of one, what that takes; of none, nothing."""
        points = {k: median(seconds) for k, seconds in self._seen.items() if len(seconds) >= _ENOUGH}
        if drafts in points:
            return points[drafts]
        if len(points) < 2:
            return sum(points.values())
        low, high = sorted(sorted(points, key=lambda k: abs(k - drafts))[:2])
        slope = max(0.0, (points[high] - points[low]) / (high - low))
        return max(points[low] + slope * (drafts - low), 0.0)


@dataclass(slots=True)
class _Load:
    """What is known of steps of one number of decoding requests, and whether they draft.

    resting: steps left. trial: steps that a trial has had, None outside one. stay: steps before drafts must pay.
    """

    target: _Times = field(default_factory=_Times)
    drafting: _Times = field(default_factory=_Times)
    resting: int = 0
    rest: int = _SHORTEST_REST
    trial: int | None = None
    stay: int = 0
    steps: int = 0


class DraftPolicy:
    """Implements `Policy` as described above, for one engine. most: drafts of a request and step, at most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.rates = [_Rate() for _ in range(most)]
        self._loads: dict[int, _Load] = {}

    def plan(self, decoding: int, most: int) -> int | None:
        most = min(most, self.most)
        if most < 1:
            return None
        load = self._loads.setdefault(decoding, _Load())
        if load.resting:
            load.resting -= 1
            if load.resting:
                return None
            load.trial = 0
            for rate in self.rates:
                rate.fade()
        if load.trial is not None:
            return self._try(load, load.trial, most)
        load.steps += 1
        if not load.target.known(0) or load.steps % _REFRESH == 0:
            return 0
        if not (load.target.known(most) and load.drafting.known(most)):
            return most
        if load.steps % _EXPLORE == 0 and (unknown := [k for k in range(1, most) if not load.target.known(k)]):
            return unknown[0]
        best, gain = self._best(load, most)
        if load.stay:
            load.stay -= 1
            return best
        if gain > 1.0:
            load.rest = _SHORTEST_REST
            return best
        self._rest(load)
        return None

    def note_verified(self, outcomes: Iterable[tuple[int, int]]) -> None:
        for proposed, accepted in outcomes:
            for at in range(min(accepted + 1, proposed, self.most)):
                self.rates[at].note(at < accepted)

    def note_target(self, decoding: int, drafts: int, seconds: float) -> None:
        if load := self._loads.get(decoding):
            load.target.note(drafts, seconds)

    def note_drafting(self, decoding: int, drafts: int, seconds: float) -> None:
        if load := self._loads.get(decoding):
            load.drafting.note(drafts, seconds)

    def _try(self, load: _Load, done: int, most: int) -> int | None:
        """A step of a trial: extend, then one draft at a time, then decide."""
        if done < _TRIAL_EXTENDS + _TRIAL_DRAFTS:
            load.trial = done + 1
            return 0 if done < _TRIAL_EXTENDS else 1
        load.trial = None
        for rate in self.rates[1:]:  # not seen in the trial: as good as the first
            rate.hits = self.rates[0].value * rate.tries
        best, gain = self._best(load, most)
        if gain < _NEARLY:
            self._rest(load)
            return None
        load.stay = _STAY
        return best

    def _rest(self, load: _Load) -> None:
        load.resting, load.rest = load.rest, min(2 * load.rest, _LONGEST_REST)

    def _best(self, load: _Load, most: int) -> tuple[int, float]:
        """The best number of drafts but none, and how much faster it is than none."""
        plain = load.target.estimate(0)
        tokens, chance = 1.0, 1.0
        best, gain = 1, 0.0
        for drafts in range(1, most + 1):
            chance *= self.rates[drafts - 1].value
            tokens += chance
            seconds = load.target.estimate(drafts) + load.drafting.estimate(drafts)
            if tokens * plain > gain * seconds:
                best, gain = drafts, tokens * plain / seconds
        return best, gain
