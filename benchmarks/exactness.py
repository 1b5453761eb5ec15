"""How exact are the fast paths? What batching, speculation-sized steps, chunks and quantisation change in bf16.

Every case runs the same random prompt, longer than index_topk, through the native kernels with teacher forcing:

- batched: the last tokens one at a time, and 2, 5, 8 and 16 in one step. Up to 16 rows reduce in one order, so the
  logits must be equal bit for bit; any difference fails.
- prefill-shaped: all tokens in chunks of 512. Large products sum in another order, so logits differ a little; the
  greedy token may differ from the decode-shaped path's only where the decode-shaped top two are nearer than TOLERANCE.
  How often it differs is printed. It is a property of the model too: weights are random here, so the top two are often
  nearly equal, and a flipped choice of an expert or a token moves logits more than a rounding does.

The fp32 path is exact, and `oracle_parity.py` shows it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from _common import Report, arguments
from torch import Tensor

from freehold.engine.loading import EngineOptions, load_model
from freehold.model.cache import PagedCache
from freehold.model.config import GlmConfig
from freehold.model.glm import Glm
from freehold.model.inputs import single_sequence
from freehold.model.packing import Quantize
from freehold.model.tiny import make_tiny

TOLERANCE = 1.0
"""Between the top two logits; their standard deviation over the vocabulary is about 2."""
KINDS: tuple[Quantize | None, ...] = (None, "int8", "int4", "fp8")
PROMPT, CHUNK = 512, 512


def logits_of(model: Glm, tokens: list[int], cache: PagedCache, start: int, rows: int) -> Tensor:
    """Logits of every token from `start`, computed `rows` at a time on the cache of those before."""
    parts = []
    for first in range(start, len(tokens), rows):
        inputs = single_sequence(tokens[first : first + rows], start=first, block_size=cache.block_size)
        parts.append(model.logits(model(inputs, cache)))
    return torch.cat(parts).float()


def case(model: Glm, config: GlmConfig, seed: int, scored: int) -> tuple[int, Tensor, Tensor]:
    """(rows of batched logits that differ, decode-shaped and prefill-shaped logits of the last `scored` tokens)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size - 200, (PROMPT + scored,), generator=generator).tolist()
    cache = PagedCache(config, len(tokens) // 64 + 1, 64, torch.bfloat16)
    with torch.inference_mode():
        prefilled = logits_of(model, tokens, cache, 0, CHUNK)[PROMPT:]
        # The prompt's cache rows are those of the prefill; the scored tokens overwrite theirs.
        decoded = logits_of(model, tokens, cache, PROMPT, 1)
        different = 0
        for rows in (2, 5, 8, 16):
            together = logits_of(model, tokens, cache, PROMPT, rows)
            different += int((together != decoded).any(-1).sum())
    return different, decoded, prefilled


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("exactness", args.quick)
    prompts, scored = (2, 128) if args.quick else (16, 512)
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(directory, "small")
        config = GlmConfig.from_file(directory)
        for kind in KINDS:
            model = load_model(Path(directory), config, EngineOptions(quantize=kind))
            different, flips, widest, total = 0, 0, 0.0, 0
            errors = []
            for seed in range(prompts):
                rows, decoded, prefilled = case(model, config, seed, scored)
                top = decoded.topk(2, dim=-1)
                flipped = top.indices[:, 0] != prefilled.argmax(-1)
                gaps = (top.values[:, 0] - top.values[:, 1])[flipped]
                different, flips, total = different + rows, flips + int(flipped.sum()), total + len(flipped)
                widest = max(widest, float(gaps.max()) if len(gaps) else 0.0)
                errors.append(float((decoded - prefilled).abs().median()))
            name = kind or "bf16"
            typical = sum(errors) / len(errors)
            print(
                f"{name}: the prefill-shaped greedy token differs {flips} times in {total} ({flips / total:.2%}); "
                f"widest gap of those {widest:.3g}; median |difference of logits| {typical:.2g}"
            )
            report.samples[name] = {"tokens": total, "flips": flips, "widest_gap": widest, "median_error": typical}
            report.bar(f"{name}: rows of batched steps that differ from single ones", different, "==", 0)
            report.bar(f"{name}: widest top-2 gap where prefill-shaped differs", widest, "<", TOLERANCE)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
