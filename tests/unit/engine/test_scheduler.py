"""The scheduler: what is computed when, and what happens when the cache is full."""

from __future__ import annotations

import pytest

from freehold.engine.request import RequestStatus
from freehold.engine.step import SeqOutput
from freehold.errors import ContextTooLong, EngineError, InsufficientMemory, InvalidRequest
from freehold.types import FinishReason, SamplingParams, TokenChunk, TokenLogprobs
from tests.scheduling import EOS, ask, make, run, shape

# ── order and budget ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_to_do() -> None:
    assert make().schedule() is None


def test_a_prompt_is_computed_in_chunks_under_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(ask("a", 24))
    assert [shape(run(scheduler)[0]) for _ in range(4)] == [
        [("a", 0, 10, False)],
        [("a", 10, 10, False)],
        [("a", 20, 4, True)],
        [("a", 24, 1, True)],
    ]


def test_decodes_come_first_and_a_long_prompt_never_stalls_them() -> None:
    scheduler = make(max_num_batched_tokens=10)
    scheduler.add(ask("a", 2, max_tokens=50))
    scheduler.add(ask("b", 2, max_tokens=50))
    run(scheduler)
    scheduler.add(ask("long", 60))
    steps = [run(scheduler)[0] for _ in range(8)]
    for step in steps:
        assert [seq.request_id for seq in step.seqs][:2] == ["a", "b"], "every stream advances in every step"
        assert step.num_tokens <= 10
    assert [seq.samples for seq in steps[7].seqs] == [True, True, True]


def test_no_more_requests_run_than_the_budget_can_decode() -> None:
    scheduler = make(max_num_batched_tokens=3, max_num_seqs=8)
    for name in "abcde":
        scheduler.add(ask(name, 1, max_tokens=50))
    for _ in range(5):
        step, _ = run(scheduler)
    assert sorted(seq.request_id for seq in step.seqs) == ["a", "b", "c"]


def test_the_runner_hears_of_a_request_once_and_of_its_end_once() -> None:
    scheduler = make()
    scheduler.add(ask("a", max_tokens=2))
    first, _ = run(scheduler)
    assert [new.request_id for new in first.new] == ["a"]
    second, chunks = run(scheduler)
    assert second.new == ()
    assert chunks[0].finish_reason is FinishReason.LENGTH
    scheduler.add(ask("b"))
    third, _ = run(scheduler)
    assert third.finished == ("a",)
    assert run(scheduler)[0].finished == ()


def test_a_request_that_never_ran_is_not_reported_to_the_runner() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    scheduler.abort("a")
    assert scheduler.take_finished() == ()


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_eos_ends_a_request_and_is_its_last_token() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    run(scheduler)
    _, [chunk] = run(scheduler, EOS)
    assert (chunk.token_ids, chunk.finish_reason, chunk.stop_token_id) == ((EOS,), FinishReason.STOP, EOS)
    assert chunk.usage.completion_tokens == 2
    assert scheduler.blocks.num_free == 64


def test_ignore_eos_ignores_eos_but_not_stop_tokens() -> None:
    scheduler = make()
    scheduler.add(ask("a", ignore_eos=True, stop_token_ids=(5,)))
    assert run(scheduler, EOS)[1][0].finish_reason is None
    _, [chunk] = run(scheduler, 5)
    assert (chunk.finish_reason, chunk.stop_token_id) == (FinishReason.STOP, 5)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_max_tokens(max_tokens: int) -> None:
    scheduler = make()
    scheduler.add(ask("a", max_tokens=max_tokens))
    chunks = [run(scheduler)[1][0] for _ in range(max_tokens)]
    assert [chunk.finish_reason for chunk in chunks] == [None] * (max_tokens - 1) + [FinishReason.LENGTH]
    assert chunks[-1].stop_token_id is None


def test_max_tokens_zero_only_computes_the_prompt() -> None:
    scheduler = make(num_blocks=2)
    scheduler.add(ask("a", 8, max_tokens=0, prompt_logprobs=0))
    step = scheduler.schedule()
    assert step is not None
    scores = tuple(TokenLogprobs(1, -1.0, 1) for _ in range(7))
    [chunk] = scheduler.update(step, [SeqOutput("a", (1,), prompt_logprobs=scores)])
    assert chunk.token_ids == ()
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.prompt_logprobs == (None, *scores)
    assert chunk.usage.completion_tokens == 0


def test_several_tokens_are_trimmed_at_the_one_that_ends() -> None:
    scheduler = make(num_draft_tokens=3)
    scheduler.add(ask("a"))
    run(scheduler)
    step = scheduler.schedule()
    assert step is not None
    scores = tuple(TokenLogprobs(token, -1.0, 1) for token in (4, EOS, 6, 6))
    output = SeqOutput("a", (4, EOS, 6, 6), logprobs=scores, draft_proposed=3, draft_accepted=3)
    [chunk] = scheduler.update(step, [output])
    assert chunk.token_ids == (4, EOS)
    assert chunk.logprobs == scores[:2]
    assert (chunk.finish_reason, chunk.stop_token_id) == (FinishReason.STOP, EOS)
    assert (chunk.usage.draft_proposed, chunk.usage.draft_accepted) == (3, 2)


def test_several_tokens_are_trimmed_at_max_tokens() -> None:
    scheduler = make(num_draft_tokens=3)
    scheduler.add(ask("a", max_tokens=3))
    run(scheduler)
    _, [chunk] = run(scheduler, 1, 2, 3, 4)
    assert (chunk.token_ids, chunk.finish_reason) == ((1, 2), FinishReason.LENGTH)


def test_accepted_drafts_are_computed_already() -> None:
    scheduler = make(num_draft_tokens=3)
    scheduler.add(ask("a", 3, max_tokens=20))
    run(scheduler)
    step, _ = run(scheduler, 1, 2, 3)
    assert shape(step) == [("a", 3, 1, True)]
    assert len(step.seqs[0].block_ids) * 4 >= 4 + 3, "a place for each draft"
    step, _ = run(scheduler)
    assert shape(step) == [("a", 6, 1, True)]
    assert step.seqs[0].token_ids == (3,)


def test_near_its_limit_a_request_reserves_no_more_than_it_can_use() -> None:
    scheduler = make(num_blocks=2, num_draft_tokens=3)
    scheduler.add(ask("a", 4, max_tokens=5))  # exactly two blocks, without the last token
    for _ in range(5):
        step, [chunk] = run(scheduler)
        assert len(step.seqs[0].block_ids) <= 2
    assert chunk.finish_reason is FinishReason.LENGTH


def test_more_tokens_than_have_a_place_fail_the_request() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    _, [chunk] = run(scheduler, 1, 2)
    assert chunk.finish_reason is FinishReason.ERROR
    assert "returned 2 tokens" in str(chunk.error)


def test_no_token_yet_is_scheduled_again() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    run(scheduler)
    before = scheduler.schedule()
    assert before is not None
    assert scheduler.update(before, [SeqOutput("a")]) == []
    after, _ = run(scheduler)
    assert after.seqs == before.seqs


def test_one_failed_request_leaves_the_others() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    scheduler.add(ask("b"))
    step = scheduler.schedule()
    assert step is not None
    error = InvalidRequest("bad grammar")
    chunks = scheduler.update(step, [SeqOutput("a", error=error), SeqOutput("b", (1,))])
    assert [(chunk.request_id, chunk.finish_reason, chunk.error) for chunk in chunks] == [
        ("a", FinishReason.ERROR, error),
        ("b", None, None),
    ]
    scheduler.check_integrity()


def test_outputs_of_another_step_are_refused() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(EngineError, match="0 outputs for 1"):
        scheduler.update(step, [])
    with pytest.raises(EngineError, match="'b' in the place of 'a'"):
        scheduler.update(step, [SeqOutput("b", (1,))])


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode", "preempted"])
def test_abort(when: str) -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(ask("a", 12))
    for _ in range({"waiting": 0, "prefill": 1, "decode": 3, "preempted": 3}[when]):
        run(scheduler)
    if when == "preempted":
        scheduler.preempt_youngest()
    chunk = scheduler.abort("a")
    assert chunk is not None
    assert (chunk.token_ids, chunk.finish_reason) == ((), FinishReason.ABORT)
    assert scheduler.blocks.num_free == 64
    assert not scheduler.has_work
    assert scheduler.abort("a") is None
    scheduler.check_integrity()


def test_aborted_while_the_step_ran() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    step = scheduler.schedule()
    assert step is not None
    scheduler.abort("a")
    assert scheduler.update(step, [SeqOutput("a", (1,))]) == []
    scheduler.check_integrity()


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_youngest_is_preempted_and_starts_over() -> None:
    scheduler = make(num_blocks=5)
    old, young = ask("old", 8, max_tokens=9), ask("young", 8, max_tokens=9)
    scheduler.add(old)
    scheduler.add(young)
    tokens: dict[str, list[int]] = {"old": [], "young": []}
    for number in range(100, 140):
        if not scheduler.has_work:
            break
        for chunk in run(scheduler, number)[1]:
            tokens[chunk.request_id] += chunk.token_ids
            if chunk.request_id == "old":
                last_of_old = number
    assert scheduler.counters.preemptions == 1
    assert len(tokens["old"]) == len(tokens["young"]) == 9
    assert last_of_old == 108, "the older request never lost a step"


def test_a_preempted_request_replays_prompt_and_output() -> None:
    scheduler = make()
    scheduler.add(ask("a", [21, 22, 23]))
    scheduler.add(ask("b", [31, 32, 33]))
    run(scheduler, 1)
    run(scheduler, 2)
    assert scheduler.preempt_youngest() is scheduler.requests["b"]
    assert scheduler.requests["b"].status is RequestStatus.PREEMPTED
    scheduler.blocks.evict()
    epoch = scheduler.requests["b"].table.epoch
    step, chunks = run(scheduler, 3)
    replay = step.seqs[1]
    assert (replay.request_id, replay.start, replay.token_ids) == ("b", 0, (31, 32, 33, 1, 2))
    assert replay.samples
    assert replay.block_epoch != epoch
    assert step.new == (), "the runner still knows it"
    assert chunks[1].usage.completion_tokens == 3


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    scheduler = make()
    scheduler.add(ask("a", 9, max_tokens=20))
    for _ in range(4):
        run(scheduler)
    scheduler.preempt_youngest()
    step, chunks = run(scheduler)
    assert shape(step) == [("a", 12, 1, True)]
    assert chunks[0].usage.cached_tokens == 0, "usage speaks of what others had computed"
    assert scheduler.counters.prefix_hits == 0


def test_admission_leaves_a_spare_block_for_who_runs() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add(ask("a", 8, max_tokens=5))
    run(scheduler)
    scheduler.add(ask("b", 8, max_tokens=1))
    run(scheduler)  # 3 blocks are held, b needs 2 and one spare
    assert scheduler.requests["b"].status is RequestStatus.WAITING
    while "a" in scheduler.requests:
        run(scheduler)
    run(scheduler)
    assert scheduler.counters.preemptions == 0


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_a_prefix_hit_is_not_computed_again_unless_its_logprobs_are_wanted(prompt_logprobs: int | None) -> None:
    scheduler = make()
    prompt = list(range(100, 110))
    scheduler.add(ask("a", prompt, max_tokens=1))
    run(scheduler)
    scheduler.add(ask("b", prompt, max_tokens=1, prompt_logprobs=prompt_logprobs))
    step = scheduler.schedule()
    assert step is not None
    assert step.seqs[0].start == (8 if prompt_logprobs is None else 0)
    hits, queries = scheduler.counters.prefix_hits, scheduler.counters.prefix_queries
    assert (hits, queries) == ((8, 20) if prompt_logprobs is None else (0, 10))


def test_prompt_logprobs_of_chunks_are_joined_and_survive_a_preemption() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(ask("a", list(range(10)), prompt_logprobs=0))

    def step(preempt: bool = False) -> list[TokenChunk]:
        planned = scheduler.schedule()
        assert planned is not None
        [seq] = planned.seqs
        followers = range(seq.start + 1, min(10, seq.start + len(seq.token_ids) + 1))
        scores = tuple(TokenLogprobs(at, -float(at), 1) for at in followers)
        return scheduler.update(planned, [SeqOutput("a", (1,) if seq.samples else (), prompt_logprobs=scores)])

    assert step() == []
    assert step() == []
    scheduler.preempt_youngest()
    assert step() == step() == []
    [chunk] = step()
    assert chunk.prompt_logprobs is not None
    assert chunk.prompt_logprobs[0] is None
    assert [score and score.token_id for score in chunk.prompt_logprobs[1:]] == list(range(1, 10))
    assert scheduler.requests["a"].prompt_logprobs is None


def test_missing_prompt_logprobs_fail_the_request() -> None:
    scheduler = make()
    scheduler.add(ask("a", 5, prompt_logprobs=0))
    _, [chunk] = run(scheduler)
    assert "scored 0 of 4" in str(chunk.error)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_can_never_fit_is_refused_in_bytes() -> None:
    scheduler = make(num_blocks=10, max_model_len=1000, cache_bytes_per_token=1000)
    scheduler.check(30, SamplingParams(max_tokens=11))  # 40 positions: the last token needs none
    with pytest.raises(InsufficientMemory) as caught:
        scheduler.check(30, SamplingParams(max_tokens=12))
    assert "44,000 bytes" in caught.value.message
    assert "40,000 bytes" in caught.value.message


def test_what_just_fits_runs_to_its_end() -> None:
    scheduler = make(num_blocks=10, num_draft_tokens=2)
    scheduler.add(ask("a", 30, max_tokens=11))
    chunks: list[TokenChunk] = []
    while scheduler.has_work:
        chunks += run(scheduler)[1]
    assert chunks[-1].usage.completion_tokens == 11


def test_context_length() -> None:
    scheduler = make(max_model_len=20)
    scheduler.check(12, SamplingParams(max_tokens=8))
    with pytest.raises(ContextTooLong, match="at most 8 tokens") as caught:
        scheduler.check(12, SamplingParams(max_tokens=9))
    assert caught.value.param == "max_tokens"


def test_empty_prompts_and_used_ids_are_refused() -> None:
    scheduler = make()
    with pytest.raises(InvalidRequest, match="no tokens"):
        scheduler.add(ask("a", 0))
    scheduler.add(ask("a"))
    with pytest.raises(InvalidRequest, match="in use"):
        scheduler.add(ask("a"))
    scheduler.abort("a")
    scheduler.add(ask("a"))


def test_integrity_names_a_lost_request() -> None:
    scheduler = make()
    scheduler.add(ask("a"))
    run(scheduler)
    scheduler.running.clear()
    with pytest.raises(EngineError, match="lost"):
        scheduler.check_integrity()


def test_a_decode_step_costs_the_same_at_any_context() -> None:
    """No work per step may grow with the context: the table's tuple is reused, only the last token is read."""
    scheduler = make(num_blocks=3000, block_size=16, max_model_len=40_000, max_num_batched_tokens=40_000)
    request = ask("a", list(range(30_001)), max_tokens=100)
    scheduler.add(request)
    run(scheduler)
    first, _ = run(scheduler)
    second, _ = run(scheduler)
    assert second.seqs[0].block_ids is first.seqs[0].block_ids
    assert second.seqs[0].token_ids == (1,)
    assert len(request.table.digests) == 30_001 // 16
