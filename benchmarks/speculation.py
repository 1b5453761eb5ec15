"""Does drafting with the MTP layer pay, is it run rightly, and does it cost nothing where it cannot pay?

1. Acceptance by position, on the draft model (`_draft_model.py`: its MTP layer predicts songs as its target does, far
   beyond index_topk), five drafts a step, greedy, one request at a time: as the engine drafts, and with each of the
   wrong ways of `tests/faults/drafts.py`. A wrong way must show, and must not change a token.
2. Decode speed on the draft model in the dimensions of `small`, 26 layers deep, with 1, 2, 3 and 5 drafts against none
   and as many as the engine chooses, up to 3; for 1, 4 and 8 requests. Rounds in which each has its turn; a ratio is
   that of one round. An engine keeps steps within 16 rows, so 4 requests have at most 3 drafts each, and 8 have one.
3. What drafting costs where it never helps: `small` with random weights, the engine left to choose (it tries, and backs
   off), against no drafting. 20 pairs; the two of a pair take turns step by step, and both engines go on from pair to
   pair, as a server does. The ratio of times of a pair counts from when the prompt is computed. The bound is that of
   the median of all pairs, one-sided, from the binomial distribution of signs (`_pairs.py`); the first pair, in which
   the engine learns, is one of them.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

from _common import RESULTS, ROOT, Report, arguments
from _draft_language import Songs
from _draft_model import write_draft_model
from _drafting import Counting, Drafting, Prompt, interleaved
from _pairs import median_at_most

sys.path.append(str(ROOT))  # the wrong engines are the tests'
from freehold.engine.draft_policy import DraftPolicy
from freehold.engine.drafts import most_drafts
from freehold.engine.engine import Engine
from freehold.model.tiny import make_tiny
from tests.faults.drafts import DRAFT_FAULTS

DEPTH = 5
DRAFTS = (1, 2, 3, 5)
BATCHES = (1, 4, 8)
BAR_DRAFTS, BAR_SPEEDUP = 3, 1.5
LOST = 0.5  # tokens a step, that each wrong way must cost at least
SLOWDOWN = 0.05
RIGHT = "as it should be"


def song_prompts(count: int, seed: int, singings: float = 2.2) -> list[Prompt]:
    songs = Songs()
    return [row.tolist() for row in songs.draw(count, round(singings * songs.period), seed)]


def acceptance(report: Report, directory: Path, prompts: list[Prompt], tokens: int) -> None:
    drafting = Drafting.load(write_draft_model(directory), most=DEPTH)
    plain = drafting.run(drafting.fixed(0), prompts, tokens).tokens
    found: dict[str, Counting] = {}
    changed = 0
    for name, fault in {RIGHT: None, **DRAFT_FAULTS}.items():
        counting = Counting(DEPTH)
        engine = drafting.engine(counting, DEPTH)
        undo = fault(engine.runner) if fault is not None else None
        for prompt, expected in zip(prompts, plain, strict=True):
            changed += drafting.run(engine, [prompt], tokens).tokens != [expected]
        if undo is not None:
            undo()
        found[name] = counting
    drafting.base.close()
    _print_acceptance(found)
    report.samples["acceptance"] = {
        name: {"steps": each.steps, "by_position": each.by_position, "length": each.length}
        for name, each in found.items()
    }
    report.bar("acceptance: answers that differ from those without drafts", changed, "==", 0)
    report.bar(f"acceptance of the draft at position {BAR_DRAFTS}", found[RIGHT].by_position[BAR_DRAFTS - 1], ">=", 0.9)
    for name in DRAFT_FAULTS:
        report.bar(f"tokens a step lost: {name}", found[RIGHT].length - found[name].length, ">=", LOST)


def _print_acceptance(found: dict[str, Counting]) -> None:
    positions = "".join(f"{j:>7}" for j in range(1, DEPTH + 1))
    print(f"share of steps in which the drafts up to a position were accepted, k = {DEPTH}")
    print(f"{'':26}{positions}   acceptance length")
    for name, each in found.items():
        shares = "".join(f"{share:7.3f}" for share in each.by_position)
        print(f"{name:26}{shares}{each.length:10.2f}  ({each.steps} steps)")


def speed(report: Report, directory: Path, rounds: int, tokens: int, threads: int | None) -> None:
    drafting = Drafting.load(write_draft_model(directory, "wide"), most=max(DRAFTS), threads=threads)
    for batch in BATCHES:
        prompts = song_prompts(batch, seed=7)
        engines = {"none": drafting.fixed(0)}
        engines |= {f"k = {drafts}": drafting.fixed(drafts) for drafts in DRAFTS if drafts <= most_drafts(batch)}
        engines["as the engine chooses"] = drafting.engine(DraftPolicy(BAR_DRAFTS), BAR_DRAFTS)
        answers: dict[str, list[tuple[int, ...]]] = {}
        drafting.run(engines["none"], prompts, tokens)  # warm
        arms = [partial(_rate, drafting, engines[name], prompts, tokens, answers, name) for name in engines]
        samples = dict(zip(engines, interleaved(arms, rounds), strict=True))
        report.samples[f"tokens_per_s, batch {batch}"] = samples
        without = samples.pop("none")
        print(f"decode, {batch} at a time: {median(without):.1f} tokens/s without drafts")
        for name, rates in samples.items():
            ratio = median(rate / plain for rate, plain in zip(rates, without, strict=True))
            print(f"  {name:22}{median(rates):9.1f} tokens/s, {ratio:.2f}x")
            if (name, batch) == (f"k = {BAR_DRAFTS}", 1):
                report.bar(f"decode, 1 at a time: {name}, times as fast as without drafts", ratio, ">=", BAR_SPEEDUP)
        changed = sum(tokens != answers["none"] for tokens in answers.values())
        report.bar(f"decode, {batch} at a time: ways to draft that change an answer", changed, "==", 0)
    drafting.base.close()


def _rate(
    drafting: Drafting,
    engine: Engine,
    prompts: list[Prompt],
    tokens: int,
    answers: dict[str, list[tuple[int, ...]]],
    name: str,
) -> float:
    run = drafting.run(engine, prompts, tokens)
    answers[name] = run.tokens
    return run.rate


def back_off(report: Report, directory: Path, pairs: int, tokens: int, threads: int | None) -> None:
    make_tiny(directory, "small")
    most = BAR_DRAFTS
    drafting = Drafting.load(directory, most=most, threads=threads)
    prompts = [[(31 * i + 7 * j) % 8000 for i in range(300)] for j in range(pairs)]
    engines = [drafting.engine(None, 0, apart=True), drafting.engine(DraftPolicy(most), most, apart=True)]
    drafting.run(drafting.fixed(0), prompts[:1], tokens)  # warm
    without, chosen, changed = [], [], 0
    for prompt in prompts:
        plain, drafted = drafting.beside(engines, [prompt], tokens)
        without.append(plain.seconds / plain.counted)
        chosen.append(drafted.seconds / drafted.counted)
        changed += plain.tokens != drafted.tokens
    drafting.base.close()
    ratios = [b / a for a, b in zip(without, chosen, strict=True)]
    report.samples["random model, seconds a token"] = {"without": without, "engine chooses": chosen}
    print(f"random model: median of {pairs} pairs {median(ratios) - 1:+.2%}, worst {max(ratios) - 1:+.2%}")
    report.bar("random model: answers that drafts changed", changed, "==", 0)
    report.bar("random model: slowdown, upper 95% bound of the median", median_at_most(ratios) - 1, "<=", SLOWDOWN)


def draw(report: Report, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot was drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, each in report.samples["acceptance"].items():
        style = "o-" if name == RIGHT else "s--"
        axes.plot(range(1, DEPTH + 1), each["by_position"], style, label=f"{name} ({each['length']:.2f} tokens a step)")
    axes.set_xlabel("position of the draft")
    axes.set_ylabel("accepted, with all before it")
    axes.set_xticks(range(1, DEPTH + 1))
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, help="compute threads (default: what torch finds)")
    args = parser.parse_args()
    report = Report("speculation", args.quick)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        acceptance(report, root / "core", song_prompts(4 if args.quick else 24, seed=1), 48 if args.quick else 128)
        speed(report, root / "wide", 2 if args.quick else 9, 48 if args.quick else 160, args.threads)
        back_off(report, root / "random", 9 if args.quick else 20, 128 if args.quick else 256, args.threads)
    if not args.quick:
        draw(report, RESULTS / "speculation.png")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
