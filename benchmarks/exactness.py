"""How exact are the fast paths? What batching, speculation-sized steps, chunks and quantisation change in bf16.

Every case runs the same random prompt, longer than index_topk, through the native kernels with teacher forcing:

- batched: the last tokens one at a time, and 2, 5, 8 and 16 in one step. Up to 16 rows reduce in one order, so the
  logits must be equal bit for bit; any difference fails.
- prefill-shaped: all tokens in chunks of 512. Large products sum in another order, so logits differ a little; the
  greedy token may differ from the decode-shaped path's only where the decode-shaped top two are nearer than TOLERANCE.
  How often it differs is printed. It is a property of the model too: weights are random here, so the top two are often
  nearly equal, and a flipped choice of an expert or a token moves logits more than a rounding does. How much rounding
  alone moves them is printed first: the plain PyTorch reference in bf16 beside itself in fp32.

The fp32 path is exact, and `oracle_parity.py` shows it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field
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
"""Between the top two logits, in standard deviations of a row of logits."""
KINDS: tuple[Quantize | None, ...] = (None, "int8", "int4", "fp8")
PROMPT, CHUNK = 512, 512


def prompt(config: GlmConfig, seed: int, scored: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, config.vocab_size - 200, (PROMPT + scored,), generator=generator).tolist()
    return tokens


def logits_of(model: Glm, tokens: list[int], cache: PagedCache, start: int, rows: int) -> Tensor:
    """Logits of every token from `start`, computed `rows` at a time on the cache of those before."""
    parts = []
    for first in range(start, len(tokens), rows):
        inputs = single_sequence(tokens[first : first + rows], start=first, block_size=cache.block_size)
        parts.append(model.logits(model(inputs, cache)))
    return torch.cat(parts).float()


def case(model: Glm, config: GlmConfig, seed: int, scored: int) -> tuple[int, Tensor, Tensor]:
    """(rows of batched logits that differ, decode-shaped and prefill-shaped logits of the last `scored` tokens)."""
    tokens = prompt(config, seed, scored)
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


@dataclass
class Flips:
    """Where one path's greedy token is not another's. widest: gap of the first's top two there, as TOLERANCE."""

    total: int = 0
    flips: int = 0
    widest: float = 0.0
    errors: list[float] = field(default_factory=list)

    def add(self, first_TV: Tensor, second_TV: Tensor) -> None:
        top = first_TV.topk(2, dim=-1)
        flipped = top.indices[:, 0] != second_TV.argmax(-1)
        gaps = ((top.values[:, 0] - top.values[:, 1]) / first_TV.std(-1))[flipped]
        self.total, self.flips = self.total + len(flipped), self.flips + int(flipped.sum())
        self.widest = max(self.widest, float(gaps.max()) if len(gaps) else 0.0)
        self.errors.append(float((first_TV - second_TV).abs().median()))

    def show(self, report: Report, name: str, what: str) -> None:
        typical = sum(self.errors) / len(self.errors)
        print(
            f"{name}: {what} greedy token differs {self.flips} times in {self.total} ({self.flips / self.total:.2%}); "
            f"widest gap of those {self.widest:.3g}; median |difference of logits| {typical:.2g}",
            flush=True,
        )
        found = {"tokens": self.total, "flips": self.flips, "widest_gap": self.widest, "median_error": typical}
        report.samples[name] = found


def rounding(report: Report, directory: Path, config: GlmConfig, prompts: int, scored: int) -> None:
    """The reference in bf16 and in fp32, prefill-shaped."""
    found = Flips()
    models = [load_model(directory, config, EngineOptions(ops="reference", dtype=t)) for t in ("float32", "bfloat16")]
    for seed in range(prompts):
        tokens = prompt(config, seed, scored)
        with torch.inference_mode():
            exact, rounded = (
                logits_of(model, tokens, PagedCache(config, len(tokens) // 64 + 1, 64, model.dtype), 0, CHUNK)[PROMPT:]
                for model in models
            )
        found.add(exact, rounded)
    found.show(report, "reference", "rounded to bf16, fp32's")


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("exactness", args.quick)
    prompts, scored = (2, 128) if args.quick else (16, 512)
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(directory, "small")
        config = GlmConfig.from_file(directory)
        rounding(report, Path(directory), config, prompts if args.quick else 4, scored)
        for kind in KINDS:
            model = load_model(Path(directory), config, EngineOptions(quantize=kind))
            name, different, found = kind or "bf16", 0, Flips()
            for seed in range(prompts):
                rows, decoded, prefilled = case(model, config, seed, scored)
                different += rows
                found.add(decoded, prefilled)
            found.show(report, name, "the prefill-shaped")
            report.bar(f"{name}: rows of batched steps that differ from single ones", different, "==", 0)
            gap = "widest top-2 gap where prefill-shaped differs, standard deviations"
            report.bar(f"{name}: {gap}", found.widest, "<", TOLERANCE)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
