"""Is the embedded engine faster than llama.cpp on the same CPU, at equal weight bits? Both in one run.

The same random checkpoint is loaded by Freehold (bf16, int8, int4) and, through llama.cpp's own converter and
quantiser, by llama.cpp (BF16, Q8_0, Q4_0) in a process of its own. First their logits must agree. Then the engines
take turns, one idle while the other is timed; medians are compared and raw samples are kept.

- Freehold: `Engine.step`: scheduler, batch, model and greedy sampler all count; prefill in its best chunk size.
- llama.cpp: `llama_decode` alone, each case with the fastest of its settings (flash attention, ubatch, one cache for
  all sequences or one each), found by trying them. Its cache is f16, its default.
- Contexts beyond 512 tokens are not prefilled before decoding: both caches are filled with random numbers that have
  the mean and spread of really computed ones.
- A prefill that would take llama.cpp more than a minute is timed once for it, in full.
- The machine's ceilings (memory bandwidth, matrix products) are measured before each sample that is compared with them:
  on a shared machine they change from minute to minute.

llama.cpp is taken from --llamacpp DIR or FREEHOLD_LLAMACPP if set; otherwise its source is fetched with pip and
compiled into benchmarks/.peers, once. `--quick` never builds.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from _common import Report, arguments
from _engine import Ours, best_chunk, prompt_of
from _llamacpp import PEERS, Install, Peer, PeerFailed, build, convert, find
from _needs import decode_bytes, prefill_operations

from freehold.engine.bench.ceilings import measure_ceilings
from freehold.model.cache import PagedCache
from freehold.model.inputs import single_sequence
from freehold.model.oracle import load_ours
from freehold.model.tiny import make_tiny
from freehold.model.traffic import Ceilings

FILLED_ABOVE = 512
ONCE_ABOVE = 60.0  # seconds
PAUSE = 0.05  # seconds in which the threads of the engine that was just timed go to sleep
KINDS = {"bf16": None, "int8": "Q8_0", "int4": "Q4_0"}
CASES = {
    "small": "decode@128 decode@4096 decode@16384 decode@65536 batch8@512 prefill@512 prefill@4096 prefill@16384",
    "medium": "decode@128 decode@4096 decode@16384 prefill@512",
}
QUICK_CASES = "decode@128 decode@4096 batch8@512 prefill@512"
# Times llama.cpp's speed, with any weights.
BARS = {
    "small": {
        "decode@128": 1.0, "decode@4096": 1.5, "decode@16384": 2.5, "decode@65536": 6.0, "batch8@512": 1.3,
        "prefill@512": 1.5, "prefill@4096": 5.0, "prefill@16384": 10.0,
    },
    "medium": {"decode@128": 1.0, "decode@4096": 1.6, "decode@16384": 2.2, "prefill@512": 1.5},
}  # fmt: skip
ROOFLINE_BARS = {
    ("medium", "decode@128", "bf16"): 0.6,
    ("medium", "decode@128", "int8"): 0.6,
    ("medium", "decode@128", "int4"): 0.5,
    ("medium", "prefill@512", "bf16"): 0.5,
}
# What must agree: see `agree_exactly` and `agree`. In bf16 a deeper model drifts further; another model is off by 1.
EXACT_TOP1, EXACT_DIFFERENCE = 0.98, 1e-4
BF16_TOKENS, BF16_TOP1, BF16_DIFFERENCE = 200, {"nano": 0.8, "small": 0.8, "medium": 0.7}, 0.2


@dataclass
class Row:
    """One case: raw seconds of a step (decode) or of a prompt (prefill), and tokens in each.

    shares: for a case with a roofline bar, of each round: the time that the ceilings allow over the time it took.
    """

    size: str
    weights: str
    case: str
    tokens: int
    settings: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    ceilings: list[Ceilings] = field(default_factory=list)

    @property
    def roofline_bar(self) -> float | None:
        return ROOFLINE_BARS.get((self.size, self.case, self.weights))

    @property
    def ratio(self) -> float:
        return median(self.theirs) / median(self.ours)


@dataclass(frozen=True)
class Run:
    """What every case needs. rounds: samples of each engine; tokens: decode steps in each."""

    ours: Ours
    peer: Peer
    threads: int
    rounds: int
    tokens: int

    def open(self, cells: int, sequences: int = 1, ubatch: int = 512, **flags: bool) -> None:
        cells += sequences * (self.tokens + 256)
        self.peer.ask("open", cells=cells, sequences=sequences, ubatch=ubatch, threads=self.threads, **flags)

    def ceilings(self, row: Row) -> None:
        """Measure them, for the sample that comes next."""
        if row.roofline_bar is not None:
            row.ceilings.append(measure_ceilings(self.threads, torch.bfloat16))

    def extend(self, length: int, seed: int, sequence: int = 0) -> float:
        prompt = prompt_of(length, seed, self.ours.vocabulary)
        seconds: float = self.peer.ask("extend", tokens=list(prompt), sequence=sequence)
        return seconds


# -- the cases ---------------------------------------------------------------------------------------------------------


def decode(run: Run, row: Row, context: int, sequences: int) -> None:
    """Decode `sequences` requests that have `context` tokens each; only a single one's cache is filled with numbers."""
    seeds = range(100, 100 + sequences)
    filled = sequences == 1 and context > FILLED_ABOVE
    if filled:
        prompts = [run.ours.fill(context, seed) for seed in seeds]
    else:
        prompts = [prompt_of(context, seed, run.ours.vocabulary) for seed in seeds]

    def prepare(flash: bool, unified: bool) -> None:
        run.open(sequences * context, sequences, flash=flash, unified=unified)
        for sequence, seed in enumerate(seeds):
            run.extend(FILLED_ABOVE if filled else context, seed, sequence)
        if filled:
            run.peer.ask("fill", cells=context, seed=seeds[0])

    tried = {}
    for flash in (True, False):
        for unified in (True, False) if sequences > 1 else (True,):
            prepare(flash, unified)
            tried[flash, unified] = median(run.peer.ask("decode", tokens=4)[1:])
    best = min(tried, key=lambda settings: tried[settings])
    row.settings = f"flash attention {_on(best[0])}" + (f", unified cache {_on(best[1])}" if sequences > 1 else "")
    prepare(*best)
    run.ours.decode(prompts, run.tokens)  # warm-up, and a short prompt's prefill
    run.peer.ask("decode", tokens=4)
    for _ in range(run.rounds):
        run.ceilings(row)
        time.sleep(PAUSE)
        steps = run.ours.decode(prompts, run.tokens)
        row.ours += steps
        if row.ceilings:
            row.shares.append(decode_bytes(run.ours.model, context) / row.ceilings[-1].bytes_per_second / median(steps))
        time.sleep(PAUSE)
        row.theirs += run.peer.ask("decode", tokens=run.tokens)
    for prompt in prompts:
        run.ours.expect_cached(prompt)


def prefill(run: Run, row: Row, length: int) -> None:
    """Prompts of `length` tokens, each another one. llama.cpp's settings are tried in the middle of such a prompt."""
    piece = min(length, 2048)
    middle = (length - piece) // 2
    tried = {}
    for flash in (True, False):
        for ubatch in (512, 2048) if length > 512 else (512,):
            run.open(length, ubatch=ubatch, flash=flash, unified=True)
            run.extend(min(length, FILLED_ABOVE), 1)  # warm-up
            if middle > FILLED_ABOVE:
                run.peer.ask("fill", cells=middle, seed=1)
            else:
                run.peer.ask("clear")
            tried[flash, ubatch] = run.extend(piece, 2)
    flash, ubatch = best = min(tried, key=lambda settings: tried[settings])
    run.open(length, ubatch=ubatch, flash=flash, unified=True)
    run.extend(min(length, FILLED_ABOVE), 1)
    once = tried[best] * length / piece > ONCE_ABOVE
    chunk = best_chunk(run.ours, length)
    row.settings = f"flash attention {_on(flash)}, ubatch {ubatch}{', 1 sample' if once else ''}; our chunk {chunk}"
    for i in range(run.rounds):
        run.ceilings(row)
        time.sleep(PAUSE)
        row.ours.append(run.ours.prefill(length, 10 + i, chunk))
        if row.ceilings:
            needed = prefill_operations(run.ours.model.config, length)
            row.shares.append(needed / row.ceilings[-1].flops_per_second / row.ours[-1])
        if i == 0 or not once:
            run.peer.ask("clear")
            time.sleep(PAUSE)
            row.theirs.append(run.extend(length, 10 + i))


def _on(value: bool) -> str:
    return "on" if value else "off"


def differences(ours: np.ndarray[Any, Any], peer: Peer, prompt: tuple[int, ...]) -> tuple[Any, Any]:
    """Of each position: whether the top token is the same, and the largest difference of its logits, in units of the
    largest of them."""
    with tempfile.NamedTemporaryFile() as file:
        peer.ask("extend", tokens=list(prompt), logits=file.name)
        theirs = np.fromfile(file.name, np.float32).reshape(ours.shape)
    return ours.argmax(1) == theirs.argmax(1), np.abs(ours - theirs).max(1) / np.abs(theirs).max(1)


def agree_exactly(report: Report, install: Install, peer: Peer, models: Path, threads: int) -> None:
    """The two engines run the same model: everything in fp32, on a prompt twice as long as index_topk, so that sparse
    selection is compared too. It breaks ties differently, which is why not every position needs to agree."""
    path = models / "f32.gguf"
    if not path.exists():
        convert(install, models / "checkpoint", models / "f32.partial", "f32")
        (models / "f32.partial").rename(path)
    model = load_ours(models / "checkpoint", oracle_eps=False)
    prompt = prompt_of(2 * model.config.index_topk, 5, model.config.vocab_size)
    cache = PagedCache(model.config, len(prompt) // 64 + 1, 64, torch.float32)
    with torch.inference_mode():
        ours = model.logits(model(single_sequence(prompt), cache)).numpy()
    peer.ask("load", path=str(path))
    cells = len(prompt) + 256
    peer.ask("open", cells=cells, sequences=1, ubatch=512, flash=False, unified=True, threads=threads, exact=True)
    same, errors = differences(ours, peer, prompt)
    report.bar(f"same top token as llama.cpp in fp32, {len(prompt)} positions", float(same.mean()), ">=", EXACT_TOP1)
    middle = float(np.median(errors))
    report.bar("difference of logits from llama.cpp's in fp32, median", middle, "<=", EXACT_DIFFERENCE)


def agree(run: Run, report: Report, size: str) -> None:
    """Logits of every position of a prompt, as they are timed in bf16: within index_topk they must agree. Beyond it
    near ties, which the two caches' number formats break differently, decide what is attended to, so it is only shown.

    Rows where rounding chose another expert differ much, so it is the median row that counts, and the share of rows
    with the same top token.
    """
    topk = run.ours.model.config.index_topk
    within = min(BF16_TOKENS, topk - 1)
    prompt = prompt_of(2 * topk if topk <= 512 else within, 5, run.ours.vocabulary)
    run.open(len(prompt), flash=True, unified=True)
    same, errors = differences(run.ours.logits(prompt).numpy(), run.peer, prompt)
    report.bar(
        f"same top token as llama.cpp in bf16, {within} positions", float(same[:within].mean()), ">=", BF16_TOP1[size]
    )
    difference = float(np.median(errors[:within]))
    report.bar("difference of logits from llama.cpp's in bf16, median", difference, "<=", BF16_DIFFERENCE)
    if len(prompt) > topk:
        share, middle = same[topk:].mean(), np.median(errors[topk:])
        print(f"        past index_topk ({topk}): same top token {share:.3f}, median difference {middle:.3f}")


# -- the whole run -----------------------------------------------------------------------------------------------------


def measure(run: Run, size: str, weights: str, cases: list[str]) -> list[Row]:
    rows = []
    for case in cases:
        kind, _, length = case.partition("@")
        sequences = int(kind.removeprefix("batch")) if kind.startswith("batch") else 1
        row = Row(size, weights, case, int(length) if kind == "prefill" else sequences)
        if kind == "prefill":
            prefill(run, row, int(length))
        else:
            decode(run, row, int(length), sequences)
        rows.append(row)
        speeds = row.tokens / median(row.ours), row.tokens / median(row.theirs)
        print(
            f"{size} {weights} {case}: {speeds[0]:.1f} tokens/s, llama.cpp {speeds[1]:.1f} ({row.settings})", flush=True
        )
    return rows


def table(rows: list[Row]) -> None:
    """Tokens a second: median, and in brackets the quartiles."""
    print(f"\n{'tokens/s':<12} {'case':>14}  {'Freehold':>24}  {'llama.cpp':>24}  {'ratio':>6}  llama.cpp's settings")
    for row in rows:
        ours, theirs = (_speeds(row.tokens, samples) for samples in (row.ours, row.theirs))
        name = f"{row.size} {row.weights}"
        print(f"{name:<12} {row.case:>14}  {ours:>24}  {theirs:>24}  {row.ratio:>6.2f}  {row.settings}")
    print()


def _speeds(tokens: int, samples: list[float]) -> str:
    low, middle, high = quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
    return f"{tokens / middle:.1f} ({tokens / high:.1f}-{tokens / low:.1f})"


def judge(report: Report, rows: list[Row]) -> None:
    """Bars of the ratios, and that llama.cpp's filled cache was really read: deep decode takes longer than shallow."""
    for row in rows:
        limit = BARS.get(row.size, {}).get(row.case)
        if limit is not None:
            report.bar(f"{row.size} {row.weights} {row.case}: times llama.cpp", row.ratio, ">=", limit)
    decodes = {(row.size, row.weights, row.case): median(row.theirs) for row in rows}
    for (size, weights, case), seconds in decodes.items():
        shallow = decodes.get((size, weights, "decode@128"))
        if case == "decode@16384" and shallow is not None:
            name = f"{size} {weights}: llama.cpp's step at 16384, times that at 128"
            report.bar(name, seconds / shallow, ">=", 1.1)


def roofline(report: Report, rows: list[Row]) -> None:
    """Shares of the measured ceilings."""
    for row in rows:
        if row.roofline_bar is None:
            continue
        if row.case.startswith("decode"):
            ceiling = f"{median(c.bytes_per_second for c in row.ceilings) / 1e9:.1f} GB/s"
        else:
            ceiling = f"{median(c.flops_per_second for c in row.ceilings) / 1e9:.0f} GFLOP/s"
        name = f"{row.size} {row.weights} {row.case}: share of what {ceiling} allow"
        report.bar(name, median(row.shares), ">=", row.roofline_bar)


def llamacpp(directory: Path | None, quick: bool) -> Install:
    """The given build, or our own, which a full run makes."""
    directory = directory or Path(os.environ.get("FREEHOLD_LLAMACPP") or PEERS)
    install = find(directory)
    if install is None and directory != PEERS:
        raise PeerFailed(f"{directory} has no llama-cpp-python with its source beside it")
    if install is None and quick:
        raise PeerFailed("llama.cpp is not built yet; run this once without --quick, or give --llamacpp DIR")
    return install or build()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", action="append", choices=("nano", "small", "medium"), help="default small and medium")
    parser.add_argument("--weights", action="append", choices=tuple(KINDS), help="default all")
    parser.add_argument("--only", action="append", metavar="CASE", help="such as decode@4096, batch8@512, prefill@512")
    parser.add_argument("--llamacpp", type=Path, metavar="DIR", help="a build to use")
    parser.add_argument("--peer-timeout", type=float, default=1800.0, metavar="S", help="of one request to llama.cpp")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep checkpoints and GGUF files here for next time")
    parser.add_argument("--transformers", action="store_true", help="also time transformers (small, bf16; no bar)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every process we started ends with us
    report = Report("engine_vs_llamacpp", args.quick)
    try:
        install = llamacpp(args.llamacpp, args.quick)
        with nullcontext(args.models) if args.models else tempfile.TemporaryDirectory() as models:
            rows = everything(args, report, install, Path(models))
    except PeerFailed as error:
        print(f"engine_vs_llamacpp: {error}", file=sys.stderr)
        return 1
    if not rows:
        print("engine_vs_llamacpp: nothing was measured", file=sys.stderr)
        return 1
    table(rows)
    judge(report, rows)
    return report.finish()


def everything(args: Any, report: Report, install: Install, models: Path) -> list[Row]:
    rows: list[Row] = []
    for size in args.size or (["small"] if args.quick else ["small", "medium"]):
        for weights in args.weights or (["bf16"] if args.quick else list(KINDS)):
            rows += one(args, report, install, models / size, weights)
    return rows


def one(args: Any, report: Report, install: Install, models: Path, weights: str) -> list[Row]:
    """All cases of one size with one kind of weights: both engines load it, and both are gone afterwards."""
    size = models.name
    cases = args.only or (QUICK_CASES if args.quick else CASES.get(size, QUICK_CASES)).split()
    deepest = max(int(case.partition("@")[2]) for case in cases)
    rounds, tokens = (2, 8) if args.quick else (5, 32)
    with Peer(install, args.peer_timeout) as peer:
        path = str(gguf(install, peer, models, weights, args.threads))
        loaded = peer.ask("load", path=path)
        print(
            f"\n{size} {weights}: llama.cpp has {loaded['model']}, {loaded['bytes'] / 1e6:.0f} MB; {loaded['system']}"
        )
        ours = Ours(models / "checkpoint", weights, args.threads, 2 * deepest + 8192, sequences=8)
        run = Run(ours, peer, args.threads, rounds, tokens)
        if weights == "bf16":
            if size != "medium":  # in fp32 it would take 13 GB
                agree_exactly(report, install, peer, models, args.threads)
            peer.ask("load", path=path)
            agree(run, report, size)
        rows = measure(run, size, weights, cases)
        roofline(report, rows)
        ours.close()
    for row in rows:
        sample = {"settings": row.settings, "tokens": row.tokens, "freehold_s": row.ours, "llamacpp_s": row.theirs}
        sample["medians_s"] = [median(row.ours), median(row.theirs)]
        if row.ceilings:
            sample |= {"ceilings": [asdict(ceilings) for ceilings in row.ceilings], "shares": row.shares}
        report.samples[f"{size} {weights} {row.case}"] = sample
    if args.transformers and size == "small" and weights == "bf16":
        transformers(report, models / "checkpoint", args.threads, rounds)
    return rows


def gguf(install: Install, peer: Peer, models: Path, weights: str, threads: int) -> Path:
    """The GGUF file of these weights, made if it is not there."""
    models.mkdir(parents=True, exist_ok=True)
    make_tiny(models / "checkpoint", size=models.name, seed=0)
    kind, source = KINDS[weights], models / "bf16.gguf"
    if not source.exists():
        partial = models / "bf16.partial"
        convert(install, models / "checkpoint", partial, "bf16")
        partial.rename(source)
    if kind is None:
        return source
    target = models / f"{kind}.gguf"
    if not target.exists():
        peer.ask("quantize", source=str(source), target=str(models / "partial"), kind=kind, threads=threads)
        (models / "partial").rename(target)
    return target


def transformers(report: Report, checkpoint: Path, threads: int, rounds: int) -> None:
    """The third engine, at 4,096 tokens: eager, its dynamic cache, chunks of 512."""
    from engine_vs_transformers import Peer as Transformers

    peer = Transformers(str(checkpoint), threads)
    prompt = prompt_of(4096, 10, 8192)
    prefills, steps = [], []
    for _ in range(rounds):
        seconds, cache = peer.prefill(prompt, 512)
        prefills.append(seconds)
        steps += peer.decode(cache, 4)
    torch.set_num_threads(1)
    report.samples["small bf16 transformers@4096"] = {"prefill_s": prefills, "decode_s": steps}
    print(f"transformers at 4096: decode {1 / median(steps):.1f}, prefill {4096 / median(prefills):.0f} tokens/s")


if __name__ == "__main__":
    sys.exit(main())
