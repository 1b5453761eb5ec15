"""A corpus: many examples as tokens in a few flat arrays, made once and kept in a directory. Torch-free.

Files: ids.npy, trained.npy, starts.npy, kinds.npy and corpus.json, which is written last and holds a digest of the
settings, the tokenizer, the template's name and the generators' sources: a corpus that was made from others is made
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freehold.errors import ConfigError
from freehold.model.chat.template import ChatTemplate
from freehold.model.tokenizer import Tokenizer
from freehold.train import data
from freehold.train.data.example import Example, Markers, encode, rendered, trained_mask
from freehold.train.data.mixture import MIXTURE, drawn
from freehold.train.data.words import Split

CHUNK = 2048  # examples that are encoded together
Progress = Callable[[int, int], None]  # (tokens made, tokens wanted)


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What a generated corpus consists of. longest: examples of more tokens are left out."""

    tokens: int
    mixture: Mapping[str, float] = field(default_factory=lambda: dict(MIXTURE))
    split: Split = "train"
    seed: int = 0
    longest: int = 1280


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents one after another.

    ids: uint16 or uint32 [N]. trained: bool [N], the tokens an assistant writes. starts: int64 [documents + 1], where
    each begins, and N. kinds: int8 [documents], an index into names.
    """

    ids: NDArray[Any]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    kinds: NDArray[np.int8]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.kinds)

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """ids and trained of one document."""
        first, end = self.starts[index], self.starts[index + 1]
        return self.ids[first:end], self.trained[first:end]

    def summary(self) -> dict[str, dict[str, int]]:
        """Documents, tokens and trained tokens of each kind."""
        lengths = np.diff(self.starts)
        trained = np.add.reduceat(self.trained, self.starts[:-1], dtype=np.int64) if len(self) else lengths
        return {
            name: {
                "documents": int((self.kinds == i).sum()),
                "tokens": int(lengths[self.kinds == i].sum()),
                "trained": int(trained[self.kinds == i].sum()),
            }
            for i, name in enumerate(self.names)
        }

    def save(self, directory: Path, digest: str = "") -> None:
        """Write the arrays, then corpus.json: a directory without it is not finished."""
        directory.mkdir(parents=True, exist_ok=True)
        meta = directory / "corpus.json"
        meta.unlink(missing_ok=True)
        for name in ("ids", "trained", "starts", "kinds"):
            np.save(directory / f"{name}.npy", getattr(self, name))
        text = json.dumps({"digest": digest, "names": self.names, "summary": self.summary()}, indent=2)
        partial = directory / "corpus.json.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(meta)

    @classmethod
    def load(cls, directory: Path) -> Corpus:
        """Map the arrays of a directory into memory. Raises ConfigError if it is not a finished corpus."""
        try:
            meta = json.loads((directory / "corpus.json").read_text(encoding="utf-8"))
            arrays = {
                name: np.load(directory / f"{name}.npy", mmap_mode="r")
                for name in ("ids", "trained", "starts", "kinds")
            }
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory}: not a finished corpus: {error}") from None
        return cls(**arrays, names=tuple(meta["names"]))


def corpus_of(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    tokens: int | None = None,
    longest: int | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Encode examples, up to so many tokens if given (the document that crosses it is kept).

    longest: documents of more tokens are left out. Equal to `example.encode` one by one, but encoded in batches.
    """
    markers = Markers.of(tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    names: dict[str, int] = {}
    ids_parts: list[NDArray[Any]] = []
    trained_parts: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    kinds: list[int] = []
    total = 0
    for chunk in _chunks(examples):
        for example, (ids, trained) in zip(chunk, _encode_all(chunk, tokenizer, template, markers), strict=True):
            if (longest is not None and len(ids) > longest) or (tokens is not None and total >= tokens):
                continue
            ids_parts.append(np.array(ids, dtype))
            trained_parts.append(np.array(trained, np.bool_))
            lengths.append(len(ids))
            kinds.append(names.setdefault(example.kind, len(names)))
            total += len(ids)
        if progress is not None:
            progress(total, tokens or total)
        if tokens is not None and total >= tokens:
            break
    if not lengths:
        raise ConfigError("the corpus has no documents" + (f" of at most {longest} tokens" if longest else ""))
    return Corpus(
        np.concatenate(ids_parts),
        np.concatenate(trained_parts),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array(kinds, np.int8),
        tuple(names),
    )


def build(
    directory: Path,
    settings: CorpusSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    progress: Progress | None = None,
) -> Corpus:
    """The generated corpus of these settings: the one in the directory if it is this one, else made and kept there."""
    wanted = digest(settings, tokenizer, template)
    try:
        if json.loads((directory / "corpus.json").read_text(encoding="utf-8")).get("digest") == wanted:
            return Corpus.load(directory)
    except (OSError, ValueError, AttributeError):
        pass  # none there, or not a finished one
    examples = (drawn(settings.mixture, settings.split, settings.seed, index) for index in count())
    made = corpus_of(examples, tokenizer, template, tokens=settings.tokens, longest=settings.longest, progress=progress)
    made.save(directory, wanted)
    return Corpus.load(directory)


def digest(settings: CorpusSettings, tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """Changes whenever the corpus would."""
    found = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    found.update(tokenizer.backend.to_str().encode())
    found.update(template.profile.name.encode())
    for path in sorted(Path(data.__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _encode_all(
    examples: list[Example], tokenizer: Tokenizer, template: ChatTemplate, markers: Markers
) -> Iterator[tuple[list[int], list[bool]]]:
    """ids and trained of each. Texts without spelled-out control tokens, nearly all, are encoded in one batch."""
    texts = [rendered(example, template) for example in examples]
    batch = tokenizer.backend.encode_batch_fast([text for text in texts if text is not None], add_special_tokens=False)
    encodings = iter(batch)
    for example, text in zip(examples, texts, strict=True):
        if text is None:
            one = encode(example, tokenizer, template)
            yield one.ids, one.trained
            continue
        ids = next(encodings).ids
        if example.messages:
            yield ids, trained_mask(ids, markers, thinking=example.effort != "none")
        else:
            yield ids, [False, False] + [True] * (len(ids) - 2)  # [gMASK] <sop> open a text
