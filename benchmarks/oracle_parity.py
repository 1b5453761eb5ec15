"""Is the engine's output right? Compare it with `transformers` on random checkpoints, in fp32, through every path.

Each configuration is written to disk as a checkpoint, read by `transformers` with its own loader, and by us. Prompts
are longer than index_topk. For every path the engine generates greedily; then

* the tokens must be those that `transformers` generates, and
* the logits of every row the engine computed must be within 1e-4 of `transformers`' for the same sequence.

The oracle's latent-norm eps (1e-6) is reproduced by our switch, and its indexer's top-k is replaced by a stable sort:
ReLU makes many scores exactly 0, and torch.topk picks among equals arbitrarily. The unpatched oracle is shown too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import Report, arguments

from freehold.engine.engine import Engine, EngineConfig
from freehold.engine.request import Request
from freehold.engine.runner import ModelRunner
from freehold.engine.sampler import Sampler
from freehold.engine.step import StepInput
from freehold.model.cache import PagedCache
from freehold.model.glm import Glm
from freehold.model.inputs import ForwardInput
from freehold.model.oracle import compare_layers, load_oracle, load_ours, stable_selection
from freehold.model.sizes import size_config
from freehold.model.tiny import write_random_checkpoint
from freehold.types import SamplingParams, TokenChunk

NEW_TOKENS = 200
PROMPT = 300
TOLERANCE = 1e-4


def configs() -> dict[str, dict[str, Any]]:
    """Variations on the smallest architecture; together they vary every size and every way to give the pattern."""
    base = size_config("nano") | {"index_topk": 8, "dtype": "float32"}
    pattern = {
        key: base[key] for key in base if key not in ("indexer_types", "index_topk_freq", "index_skip_topk_offset")
    }
    return {
        "topk8 (indexer_types)": base,
        "all sizes differ": base
        | {
            "vocab_size": 384, "eos_token_id": [320, 327, 329], "pad_token_id": 320, "hidden_size": 96,
            "intermediate_size": 80, "moe_intermediate_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3,
            "q_lora_rank": 40, "kv_lora_rank": 56, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "qk_head_dim": 40,
            "v_head_dim": 20, "head_dim": 24, "index_n_heads": 5, "index_head_dim": 48, "index_topk": 13,
            "n_routed_experts": 12, "num_experts_per_tok": 3,
        },
        "index_topk_pattern": pattern | {"indexer_types": None, "index_topk_pattern": "FSFFSSFS"},
        "freq 3 offset 2": pattern | {"indexer_types": None, "index_topk_freq": 3, "index_skip_topk_offset": 2},
        "n_group 4": base | {"n_group": 4, "topk_group": 2},
        "attention_bias": base | {"attention_bias": True},
        "no top-k normalising": base | {"norm_topk_prob": False, "n_shared_experts": 2, "index_topk": 32},
    }  # fmt: skip


class RecordingRunner(ModelRunner):
    """Keeps the logits of every row it computes: {request: {position: logits}}."""

    def __init__(self, model: Glm, cache: PagedCache, sampler: Sampler) -> None:
        super().__init__(model, cache, sampler)
        self.rows: dict[str, dict[int, torch.Tensor]] = {}

    def _sample(self, model: Glm, step: StepInput, inputs: ForwardInput, hidden_TH: torch.Tensor, drafts: Any) -> Any:
        logits = model.logits(hidden_TH)
        row = 0
        for seq in step.seqs:
            for offset in range(len(seq.token_ids)):
                self.rows.setdefault(seq.request_id, {})[seq.start + offset] = logits[row + offset].clone()
            row += len(seq.token_ids)
        return super()._sample(model, step, inputs, hidden_TH, drafts)


class Session:
    """A fresh engine on a loaded model."""

    def __init__(
        self, model: Glm, *, chunk: int = 2048, blocks: int = 512, block_size: int = 16, seqs: int = 16
    ) -> None:
        config = model.config
        self.runner = RecordingRunner(
            model,
            PagedCache(config, blocks, block_size, model.dtype),
            Sampler(config.vocab_size, config.eos_token_ids, None),
        )
        self.engine = Engine(
            EngineConfig(
                model_name="parity",
                max_model_len=4096,
                block_size=block_size,
                num_blocks=blocks,
                max_num_seqs=seqs,
                max_num_batched_tokens=chunk,
                eos_token_ids=config.eos_token_ids,
                vocab_size=config.vocab_size,
                cache_bytes_per_token=1,
            ),
            self.runner,
        )

    def generate(self, prompts: dict[str, list[int]], new_tokens: int) -> dict[str, list[int]]:
        """All prompts at once, greedily, without stopping at eos; returns prompt + generated tokens."""
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for name, prompt in prompts.items():
            self.engine.add(Request(name, tuple(prompt), params))
        sequences = {name: list(prompt) for name, prompt in prompts.items()}
        while self.engine.has_work:
            for chunk in self.engine.step():
                sequences[chunk.request_id].extend(_checked(chunk).token_ids)
        return sequences


def _checked(chunk: TokenChunk) -> TokenChunk:
    if chunk.error is not None:
        raise chunk.error
    return chunk


def oracle_tokens(oracle: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """`transformers`' own greedy generation, with its own cache."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return list(out[0].tolist())


def error_of(session: Session, sequences: dict[str, list[int]], oracle: Any) -> float:
    """The largest |logit difference| over every row the engine computed."""
    worst = 0.0
    for name, sequence in sequences.items():
        with torch.inference_mode():
            theirs = oracle(torch.tensor([sequence])).logits[0]
        for position, mine in session.runner.rows[name].items():
            difference = float((mine - theirs[position]).abs().max())
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def paths(
    model: Glm, prompt: list[int], others: list[list[int]], new: int
) -> dict[str, tuple[Session, dict[str, list[int]]]]:
    """Every way a sequence can go through the engine."""
    found = {}
    session = Session(model)
    found["one-shot prefill, decode"] = (session, session.generate({"a": prompt}, new))
    session = Session(model, chunk=37)
    found["chunked prefill"] = (session, session.generate({"a": prompt}, new))
    session = Session(model)
    session.generate({"first": prompt}, 1)
    session.runner.rows.clear()
    found["prefix-cache hit"] = (session, session.generate({"a": prompt}, new))
    assert min(session.runner.rows["a"]) >= len(prompt) // 16 * 16 - 16, "the prefix cache was not hit"
    session = Session(model, chunk=256)
    batch = {"a": prompt} | {f"other{i}": other for i, other in enumerate(others)}
    found[f"batch of {len(batch)} mixed lengths"] = (session, session.generate(batch, new))
    # Blocks for the three prompts and little more: the batch can only finish by preempting.
    batch = {"a": prompt, "b": others[0], "c": list(reversed(prompt))}
    session = Session(model, block_size=4, blocks=sum(-(-len(tokens) // 4) for tokens in batch.values()) + 2)
    found["after preemption"] = (session, session.generate(batch, new))
    assert session.engine.stats().preemptions > 0, "nothing was preempted"
    return found


def check(report: Report, name: str, config: dict[str, Any], new: int, *, unpatched: bool) -> None:
    print(f"{name}")
    generator = torch.Generator().manual_seed(1)
    limit = min(config["eos_token_id"])
    draw = lambda n: torch.randint(0, limit, (n,), generator=generator).tolist()  # noqa: E731
    prompt, others = draw(PROMPT), [draw(n) for n in (257, 5, 90, 8, 9, 301, 33)]
    with tempfile.TemporaryDirectory() as directory:
        write_random_checkpoint(config, Path(directory), seed=3, dtype="float32")
        ours, oracle = load_ours(directory), load_oracle(directory)
    with stable_selection():
        expected = oracle_tokens(oracle, prompt, new)
        for path, (session, sequences) in paths(ours, prompt, others, new).items():
            error = error_of(session, sequences, oracle)
            same = sum(a == b for a, b in zip(sequences["a"], expected, strict=True)) - len(prompt)
            report.samples.setdefault(name, {})[path] = {"max_logit_error": error, "same_tokens": same}
            report.bar(f"{name}: {path}: max |logit - oracle|", error, "<=", TOLERANCE)
            report.bar(f"{name}: {path}: equal greedy tokens", same, "==", new)
        first = next((point.point for point in compare_layers(ours, oracle, prompt) if point.differs), "none")
    if unpatched:
        wrong = [point for point in compare_layers(ours, oracle, prompt) if point.differs]
        told = wrong[0].point if wrong else "none"
        print(f"  no bar: first differing point, stable oracle: {first}; with the oracle's own tie order: {told}")
        report.samples[name]["unpatched_first_difference"] = told


def main() -> int:
    parser = arguments(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(2)
    report = Report("oracle_parity", args.quick)
    chosen = configs()
    if args.quick:
        chosen = {name: chosen[name] for name in ("topk8 (indexer_types)", "all sizes differ")}
    for name, config in chosen.items():
        check(report, name, config, 40 if args.quick else NEW_TOKENS, unpatched=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
