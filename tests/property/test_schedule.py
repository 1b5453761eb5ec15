"""Random schedules of arrivals, aborts, preemptions and evictions never change what a request generates.

The model here is a hash with a paged cache. The state of position p depends on the state of p-1, *read through the
block table*, and the next token depends on the states of all positions, read the same way. So a block that is shared
wrongly, a stale slot, a table in the wrong order or a position that was skipped changes the tokens that come out. The
salt is part of the state (as if every tenant had weights of its own), so that sharing across tenants is seen as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from freehold.engine.block_manager import BlockManager, BlockTable, root_digest
from freehold.engine.request import Request
from freehold.engine.scheduler import Scheduler, SchedulerConfig
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import EngineError
from freehold.types import FinishReason, SamplingParams, TokenChunk, TokenLogprobs

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


@dataclass
class Seen:
    """What came out for each request."""

    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprobs | None, ...]] = field(default_factory=dict)

    def take(self, chunk: TokenChunk) -> None:
        assert chunk.request_id not in self.reasons, "a chunk after the last one"
        self.tokens[chunk.request_id] = self.tokens.get(chunk.request_id, ()) + chunk.token_ids
        assert chunk.usage.completion_tokens == len(self.tokens[chunk.request_id])
        if chunk.prompt_logprobs is not None:
            assert chunk.request_id not in self.prompt_logprobs, "prompt_logprobs come once"
            self.prompt_logprobs[chunk.request_id] = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            self.reasons[chunk.request_id] = chunk.finish_reason


def run(plan: Plan, manager: type[BlockManager] = BlockManager, *, checked: bool = True) -> Scheduler:
    """Play a plan, checking after every event; then let everything end and compare with one at a time.

    checked=False leaves the integrity checks out, to see what the tokens alone show.
    """
    blocks = manager(plan.num_blocks, plan.block_size)
    config = SchedulerConfig(
        max_model_len=10**6,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.budget,
        eos_token_ids=(EOS,),
        num_draft_tokens=plan.num_draft_tokens,
    )
    scheduler = Scheduler(config, blocks)
    asked: dict[str, Arrival] = {}
    salts: dict[str, str | None] = {}
    runner = HashRunner(plan, salts)
    seen = Seen()
    queue = [
        arrival
        for arrival in plan.arrivals
        if blocks.blocks_for(len(arrival.prompt) + arrival.max_tokens) <= plan.num_blocks
    ]

    def arrive() -> None:
        if queue:
            name = f"r{len(asked)}"
            asked[name] = arrival = queue.pop(0)
            salts[name] = arrival.salt
            params = SamplingParams(max_tokens=arrival.max_tokens, prompt_logprobs=arrival.prompt_logprobs)
            scheduler.add(Request(name, arrival.prompt, params, cache_salt=arrival.salt))

    def step() -> None:
        planned = scheduler.schedule()
        if planned is not None:
            assert planned.num_tokens <= plan.budget
            for chunk in scheduler.update(planned, runner.execute(planned)):
                seen.take(chunk)

    def abort(which: int) -> None:
        chunk = scheduler.abort(f"r{which}")
        if chunk is not None:
            seen.take(chunk)

    for event, which in plan.events:
        if event == "arrive":
            arrive()
        elif event == "step":
            step()
        elif event == "abort":
            abort(which)
        elif event == "preempt":
            scheduler.preempt_youngest()
        else:
            blocks.evict(which)
        if checked:
            scheduler.check_integrity()
    while queue:
        arrive()
    for _ in range(10_000):
        if not scheduler.has_work:
            break
        step()
        if checked:
            scheduler.check_integrity()

    assert not scheduler.has_work, "the schedule does not end"
    assert blocks.num_free == plan.num_blocks, "blocks leaked"
    for name, arrival in asked.items():
        alone = one_at_a_time(arrival.prompt, arrival.salt, arrival.max_tokens)
        if seen.reasons[name] is FinishReason.ABORT:
            assert alone[: len(seen.tokens[name])] == seen.tokens[name]
        else:
            assert alone == seen.tokens[name]
            assert seen.reasons[name] is (FinishReason.STOP if alone[-1:] == (EOS,) else FinishReason.LENGTH)
            if arrival.prompt_logprobs is not None:
                followers = arrival.prompt[1:]
                assert seen.prompt_logprobs[name] == (None, *(scored(t, at) for at, t in enumerate(followers)))
    assert set(runner.known) == set(scheduler.take_finished()), "the runner was not told of every end"
    return scheduler


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plans)
def test_a_schedule_changes_nothing(plan: Plan) -> None:
    run(plan)


@pytest.mark.parametrize("what", ["preemption", "prefix hit", "accepted draft", "eviction"])
def test_the_schedules_reach_what_they_are_meant_to_reach(what: str) -> None:
    """Otherwise the property above would hold for want of trying."""
    evictions = accepted = 0

    class Counting(BlockManager):
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
        }[what]

    find(plans, reached, settings=SEARCH)


# ── the property can fail ─────────────────────────────────────────────────────────────────────────────────────────────


class ForgetsTheSalt(BlockManager):
    """Tenants share blocks."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        table.root = root_digest(None)
        return super().find_prefix(table, token_ids)


class ForgetsTheParent(BlockManager):
    """A block is found wherever its own tokens occur, whatever came before them."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        self._unchain(table, token_ids)
        return super().find_prefix(table, token_ids)

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        self._unchain(table, token_ids)
        super().publish(table, token_ids, num_computed)

    def _unchain(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        size = self.block_size
        table.digests = [
            BlockTable(None).digest(0, token_ids[at : at + size], size)
            for at in range(0, len(token_ids) // size * size, size)
        ]


class SharesPartialBlocks(BlockManager):
    """Publishes a block as soon as its first token is computed."""

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        size = self.block_size
        super().publish(table, token_ids, min(-(-num_computed // size) * size, len(token_ids) // size * size))


class SharesRejectedDrafts(BlockManager):
    """Publishes every block of the table, also where only drafts were written."""

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        padded = [*token_ids, *[1] * self.block_size]
        super().publish(table, padded, len(table.blocks) * self.block_size)


class ReusesTheLastToken(BlockManager):
    """Takes the whole prompt from the cache, so that nothing is left to compute the logits of."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        return super().find_prefix(table, [*token_ids, 1])


class KeepsEvictedDigests(BlockManager):
    """Evicts a block but leaves it in the prefix cache."""

    def _evict_one(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        return block


class LeaksSharedBlocks(BlockManager):
    """Forgets to count one of the two who gave a shared block back."""

    def _release(self, block: int) -> None:
        if self._references[block] != 2:
            super()._release(block)


class FreesSharedBlocks(BlockManager):
    """Frees a block with its first holder, though another still reads it."""

    def _release(self, block: int) -> None:
        self._references[block] = 1
        super()._release(block)


FAULTS = [
    ForgetsTheSalt,
    ForgetsTheParent,
    SharesPartialBlocks,
    SharesRejectedDrafts,
    ReusesTheLastToken,
    KeepsEvictedDigests,
    LeaksSharedBlocks,
    FreesSharedBlocks,
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
    [ForgetsTheSalt, ForgetsTheParent, SharesPartialBlocks, SharesRejectedDrafts, KeepsEvictedDigests],
    ids=lambda fault: fault.__name__,
)
def test_its_tokens_alone_give_it_away(fault: type[BlockManager]) -> None:
    find(plans, lambda plan: fails(plan, fault, checked=False), settings=SEARCH)
