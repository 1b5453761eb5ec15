"""A deterministic engine without a model, for tests, clients and plans: the real scheduler, canned text, no torch.

What it says is in `sim_text`: GLM's reasoning and tool grammar, JSON by schema, echoes. The same prompt and parameters
always give the same tokens, whatever else runs, as from a real engine. Beside text it simulates

* time: `seconds_per_step` and `seconds_per_prefill_token` (both 0 by default);
* speculative decoding: with `num_draft_tokens` = k, steps give 1 to k+1 tokens, each draft accepted with
  `acceptance_rate`;
* logprobs and prompt_logprobs: made up, but distributions that sum to 1;
* faults, on demand: by `SimConfig.faults`, or by a request itself, with directives in its last user message:

    [[sim error after=3]]             the request fails after 3 tokens (default 0)
    [[sim crash after=3]]             the runner raises, and the engine is dead
    [[sim stall seconds=2 after=3]]   this request gets no token for 2 s; others do
    [[sim slow seconds=0.1]]          every step with this request takes 0.1 s longer, for everybody
    [[sim words=200]]                 an answer of 200 words
    [[sim reasoning=50]]              reasoning of 50 words
    [[sim unclosed]]                  a tool call inside the reasoning, without </think>

A directive that is none of these fails its request. Never run this engine for anything but tests and demonstrations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.sim_text import Script, Style, read_prompt
from freehold.engine.step import NewRequest, ScheduledSeq, SeqOutput, StepInput
from freehold.errors import EngineError, FreeholdError, InvalidRequest
from freehold.model.tokenizer import Tokenizer
from freehold.types import TokenLogprobs

_EOS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_NAP = 0.005  # seconds between looks at requests that are all stalled
_DECAY = 0.4  # probability of rank r is (1 - _DECAY) * _DECAY^(r-1), normalised over the vocabulary

FaultKind = Literal["error", "crash", "stall", "slow"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, in every `every`-th request (the first is number 1), once it has `after` tokens.

    seconds: of a stall (once), or of every slow step.
    """

    kind: FaultKind
    after: int = 0
    seconds: float = 0.0
    every: int = 1


def _default_reasoning() -> Mapping[str, int]:
    return {"Low": 8, "High": 16, "Max": 48}


@dataclass(frozen=True, slots=True)
class SimConfig:
    """How the simulation behaves. Times in seconds; reasoning_words by effort header of the template."""

    vocab_size: int = 2048
    seed: int = 0
    seconds_per_step: float = 0.0
    seconds_per_prefill_token: float = 0.0
    num_draft_tokens: int = 0
    acceptance_rate: float = 0.7
    reasoning_words: Mapping[str, int] = field(default_factory=_default_reasoning)
    faults: tuple[Fault, ...] = ()


class _Generation:
    """One request as the simulation sees it; the script is written when its first token is due."""

    def __init__(self, new: NewRequest, number: int, config: SimConfig, tokenizer: Tokenizer) -> None:
        self.prompt_token_ids = new.prompt_token_ids
        self.params = new.params
        self.stalled_until: float | None = None
        prompt = read_prompt(new.prompt_token_ids, tokenizer)
        faults, style = _parse_directives(prompt.directives, Style(config.reasoning_words))
        self.faults = faults + [fault for fault in config.faults if number % fault.every == 0]
        self.script = Script(prompt, new.params, style, tokenizer)

    def fault(self, kind: FaultKind, index: int) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind == kind and index >= fault.after), None)


class SimRunner:
    """Implements `step.Runner`. clock and sleep may be virtual; `step_seconds` may be overridden by a latency model."""

    def __init__(
        self,
        config: SimConfig,
        tokenizer: Tokenizer,
        *,
        block_size: int = 64,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._clock = clock
        self._sleep = sleep
        self._active: dict[str, _Generation | FreeholdError] = {}
        self._number = 0

    def execute(self, step: StepInput) -> list[SeqOutput]:
        self.release(step.finished)
        for new in step.new:
            self._number += 1
            self._active[new.request_id] = self._begin(new)
        seconds = self.step_seconds(step)
        if seconds > 0:
            self._sleep(seconds)
        outputs = [self._advance(seq) for seq in step.seqs]
        if all(seq.samples and not (out.token_ids or out.error) for seq, out in zip(step.seqs, outputs, strict=True)):
            self._sleep(_NAP)  # all are stalled
        return outputs

    def _begin(self, new: NewRequest) -> _Generation | FreeholdError:
        """A request that cannot be understood fails alone."""
        try:
            return _Generation(new, self._number, self.config, self._tokenizer)
        except FreeholdError as error:
            return error
        except Exception as error:  # a schema that is none
            return EngineError(f"the simulated engine cannot answer this: {type(error).__name__}: {error}")

    def step_seconds(self, step: StepInput) -> float:
        """How long this step takes."""
        prefill = sum(len(seq.token_ids) for seq in step.seqs if len(seq.token_ids) > 1)
        slow = 0.0
        for seq in step.seqs:
            generation = self._active[seq.request_id]
            if isinstance(generation, _Generation) and (
                fault := generation.fault("slow", self._index(seq, generation))
            ):
                slow = max(slow, fault.seconds)
        return self.config.seconds_per_step + prefill * self.config.seconds_per_prefill_token + slow

    def release(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self._active.pop(request_id, None)

    def close(self) -> None:
        self._active.clear()

    @staticmethod
    def _index(seq: ScheduledSeq, generation: _Generation) -> int:
        """Index in the output of the token that this sequence gets next."""
        return max(0, seq.start + len(seq.token_ids) - len(generation.prompt_token_ids))

    def _advance(self, seq: ScheduledSeq) -> SeqOutput:
        generation = self._active[seq.request_id]
        if isinstance(generation, FreeholdError):
            return SeqOutput(seq.request_id, error=generation)
        scored = self._score_prompt(seq, generation)
        if not seq.samples:
            return SeqOutput(seq.request_id, prompt_logprobs=scored)
        index = self._index(seq, generation)
        if generation.fault("crash", index):
            raise EngineError(f"simulated crash of the runner ({seq.request_id} had {index} tokens)")
        if generation.fault("error", index):
            return SeqOutput(
                seq.request_id, error=EngineError(f"simulated failure of this request after {index} tokens")
            )
        if self._stalls(generation, index):
            return SeqOutput(seq.request_id, prompt_logprobs=scored)
        proposed, accepted = self._draft(seq, generation, index)
        token_ids = tuple(generation.script.token(index + n) for n in range(accepted + 1))
        most = generation.params.logprobs
        logprobs = (
            None
            if most is None
            else tuple(self._score(generation, index + n, token_id, most) for n, token_id in enumerate(token_ids))
        )
        return SeqOutput(seq.request_id, token_ids, logprobs, scored, proposed, accepted)

    def _stalls(self, generation: _Generation, index: int) -> bool:
        fault = generation.fault("stall", index)
        if fault is None:
            return False
        if generation.stalled_until is None:
            generation.stalled_until = self._clock() + fault.seconds
        return self._clock() < generation.stalled_until

    def _draft(self, seq: ScheduledSeq, generation: _Generation, index: int) -> tuple[int, int]:
        """(proposed, accepted) drafts. A step that computes a prompt has none: drafts come from the step before."""
        if index == 0 or len(seq.token_ids) > 1:
            return 0, 0
        room = len(seq.block_ids) * self._block_size - seq.start - 1
        proposed = min(self.config.num_draft_tokens, room)
        accepted = 0
        while (
            accepted < proposed and self._chance(generation, b"draft", index + accepted) < self.config.acceptance_rate
        ):
            accepted += 1
        return proposed, accepted

    def _chance(self, generation: _Generation, purpose: bytes, index: int) -> float:
        """A number in [0, 1) that depends on the request's text, the seed and the index, and on nothing else."""
        data = generation.script.key + purpose + b"%d %d" % (self.config.seed, index)
        return int.from_bytes(blake2b(data, digest_size=6).digest()) / 2**48

    # ── logprobs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _score_prompt(self, seq: ScheduledSeq, generation: _Generation) -> tuple[TokenLogprobs, ...] | None:
        most = generation.params.prompt_logprobs
        if most is None:
            return None
        followers = generation.prompt_token_ids[seq.start + 1 : seq.start + len(seq.token_ids) + 1]
        return tuple(
            self._score(generation, at - len(generation.prompt_token_ids), token_id, most)
            for at, token_id in enumerate(followers, seq.start + 1)
        )

    def _score(self, generation: _Generation, index: int, token_id: int, most: int) -> TokenLogprobs:
        """A geometric distribution over the vocabulary, in which the token has rank 1 mostly, and 2 or 3 sometimes."""
        size = self._tokenizer.vocab_size
        most = min(most, size)
        chance = self._chance(generation, b"rank", index)
        rank = 1 if chance < 0.8 else 2 if chance < 0.95 else 3
        base = int(self._chance(generation, b"others", index) * size)
        # `most` other tokens, from a pseudo-random place in the vocabulary on.
        others = [other % size for other in range(base, base + most + 1) if other % size != token_id]
        ranked = [*others[: rank - 1], token_id, *others[rank - 1 :]][:most]
        top = tuple((other, _logprob(place, size)) for place, other in enumerate(ranked, 1))
        return TokenLogprobs(token_id, _logprob(rank, size), rank, top)


def _logprob(rank: int, vocab_size: int) -> float:
    return math.log1p(-_DECAY) + (rank - 1) * math.log(_DECAY) - math.log1p(-(_DECAY**vocab_size))


def _parse_directives(directives: tuple[str, ...], style: Style) -> tuple[list[Fault], Style]:
    """Faults and style that a message asks for. Raises InvalidRequest for a directive that does not exist."""
    faults: list[Fault] = []
    words, thoughts, unclosed = style.answer_words, style.thought_words, style.unclosed
    for directive in directives:
        try:
            verb, *options = directive.split()
            name, _, value = verb.partition("=")
            if name in ("error", "crash", "stall", "slow"):
                given = dict(option.split("=") for option in options)
                after, seconds = int(given.pop("after", 0)), float(given.pop("seconds", 0.0))
                if given or value or after < 0 or not 0 <= seconds < math.inf:
                    raise ValueError
                faults.append(Fault(name, after, seconds))  # type: ignore[arg-type]
            elif name == "words" and not options:
                words = int(value)
            elif name == "reasoning" and not options:
                thoughts = int(value)
            elif directive.strip() == "unclosed":
                unclosed = True
            else:
                raise ValueError
        except ValueError:
            raise InvalidRequest(
                f"[[sim{directive}]] is no directive of the simulated engine; freehold.engine.sim lists them"
            ) from None
    return faults, Style(style.reasoning_words, words, thoughts, unclosed)


def build_sim_engine(
    sim: SimConfig | None = None,
    *,
    model_name: str = "freehold-sim",
    max_model_len: int = 131_072,
    block_size: int = 64,
    num_blocks: int = 8_192,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2_048,
    max_queue: int = 256,
    enable_prefix_cache: bool = True,
    adapters: tuple[str, ...] = (),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Engine, Tokenizer]:
    """A real engine around a SimRunner, and the tokenizer it speaks. The sizes are those of `EngineConfig`.

    adapters: names that requests may give; what is said does not depend on them.
    """
    sim = SimConfig() if sim is None else sim
    tokenizer = Tokenizer.toy(sim.vocab_size)
    ends = (tokenizer.special_id(text) for text in _EOS)
    config = EngineConfig(
        model_name=model_name,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        eos_token_ids=tuple(token_id for token_id in ends if token_id is not None),
        vocab_size=sim.vocab_size,
        cache_bytes_per_token=1,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        enable_prefix_cache=enable_prefix_cache,
        num_draft_tokens=sim.num_draft_tokens,
        adapters=adapters,
    )
    runner = SimRunner(sim, tokenizer, block_size=block_size, clock=clock, sleep=sleep)
    return Engine(config, runner, clock=clock), tokenizer
