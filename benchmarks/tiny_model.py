"""What does freehold-tiny know? Everything is measured again from the shipped checkpoint, through the engine.

    python benchmarks/tiny_model.py                 # models/freehold-tiny, all sections, about half an hour
    python benchmarks/tiny_model.py --quick         # under a minute: few prompts, wide intervals, nothing kept
    python benchmarks/tiny_model.py --checkpoint DIR --only retrieval,thinking

0. size       The checkpoint itself.
1. held-out   Perplexity of held-out examples (other seeds, words that training never shows) beside a bigram, counted on
              the training corpus; and a dense model of as many active weights beside the model trained on as many
              tokens: freehold-tiny itself, or the same shape trained anew.
2. tasks      Every kind that can be checked, greedy: context retrieval, tool calls value-exact, formats, ...
3. retrieval  One fact among as many as fill 1 to 16 times index_topk.
4. thinking   The same prompts with thinking off, High and Max: are the answers longer in this order?
5. ablations  Random indexers, other index_topk, dense attention: at inference only. An indexer on every layer: trained
              anew, as freehold-tiny was, on as many tokens.
6. drafts     The MTP layer: 1, 3 and 5 drafts, with and without sharing the selection and the entries.
7. lora       An adapter trained on 200 examples of a task the model has not seen.

What was trained anew takes long: `_tiny_retrain.py` does it, and leaves its figures in `results/tiny_retrained_*.json`,
where sections 1 and 5 read them. Rates have 95% Wilson intervals; means, bootstrap intervals over prompts or documents,
paired where models are compared.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _tiny_ablations as ablations
import _tiny_drafts as drafts
import _tiny_lora as lora
import numpy as np
from _bigram import Bigram
from _common import ROOT, Report, arguments
from _tiny_arms import ARMS, SHARING, arm_config
from _tiny_kept import Retrained, kept
from _tiny_losses import DOCUMENTS, PARTS, WITHIN, Losses, bigram_losses, digest, held_out_documents, model_losses
from _tiny_retrain import language_tokens
from _tiny_retrieval import retrieval_of_length
from _tiny_speed import compare
from _tiny_tasks import CALLS, SEED, Answered, checked, open_model, rate, shown, solve
from _tiny_tasks import held_out as held_out_examples
from _tiny_thinking import EFFORTS, efforts_of, in_order

from freehold.model.chat.template import ChatTemplate
from freehold.model.config import GlmConfig
from freehold.stats import Interval, mean_ratio, paired_difference, paired_ratio_difference
from freehold.train.corpus import CorpusSettings, build
from freehold.train.data.mixture import KINDS
from freehold.train.publish import read_config
from freehold.train.recipe import tiny_recipe

CHECKPOINT = ROOT / "models" / "freehold-tiny"
QUICK_EPOCHS = 0.1  # of the adapter
TOOL_BAR, FORMAT_BAR = 0.95, 0.9


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    documents: int
    corpus_tokens: int
    prompts: int
    per_length: int
    thinking: int
    ablation: int
    drafts: int
    lora: int
    rounds: int


FULL = Sizes(DOCUMENTS, sum(stage.tokens for stage in tiny_recipe().stages), 400, 300, 200, 200, 48, 300, 7)
QUICK = Sizes(40, 200_000, 12, 8, 8, 6, 2, 8, 1)


@dataclass
class Run:
    """What every section gets."""

    checkpoint: Path
    sizes: Sizes
    report: Report
    scratch: Path
    corpus: Path
    threads: int | None

    @property
    def config(self) -> GlmConfig:
        return GlmConfig.from_file(self.checkpoint)

    def model(self) -> Any:
        return open_model(self.checkpoint, threads=self.threads)


def held_out(run: Run) -> None:
    """Perplexities, and the differences that the bars are about: upper bounds of paired 95% intervals."""
    topk, sizes = run.config.index_topk, run.sizes
    with run.model() as llm:
        tokenizer = llm.tokenizer
        documents = held_out_documents(tokenizer, sizes.documents)
        found = {"freehold-tiny": model_losses(llm, documents, topk)}
    settings = CorpusSettings(tokens=sizes.corpus_tokens)
    corpus = build(run.corpus, settings, tokenizer, ChatTemplate.builtin())
    bigram = Bigram(run.config.vocab_size)
    bigram.add_documents(corpus.ids, corpus.starts)
    found["bigram"] = bigram_losses(bigram, documents, topk)
    pairs = [("freehold-tiny", "bigram")]
    if not run.report.quick and (pair := equal_training(digest(documents))) is not None:
        found |= pair
        pairs.append(tuple(pair) if len(pair) == 2 else ("freehold-tiny", *pair))
    run.report.samples["held-out"] = {
        "documents": len(documents),
        "digest": digest(documents),
        "bigram counted on": len(corpus.ids),
        "perplexity": {name: {part: perplexity(each, part) for part in PARTS} for name, each in found.items()},
    }
    print(f"{'perplexity of ' + str(len(documents)) + ' held-out documents':38}" + "".join(f"{p:>28}" for p in PARTS))
    for name, each in found.items():
        cells = (perplexity(each, part) for part in PARTS)
        print(f"  {name:36}" + "".join(f"{v:>14.3f} ({low:.3f}-{high:.3f})" for v, low, high in cells))
    beside = run.report.samples["held-out"]["beside"] = {}
    for first, other in pairs:
        ratios = {part: paired_perplexity(found[first], found[other], part) for part in (*PARTS, WITHIN)}
        beside[f"{first} beside {other}"] = {part: ratio.as_list() for part, ratio in ratios.items()}
        print(f"  {first} beside {other}: " + ", ".join(f"{ratio.value:.4f} {part}" for part, ratio in ratios.items()))
        for part in PARTS[:2]:
            name = f"perplexity of {first} beside {other}, {part}: ratio, upper bound"
            run.report.bar(name, ratios[part].high, "<", 1.0)
    if len(pairs) < 2 and not run.report.quick:
        run.report.missing("the dense baseline was not trained: python benchmarks/_tiny_retrain.py dense")


def equal_training(documents: str) -> dict[str, Losses] | None:
    """The losses of a dense model that was trained on as many tokens as freehold-tiny; if the one that is kept had
    fewer, those of freehold-tiny's shape on as many, and of it, in this order. None: neither is kept."""
    baseline, same_shape = kept("dense"), kept("index-share")
    if baseline is None:
        return None
    baseline.check_same(documents)
    name = f"a dense model, {baseline.tokens / 1e6:.1f}M tokens"
    if _alike(baseline.tokens, language_tokens(tiny_recipe())):
        return {name: baseline.losses}
    if same_shape is None or not _alike(baseline.tokens, same_shape.tokens):
        return None
    same_shape.check_same(documents)
    return {f"its shape, {same_shape.tokens / 1e6:.1f}M tokens": same_shape.losses, name: baseline.losses}


def _alike(tokens: int, others: int) -> bool:
    return abs(tokens - others) <= 0.05 * others


def perplexity(losses: Losses, part: str) -> list[float]:
    """[value, low, high]."""
    sums, tokens = losses.of(part)
    used = tokens > 0
    return mean_ratio(sums[used], tokens[used]).map(math.exp).as_list()


def paired_perplexity(first: Losses, second: Losses, part: str) -> Interval:
    """The ratio of two perplexities on the same documents."""
    sums, tokens = first.of(part)
    used = tokens > 0
    return paired_ratio_difference(sums[used], second.of(part)[0][used], tokens[used]).map(math.exp)


def tasks(run: Run) -> None:
    with run.model() as llm:
        for kind in KINDS:
            try:
                examples = checked(kind, run.sizes.prompts)
            except ValueError:
                continue  # nothing of this kind can be checked
            answered = solve(llm, examples)
            note_rate(run, f"task {kind}", answered)
            if kind == "format":
                rate_bar(run, "format following", rate(answered), FORMAT_BAR)
        answered = solve(llm, checked("tool", run.sizes.prompts, checks=CALLS))
        note_rate(run, "tool calls, names and values exact", answered)
        rate_bar(run, "tool calls value-exact", rate(answered), TOOL_BAR)


def retrieval(run: Run) -> None:
    topk = run.config.index_topk
    bars = {4: 0.95, 16: 0.8}
    with run.model() as llm:
        for times in (1, 2, 4, 8, 16):
            examples = retrieval_of_length(llm.tokenizer, times * topk, run.sizes.per_length)
            answered = solve(llm, examples, max_tokens=64)
            note_rate(run, f"retrieval at {times}x index_topk ({times * topk} tokens)", answered)
            if times in bars:
                rate_bar(run, f"retrieval at {times}x index_topk", rate(answered), bars[times])


def rate_bar(run: Run, name: str, interval: Interval, limit: float) -> None:
    """A rate must reach a limit; in a quick run, with its few prompts, the upper bound of its interval must."""
    if run.report.quick:
        run.report.bar(f"{name}, upper bound", interval.high, ">=", limit)
    else:
        run.report.bar(name, interval.value, ">=", limit)


def note_rate(run: Run, name: str, answered: list[Answered]) -> None:
    interval = rate(answered)
    wrong = [each.verdict.why for each in answered if not each.right]
    print(f"  {name:44}{shown(interval):28}{len(answered)} prompts{', e.g. ' + wrong[0][:60] if wrong else ''}")
    run.report.samples.setdefault("rates", {})[name] = {
        "rate": interval.as_list(),
        "prompts": len(answered),
        "right": [int(each.right) for each in answered],
    }


def thinking(run: Run) -> None:
    with run.model() as llm:
        rows = efforts_of(llm, run.sizes.thinking, SEED)
    order = in_order(rows)
    print(f"  tokens off < High < Max: {shown(order)} of {len(rows)} prompts")
    for effort in EFFORTS:
        tokens = [row.tokens[effort] for row in rows]
        right = [row.right[effort] for row in rows if row.right[effort] is not None]
        print(f"    {effort:6} {np.mean(tokens):7.1f} tokens on average, {sum(right) / max(1, len(right)):.1%} right")
    run.report.samples["thinking"] = {"in order": order.as_list(), "rows": [row.as_dict() for row in rows]}
    rate_bar(run, "thinking: tokens off < High < Max", order, 0.95)


def ablated(run: Run) -> None:
    config, sizes = run.config, run.sizes
    with run.model() as llm:
        documents = held_out_documents(llm.tokenizer, max(sizes.documents // 3, 10))
    lengths = (4 * config.index_topk, 16 * config.index_topk)
    checkpoints = ablations.variants(run.checkpoint, run.scratch / "variants")
    rows, right = ablations.measure(checkpoints, documents, lengths, sizes.ablation, config.index_topk)
    print(ablations.table(rows))
    retrained = {arm: found for arm in ARMS if (found := kept(arm)) is not None}
    speeds = speed(run)
    print_retrained(retrained)
    run.report.samples["ablations"] = {
        "inference only": [row.as_dict() for row in rows],
        "right": right,
        "retrained": {
            arm: {**found.summary(), "perplexity": perplexity(found.losses, PARTS[0])}
            for arm, found in retrained.items()
        },
        "speed": speeds,
    }
    trained, random = (np.array(right[name][lengths[0]], float) for name in (ablations.AS_TRAINED, ablations.RANDOM))
    gained = paired_difference(trained, random)
    print(f"  gained by the trained indexer at {lengths[0]} tokens: {shown(gained)} of prompts")
    if not run.report.quick:
        run.report.bar("retrieval gained by the trained indexer at 4x index_topk, lower bound", gained.low, ">", 0.0)
    if not retrained.keys() >= set(SHARING) and not run.report.quick:
        run.report.missing("not retrained: python benchmarks/_tiny_retrain.py index-share every-layer")


def speed(run: Run) -> dict[str, Any]:
    """IndexShare beside an indexer on every layer, tokens a second."""
    base = read_config(run.checkpoint)
    configs = {arm: arm_config(arm, base) for arm in SHARING}
    contexts = (512,) if run.report.quick else (1024, run.config.max_position_embeddings - 256)
    found = compare(configs, run.scratch / "speed", contexts, run.sizes.rounds, run.threads)
    for arm, at in found.items():
        for context, each in at.items():
            print(f"  {arm:14} at {context:>5}: prefill {each.prefill:8.0f}, decode {each.decode:7.0f} tokens/s")
    return {arm: {str(n): [each.prefill, each.decode] for n, each in at.items()} for arm, at in found.items()}


def print_retrained(retrained: dict[str, Retrained]) -> None:
    for arm, found in retrained.items():
        rates = ", ".join(f"{name} {Interval(*each).value:.1%}" for name, each in found.rates.items())
        print(
            f"  trained anew, {arm:14} {found.tokens / 1e6:.1f}M tokens in {found.seconds / 60:.0f} min: "
            f"perplexity {perplexity(found.losses, PARTS[0])[0]:.3f}, {rates}"
        )
    if retrained.keys() >= set(SHARING):
        ratio = paired_perplexity(retrained["index-share"].losses, retrained["every-layer"].losses, PARTS[0])
        print(f"  perplexity with IndexShare / with an indexer on every layer: {ratio.as_list()}")


def drafting(run: Run) -> None:
    kinds = [kind for kind in ("story", "retrieval", "tool", "format", "arithmetic", "chat") if kind in KINDS]
    with run.model() as llm:
        examples = [
            example
            for kind in kinds
            for example in held_out_examples(kind, max(1, run.sizes.drafts // len(kinds)))
            if example.messages
        ]
        prompts = drafts.prompts_of(llm.tokenizer, examples)
    rows, tokens = drafts.measure(run.checkpoint, prompts, run.threads)
    print(f"  {len(prompts)} prompts, {tokens} tokens, greedy")
    print(drafts.table(rows))
    run.report.samples["drafts"] = {"tokens": tokens, "rows": [row.as_dict() for row in rows]}
    run.report.bar("drafts: answers unlike those without", sum(row.changed for row in rows), "==", 0)


def adapter(run: Run) -> None:
    epochs = QUICK_EPOCHS if run.report.quick else None
    found = lora.measure(run.checkpoint, run.scratch / "lora", run.sizes.lora, epochs, run.threads)
    run.report.samples["lora"] = found.as_dict()
    print(
        f"  new task: {np.mean(found.task_before):.1%} right before, {np.mean(found.task_after):.1%} after; "
        f"general set: {np.mean(found.general_before):.1%} before, {np.mean(found.general_after):.1%} after"
    )
    run.report.bar("lora: minutes", found.seconds / 60, "<", 10)
    if run.report.quick:
        return  # an adapter of a few steps says nothing of what one can gain
    run.report.bar("lora: points gained on the new task", found.gained.value, ">=", 20)
    run.report.bar("lora: points gained on the new task, lower bound", found.gained.low, ">", 0)
    run.report.bar("lora: points lost on the general set", found.lost.value, "<=", 2)


def size(run: Run) -> None:
    """What it takes on the disk, and whether it is the architecture in full."""
    config = run.config
    weights = sum(file.stat().st_size for file in run.checkpoint.glob("*.safetensors"))
    run.report.samples["size"] = {"bytes": weights}
    run.report.bar("bytes of safetensors", weights, "<=", 12_000_000)
    run.report.bar("layers", config.num_hidden_layers, ">=", 8)
    run.report.bar("kinds of indexer, full and shared", len(set(config.indexer_types)), "==", 2)
    run.report.bar("routed experts", config.n_routed_experts, ">=", 16)
    run.report.bar("index_topk", config.index_topk, "<=", 128)
    run.report.bar("MTP layers", config.num_nextn_predict_layers, "==", 1)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "size": size,
    "held-out": held_out,
    "tasks": tasks,
    "retrieval": retrieval,
    "thinking": thinking,
    "ablations": ablated,
    "drafts": drafting,
    "lora": adapter,
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--only", default="", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--corpus", type=Path, help="where the training corpus is or will be kept (default: nowhere)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    chosen = [name for name in args.only.split(",") if name] or list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        raise SystemExit(f"--only {min(unknown)}: the sections are {', '.join(SECTIONS)}")
    report = Report("tiny_model", args.quick)
    with tempfile.TemporaryDirectory() as name:
        run = _run(args, report, Path(name))
        for section in chosen:
            start = time.perf_counter()
            print(f"== {section}", flush=True)
            SECTIONS[section](run)
            print(f"   [{time.perf_counter() - start:.0f} s]", flush=True)
    return report.finish(write=None if len(chosen) == len(SECTIONS) else False)


def _run(args: argparse.Namespace, report: Report, scratch: Path) -> Run:
    sizes = QUICK if args.quick else FULL
    corpus = args.corpus if args.corpus and not args.quick else scratch / "corpus"
    return Run(args.checkpoint, sizes, report, scratch, corpus, args.threads)


if __name__ == "__main__":
    sys.exit(main())
