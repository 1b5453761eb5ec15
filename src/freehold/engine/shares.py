"""How the prompts that are not finished share what the decodes left of a step's budget. Torch-free.

    half      in order of arrival: the oldest prompt always gets at least half, whatever arrives after it;
    the rest  shortest first: a short prompt behind a long one is computed in the next step, not after it.

Hence two bounds, whatever else arrives. A prompt is finished within `left / half + n` steps; `left` are the tokens
that it and the n - 1 prompts before it have left. And a prompt that runs is finished in the next step if it and all
that have fewer tokens left fit in the other half. In either order prompts are finished one after another, so at most
two chunks of a step end inside a prompt, and chunks stay long.

A prompt whose next block another one computes in this very step waits a step, and then finds it in the prefix cache:
of several equal prompts that arrive together only one is computed.

Sharing a step between prompts and decodes is Sarathi-Serve's (Agrawal et al., OSDI 2024, chunked prefill).
"""

from __future__ import annotations

from collections.abc import Sequence

from freehold.engine.request import Request


def share(prompts: Sequence[Request], budget: int, block_size: int | None) -> list[tuple[Request, int]]:
    """(prompt, tokens to compute now), in order of arrival, for those that get any.

    prompts: requests with tokens to compute, in order of arrival. budget: tokens, at least 1; all of it is given out
    unless prompts end or wait. block_size: of the prefix cache; None: there is none, and nobody waits.
    """
    shares = _Shares(block_size)
    left = budget // 2 + shares.give(prompts, budget - budget // 2)
    shares.give(sorted(prompts, key=_tokens_left), left)
    return [(prompt, shares.given[prompt.sequence]) for prompt in prompts if prompt.sequence in shares.given]


def _tokens_left(prompt: Request) -> int:
    return prompt.num_tokens - prompt.num_computed_tokens


class _Shares:
    """given: tokens by the request's place in the order of arrival."""

    def __init__(self, block_size: int | None) -> None:
        self.given: dict[int, int] = {}
        self._block_size = block_size
        self._coming: set[bytes] = set()  # digests of the blocks that this step fills

    def give(self, prompts: Sequence[Request], budget: int) -> int:
        """Give to each in turn as much as it can use; returns what is left."""
        for prompt in prompts:
            if budget < 1:
                break
            before = self.given.get(prompt.sequence, 0)
            more = min(budget, _tokens_left(prompt) - before)
            if more < 1 or (not before and self._should_wait(prompt)):
                continue
            self.given[prompt.sequence] = before + more
            self._note(prompt, prompt.num_computed_tokens + before, more)
            budget -= more
        return budget

    def _should_wait(self, prompt: Request) -> bool:
        """Whether the next tokens of a prompt are a block that somebody fills in this step, and that it could take."""
        size = self._block_size
        if size is None or prompt.prompt_logprobs is not None:
            return False
        index = prompt.num_computed_tokens // size
        whole = (prompt.num_tokens - 1) // size  # the last token has to be computed for its logits
        return index < whole and prompt.table.digest(index, prompt.token_ids, size) in self._coming

    def _note(self, prompt: Request, start: int, count: int) -> None:
        if size := self._block_size:
            for index in range(start // size, (start + count) // size):
                self._coming.add(prompt.table.digest(index, prompt.token_ids, size))
