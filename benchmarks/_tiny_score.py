"""Scores a checkpoint on held-out tasks, quickly: for looking at a model while it trains.

    python benchmarks/_tiny_score.py CHECKPOINT_DIR --kinds retrieval,tool,format --n 50
    python benchmarks/_tiny_score.py CHECKPOINT_DIR --kinds retrieval --n 50 --lengths 64,256,1024 --show 3
    python benchmarks/_tiny_score.py RUN_DIR --tokenizer DIR --dense

Greedy, through the engine. A rate has its 95% interval; --show prints that many wrong answers of each kind. The
directory of a run that goes on will do: its last checkpoint is scored. --dense attends to everything, for models whose
indexers have not learnt yet.
`tiny_model.py` is the whole measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from _tiny_retrieval import retrieval_of_length
from _tiny_tasks import CALLS, Answered, checked, open_model, rate, shown, solve
from _tiny_variants import published, with_config

from freehold import LLM
from freehold.train.data.example import Example


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kinds", default="retrieval,tool,format", help="separated by commas; calls: tool calls only")
    parser.add_argument("--n", type=int, default=50, help="prompts of each kind")
    parser.add_argument("--lengths", default="", help="of retrieval, in tokens, separated by commas")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dense", action="store_true", help="attend to everything, whatever index_topk is")
    parser.add_argument("--tokenizer", type=Path, help="where the tokenizer of a run is")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print of each kind")
    parser.add_argument("--json", action="store_true", help="a line of JSON at the end")
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch, _opened(args, Path(scratch)) as llm:
        for name, examples in _tasks(args, llm):
            start = time.perf_counter()
            answered = solve(llm, examples, max_tokens=args.max_tokens)
            interval = rate(answered)
            print(f"{name:18}{shown(interval):26}{_cause(answered)}  [{time.perf_counter() - start:.0f} s]", flush=True)
            _print_wrong(answered, args.show)
            found[name] = interval.as_list()
    if args.json:
        print(json.dumps(found))
    return 0


def _opened(args: argparse.Namespace, scratch: Path) -> LLM:
    checkpoint = args.checkpoint
    if not (checkpoint / "config.json").exists():
        checkpoint = published(checkpoint, args.tokenizer, scratch / "published")
    if args.dense:
        positions = json.loads((checkpoint / "config.json").read_text())["max_position_embeddings"]
        checkpoint = with_config(checkpoint, scratch / "dense", index_topk=positions)
    return open_model(checkpoint, threads=args.threads)


def _tasks(args: argparse.Namespace, llm: LLM) -> Iterator[tuple[str, list[Example]]]:
    """Name and prompts of each thing to score."""
    for kind in args.kinds.split(","):
        if kind == "retrieval" and args.lengths:
            for length in map(int, args.lengths.split(",")):
                yield f"retrieval {length}", retrieval_of_length(llm.tokenizer, length, args.n)
        elif kind == "calls":
            yield kind, checked("tool", args.n, checks=CALLS)
        else:
            yield kind, checked(kind, args.n)


def _cause(answered: list[Answered]) -> str:
    """The commonest reason for a wrong answer."""
    wrong = Counter(each.verdict.why for each in answered if not each.right)
    cut = sum(each.truncated for each in answered)
    return ", ".join(
        [f"{count} x {why[:60]}" for why, count in wrong.most_common(1)] + ([f"{cut} cut off"] if cut else [])
    )


def _print_wrong(answered: list[Answered], count: int) -> None:
    for each in [each for each in answered if not each.right][:count]:
        last = each.example.prompt[-1]["content"]
        print(f"    asked    {last[-200:]!r}")
        print(f"    expected {each.example.check}")
        print(f"    got      {(each.result.reasoning[-120:], each.result.content[:200])!r}")
        for call in each.result.tool_calls:
            print(f"    call     {call.name} {call.arguments}")
        print(f"    {each.verdict.why}")


if __name__ == "__main__":
    sys.exit(main())
