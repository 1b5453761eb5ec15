"""Random schedules of arrivals, aborts, preemptions and evictions never change what a request generates.

The model here is a hash with a paged cache. The state of position p depends on the state of p-1, *read through the
block table*, and the next token depends on the states of all positions, read the same way. So a block that is shared
wrongly, a stale slot, a table in the wrong order or a position that was skipped changes the tokens that come out. The
salt is part of the state (as if every tenant had weights of its own), so that sharing across tenants is seen as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from freehold.engine.block_manager import BlockManager, BlockTable
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import EngineError
from freehold.types import FinishReason, SamplingParams, TokenChunk, TokenLogprobs
from tests.fairness import FairStep
from tests.faults.block_managers import (
    AdoptsTheFirst,
    ForgetsTheParent,
    ForgetsTheSalt,
    FreesSharedBlocks,
    KeepsAdoptedBlocks,
    KeepsEvictedDigests,
    LeaksSharedBlocks,
    ReusesTheLastToken,
    SharesPartialBlocks,
    SharesRejectedDrafts,
)

EOS = 0
VOCABULARY = 24  # small, so that EOS comes up now and then


# ── the model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def first_state(salt: str | None) -> bytes:
    return repr(salt).encode()


def next_state(previous: bytes, token_id: int, position: int) -> bytes:
    return blake2b(previous + b"%d,%d" % (token_id, position), digest_size=8).digest()


def next_token(states: Sequence[bytes]) -> int:
    return int.from_bytes(blake2b(b"".join(states), digest_size=4).digest()) % VOCABULARY


def one_at_a_time(prompt: Sequence[int], salt: str | None, max_tokens: int) -> tuple[int, ...]:
    """What a request generates alone, without a cache."""
    states: list[bytes] = []
    for position, token_id in enumerate(prompt):
        states.append(next_state(states[-1] if states else first_state(salt), token_id, position))
    output: list[int] = []
    while len(output) < max_tokens and EOS not in output:
        output.append(next_token(states))
        states.append(next_state(states[-1], output[-1], len(states)))
    return tuple(output)


class HashRunner:
    """Computes the model above in slots, as a real runner does: it knows only the steps it is given."""

    def __init__(self, plan: Plan, salts: Mapping[str, str | None]) -> None:
        self.slots: dict[int, bytes] = defaultdict(bytes)  # whoever reads what was never written gets nonsense
        self.block_size = plan.block_size
        self.num_draft_tokens = plan.num_draft_tokens
        self.hesitates = plan.hesitates
        self.salts = salts
        self.known: dict[str, NewRequest] = {}

    def execute(self, step: StepInput) -> list[SeqOutput]:
        for request_id in step.finished:
            del self.known[request_id]
        for new in step.new:
            assert new.request_id not in self.known
            self.known[new.request_id] = new
        outputs = []
        for seq in step.seqs:
            covered = len(seq.block_ids) * self.block_size
            assert seq.start + len(seq.token_ids) <= covered, "the table does not cover the step's positions"

            def slot(position: int, blocks: tuple[int, ...] = seq.block_ids) -> int:
                return blocks[position // self.block_size] * self.block_size + position % self.block_size

            salt = self.salts[seq.request_id]
            for position, token_id in enumerate(seq.token_ids, seq.start):
                before = self.slots[slot(position - 1)] if position else first_state(salt)
                self.slots[slot(position)] = next_state(before, token_id, position)
            last = seq.start + len(seq.token_ids) - 1
            states = [self.slots[slot(position)] for position in range(last + 1)]
            tokens: tuple[int, ...] = ()
            if seq.samples and not (self.hesitates and step.step_id % 3 == 0):
                tokens = self._speculate(states, covered, lambda p, s, slot=slot: self.slots.__setitem__(slot(p), s))
            extra = max(0, len(tokens) - 1)
            outputs.append(
                SeqOutput(
                    seq.request_id,
                    tokens,
                    prompt_logprobs=self._prompt_logprobs(seq),
                    draft_proposed=self.num_draft_tokens,
                    draft_accepted=extra,
                )
            )
        return outputs

    def _speculate(self, states: list[bytes], covered: int, write: Callable[[int, bytes], None]) -> tuple[int, ...]:
        """The next token, and further ones as drafts that happened to be right; a wrong draft leaves garbage behind."""
        drafts = min(self.num_draft_tokens, covered - len(states))
        right = min(drafts, states[-1][0] % (self.num_draft_tokens + 1))
        tokens = [next_token(states)]
        for _ in range(right):
            states.append(next_state(states[-1], tokens[-1], len(states)))
            write(len(states) - 1, states[-1])
            tokens.append(next_token(states))
        for wrong in range(drafts - right):
            write(len(states) + wrong, b"garbage")
        return tuple(tokens)

    def _prompt_logprobs(self, seq: ScheduledSeq) -> tuple[TokenLogprobs, ...] | None:
        new = self.known[seq.request_id]
        if new.params.prompt_logprobs is None:
            return None
        followers = new.prompt_token_ids[seq.start + 1 : seq.start + len(seq.token_ids) + 1]
        return tuple(scored(token_id, position) for position, token_id in enumerate(followers, seq.start))


def scored(token_id: int, position: int) -> TokenLogprobs:
    """The fake score of a prompt token, by the position before it."""
    return TokenLogprobs(token_id, -float(position), 1)


# ── schedules ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Arrival:
    """A request whose prompt is `length` tokens of one of few texts, then `tail`: prefixes collide often."""

    text: int
    length: int
    tail: tuple[int, ...]
    salt: str | None
    max_tokens: int
    prompt_logprobs: int | None

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple((self.text * 7 + i * i) % (VOCABULARY - 1) + 1 for i in range(self.length)) + self.tail


@dataclass(frozen=True)
class Plan:
    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    num_draft_tokens: int
    hesitates: bool  # the runner sometimes has no token yet
    arrivals: tuple[Arrival, ...]
    events: tuple[tuple[str, int], ...]  # before each step: what happens, and to which request


arrivals = st.builds(
    Arrival,
    text=st.integers(0, 1),
    length=st.integers(1, 16),
    tail=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    salt=st.sampled_from([None, "a", "b"]),
    max_tokens=st.integers(0, 10),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
)
events = st.tuples(
    st.sampled_from(["arrive", "arrive", "arrive", "step", "step", "step", "abort", "preempt", "evict"]),
    st.integers(0, 9),
)
plans = st.builds(
    Plan,
    block_size=st.integers(2, 4),
    num_blocks=st.integers(8, 16),
    max_num_seqs=st.integers(2, 5),
    budget=st.integers(4, 24),
    num_draft_tokens=st.sampled_from([0, 0, 1, 3]),
    hesitates=st.booleans(),
    arrivals=st.lists(arrivals, min_size=4, max_size=10).map(tuple),
    events=st.lists(events, min_size=12, max_size=48).map(tuple),
)

SEARCH = settings(max_examples=2000, deadline=None, derandomize=True, database=None, phases=[Phase.generate])


class Play:
    """Plays a plan with the real scheduler; remembers what was asked and what came out."""

    def __init__(self, plan: Plan, manager: type[BlockManager], *, checked: bool) -> None:
        self.plan = plan
        self.checked = checked
        self.blocks = manager(plan.num_blocks, plan.block_size)
        config = SchedulerConfig(
            max_model_len=10**6,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.budget,
            eos_token_ids=(EOS,),
            num_draft_tokens=plan.num_draft_tokens,
        )
        self.scheduler = Scheduler(config, self.blocks)
        self.salts: dict[str, str | None] = {}
        self.runner = HashRunner(plan, self.salts)
        self.asked: dict[str, Arrival] = {}
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.prompt_logprobs: dict[str, tuple[TokenLogprobs | None, ...]] = {}
        self.queue = [
            arrival
            for arrival in plan.arrivals
            if self.blocks.blocks_for(len(arrival.prompt) + arrival.max_tokens) <= plan.num_blocks
        ]

    def event(self, event: str, which: int) -> None:
        match event:
            case "arrive":
                self.arrive()
            case "step":
                self.step()
            case "abort":
                chunk = self.scheduler.abort(f"r{which}")
                if chunk is not None:
                    self.take(chunk)
            case "preempt":
                self.scheduler.preempt_youngest()
            case "evict":
                self.blocks.evict(which)
        if self.checked:
            self.scheduler.check_integrity()

    def arrive(self) -> None:
        if self.queue:
            name, arrival = f"r{len(self.asked)}", self.queue.pop(0)
            self.asked[name] = arrival
            self.salts[name] = arrival.salt
            params = SamplingParams(max_tokens=arrival.max_tokens, prompt_logprobs=arrival.prompt_logprobs)
            self.scheduler.add(Request(name, arrival.prompt, params, cache_salt=arrival.salt))

    def step(self) -> None:
        watch = FairStep(self.scheduler)
        planned = self.scheduler.schedule()
        if planned is not None:
            assert planned.num_tokens <= self.plan.budget
            watch.check(planned)
            for chunk in self.scheduler.update(planned, self.runner.execute(planned)):
                self.take(chunk)

    def take(self, chunk: TokenChunk) -> None:
        name = chunk.request_id
        assert name not in self.reasons, "a chunk after the last one"
        self.tokens[name] = self.tokens.get(name, ()) + chunk.token_ids
        assert chunk.usage.completion_tokens == len(self.tokens[name])
        if chunk.prompt_logprobs is not None:
            assert name not in self.prompt_logprobs, "prompt_logprobs come once"
            self.prompt_logprobs[name] = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self.reasons[name] = chunk.finish_reason

    def finish(self) -> None:
        while self.queue:
            self.arrive()
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.event("step", 0)
        raise AssertionError("the schedule does not end")

    def compare(self) -> None:
        """Nothing leaked, and every request generated what it generates alone."""
        assert self.blocks.num_free == self.plan.num_blocks, "blocks leaked"
        assert set(self.runner.known) == set(self.scheduler.take_finished()), "the runner was not told of every end"
        for name, arrival in self.asked.items():
            alone = one_at_a_time(arrival.prompt, arrival.salt, arrival.max_tokens)
            tokens, reason = self.tokens[name], self.reasons[name]
            if reason is FinishReason.ABORT:
                assert alone[: len(tokens)] == tokens
                continue
            assert alone == tokens
            assert reason is (FinishReason.STOP if alone[-1:] == (EOS,) else FinishReason.LENGTH)
            if arrival.prompt_logprobs is not None:
                followers = arrival.prompt[1:]
                assert self.prompt_logprobs[name] == (None, *(scored(t, at) for at, t in enumerate(followers)))


def run(plan: Plan, manager: type[BlockManager] = BlockManager, *, checked: bool = True) -> Scheduler:
    """Play a plan, let everything end, and compare with one at a time.

    checked=False leaves the integrity checks out, to see what the tokens alone show.
    """
    play = Play(plan, manager, checked=checked)
    for event, which in plan.events:
        play.event(event, which)
    play.finish()
    play.compare()
    return play.scheduler


@settings(max_examples=max(1000, 5 * settings().max_examples), suppress_health_check=list(HealthCheck))
@given(plans)
def test_a_schedule_changes_nothing(plan: Plan) -> None:
    run(plan)


@pytest.mark.parametrize("what", ["preemption", "prefix hit", "accepted draft", "eviction", "adoption"])
def test_the_schedules_reach_what_they_are_meant_to_reach(what: str) -> None:
    """Otherwise the property above would hold for want of trying."""
    evictions = accepted = adopted = 0

    class Counting(BlockManager):
        def adopt(self, table: BlockTable, token_ids: Sequence[int]) -> int:
            nonlocal adopted
            blocks = super().adopt(table, token_ids)
            adopted += blocks
            return blocks

        def _evict_one(self) -> int:
            nonlocal evictions
            evictions += 1
            return super()._evict_one()

    def reached(plan: Plan) -> bool:
        nonlocal accepted
        counters = run(plan, Counting).counters
        accepted += counters.draft_accepted
        return {
            "preemption": counters.preemptions > 0,
            "prefix hit": counters.prefix_hits > 0,
            "accepted draft": accepted > 0,
            "eviction": evictions > 0,
            "adoption": adopted > 0,
        }[what]

    find(plans, reached, settings=SEARCH)


# ── the property can fail ─────────────────────────────────────────────────────────────────────────────────────────────


FAULTS = [
    ForgetsTheSalt,
    ForgetsTheParent,
    SharesPartialBlocks,
    SharesRejectedDrafts,
    ReusesTheLastToken,
    KeepsEvictedDigests,
    LeaksSharedBlocks,
    FreesSharedBlocks,
    KeepsAdoptedBlocks,
    AdoptsTheFirst,
]


def fails(plan: Plan, manager: type[BlockManager], *, checked: bool) -> bool:
    try:
        run(plan, manager, checked=checked)
    except AssertionError:
        return True
    except (EngineError, KeyError, IndexError):
        return checked  # a crash is no proof that the tokens are wrong
    return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_wrong_block_manager_is_caught(fault: type[BlockManager]) -> None:
    find(plans, lambda plan: fails(plan, fault, checked=True), settings=SEARCH)


@pytest.mark.parametrize(
    "fault",
    [ForgetsTheSalt, ForgetsTheParent, SharesPartialBlocks, SharesRejectedDrafts, KeepsEvictedDigests, AdoptsTheFirst],
    ids=lambda fault: fault.__name__,
)
def test_its_tokens_alone_give_it_away(fault: type[BlockManager]) -> None:
    find(plans, lambda plan: fails(plan, fault, checked=False), settings=SEARCH)
