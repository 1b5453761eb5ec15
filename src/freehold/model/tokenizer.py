"""The tokenizer of a checkpoint (`tokenizer.json`, byte-level BPE), with GLM's control tokens. Torch-free.

A thin wrapper over `tokenizers.Tokenizer` that adds what a server needs and the library leaves out: the exact
bytes of a token (incremental UTF-8, guided decoding), and encoding of user content that cannot forge control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from freehold.errors import ConfigError
from freehold.model.toy_vocab import toy_merges

# GLM's control tokens in the order of their ids, which follow one another. GLM-5.2: the first is 154820.
# The order is verified for the anchors (endoftext … end_of_video, think … tool_call, image, video) and inferred
# from GLM-4.5, which has the same order, for the others; a checkpoint's own tokenizer.json always decides.
GLM_SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "/nothink", "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip
SPECIAL: dict[str, int] = {text: offset for offset, text in enumerate(GLM_SPECIAL_TOKENS)}
LONG_TEXT = 4096  # characters; tokenised in a millisecond
TOY_RESERVED = 64  # ids at the top of a toy vocabulary: the control tokens, then unmapped ids


class Tokenizer:
    """Text to token ids and back. Immutable after construction, and safe to use from several threads.

    vocab_size is the number of ids the model scores: ids the tokenizer does not map decode to nothing.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, vocab_size: int | None = None) -> None:
        """Wrap a byte-level BPE tokenizer. Raises ConfigError if it is another kind, or larger than vocab_size."""
        self.backend = backend
        self._specials: dict[str, int] = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()
        }
        self._special_ids = frozenset(self._specials.values())
        self._bytes = _byte_table(backend.get_vocab(with_added_tokens=True), self._specials)
        self.vocab_size = len(self._bytes) if vocab_size is None else vocab_size
        if self.vocab_size < len(self._bytes):
            raise ConfigError(
                f"tokenizer.json maps token id {len(self._bytes) - 1}, but vocab_size is {self.vocab_size}: "
                "it belongs to another model"
            )
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` of a checkpoint directory; vocab_size comes from its config.json if there is one."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; a checkpoint directory has a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file}: not a tokenizer that can be read: {error}") from None
        return cls(backend, vocab_size=_config_vocab_size(directory / "config.json"))

    @classmethod
    def toy(cls, vocab_size: int) -> Tokenizer:
        """The byte-level tokenizer of test checkpoints: any text round-trips, and GLM's control tokens are there.

        Ids: 256 bytes, then merges of plausible English up to vocab_size-64, then `GLM_SPECIAL_TOKENS` in order,
        then unmapped ids. The same for the same vocab_size, always. Raises ConfigError below 320.
        """
        if vocab_size < 256 + TOY_RESERVED:
            raise ConfigError(f"vocab_size = {vocab_size}: a toy tokenizer needs at least {256 + TOY_RESERVED}")
        pieces, merges = toy_merges(vocab_size - TOY_RESERVED)
        alphabet = byte_alphabet()
        bpe = tokenizers.models.BPE(
            vocab={piece.translate(alphabet): i for i, piece in enumerate(pieces)},
            merges=[(left.translate(alphabet), right.translate(alphabet)) for left, right in merges],
        )
        backend = tokenizers.Tokenizer(bpe)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in GLM_SPECIAL_TOKENS]
        )
        return cls(backend, vocab_size=vocab_size)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of the text; nothing is added at either end.

        special=False: text that spells a control token is encoded as the plain characters it is, so that user
        content cannot forge a turn.
        """
        backend = self.backend if special or not self._could_forge(text) else self._plain
        if len(text) <= LONG_TEXT:
            return backend.encode(text, add_special_tokens=False).ids
        # The same ids, but without holding the interpreter's lock, so that other threads run meanwhile.
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def fewest_tokens(self, num_bytes: int) -> int:
        """A number of tokens that no text of so many bytes of UTF-8 has less of; known without tokenising it."""
        return -(-num_bytes // self._most_bytes) if self._most_bytes else 0

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of the ids. Bytes that are not UTF-8 become U+FFFD; unknown and padding ids become nothing."""
        kept: Iterable[int] = (i for i in ids if i not in self._special_ids) if skip_special else ids
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for; b"" for an unknown or padding id, the text of a control token."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def special_id(self, text: str) -> int | None:
        """The id of a control token, or None if this tokenizer has no such one."""
        return self._specials.get(text)

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token (any added token, `<think>` and `<tool_call>` included)."""
        return token_id in self._special_ids

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, readable by `transformers.AutoTokenizer` too."""
        directory = Path(directory)
        self.backend.save(str(directory / "tokenizer.json"))
        end = "<|endoftext|>" if "<|endoftext|>" in self._specials else None
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2)
        (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    @cached_property
    def _most_bytes(self) -> int:
        """Bytes of the longest token; 0 if a token may stand for any number of them."""
        added = self.backend.get_added_tokens_decoder().values()
        if self.backend.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
            return 0
        return max(map(len, self._bytes), default=0)

    def _could_forge(self, text: str) -> bool:
        # A normaliser could turn other characters into a control token, so only its absence makes the quick look safe.
        if self._any_special is None:
            return False
        return self.backend.normalizer is not None or self._any_special.search(text) is not None

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without added tokens. Made when first needed: it doubles the vocabulary's memory."""
        raw = json.loads(self.backend.to_str())
        raw["added_tokens"] = []
        raw["post_processor"] = None  # templates refer to added tokens
        return tokenizers.Tokenizer.from_str(json.dumps(raw))


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that byte-level BPE writes for it (the GPT-2 convention).

    Printable Latin-1 bytes stand for themselves; the 68 others take U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def _byte_table(vocab: dict[str, int], specials: dict[str, int]) -> list[bytes]:
    byte_of = {character: byte for byte, character in byte_alphabet().items()}
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for piece, token_id in vocab.items():
        if piece in specials:
            table[token_id] = piece.encode("utf-8")
            continue
        try:
            table[token_id] = bytes(byte_of[character] for character in piece)
        except KeyError:
            raise ConfigError(
                f"tokenizer.json: token {token_id} ({piece!r}) is not byte-level BPE; only that kind is supported"
            ) from None
    return table


def _config_vocab_size(config: Path) -> int | None:
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads the config itself reports what is wrong with it
    return value if isinstance(value, int) and not isinstance(value, bool) else None
