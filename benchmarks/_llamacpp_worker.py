"""llama.cpp in a process of its own: `python _llamacpp_worker.py PACKAGE-DIRECTORY`, one JSON request a line.

Each line is {"do": name, ...arguments}; each answer a line too: {"ok": ...} or {"error": text}. It uses the C API as
`llama_cpp.llama_cpp` declares it, and none of that package's Python above it. What it times is `llama_decode` up to
`llama_synchronize` and nothing else: choosing the next token is not counted, in llama.cpp's favour.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
import types
from typing import Any

import numpy as np
from _llamacpp_state import grow

BATCH = 2048  # tokens handed to one llama_decode, as llama.cpp's own server does


def load_api(package: str) -> Any:
    """`llama_cpp.llama_cpp` without running the package's `__init__`, which imports much that is not needed."""
    module = types.ModuleType("llama_cpp")
    module.__path__ = [package]
    sys.modules["llama_cpp"] = module
    return importlib.import_module("llama_cpp.llama_cpp")  # found by its path: not a dependency of ours


class Worker:
    """One model and one context at a time; sequences 0.. of equal length."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.vocab = 0
        self.model: Any = None
        self.context: Any = None
        self.memory: Any = None
        self.batch: Any = None
        self.lengths: list[int] = []
        self.next: list[int] = []
        self._silent = api.llama_log_callback(lambda *_: None)  # must outlive its registration
        api.llama_log_set(self._silent, None)
        api.llama_backend_init()

    # Requests: each public method is one. -----------------------------------------------------------------------------

    def quantize(self, source: str, target: str, kind: str, threads: int) -> None:
        params = self.api.llama_model_quantize_default_params()
        params.ftype = getattr(self.api, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.nthread = threads
        if self.api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
            raise RuntimeError(f"quantising to {kind} failed")

    def load(self, path: str) -> dict[str, Any]:
        self.close()
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{path} could not be loaded")
        self.vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        description = ctypes.create_string_buffer(256)
        self.api.llama_model_desc(self.model, description, len(description))
        return {
            "model": description.value.decode(),
            "bytes": self.api.llama_model_size(self.model),
            "system": self.api.llama_print_system_info().decode(),
        }

    def open(
        self, cells: int, sequences: int, ubatch: int, flash: bool, unified: bool, threads: int, exact: bool = False
    ) -> None:
        """A new, empty context; frees the former. cells: for all sequences together. exact: its caches are f32."""
        self._free_context()
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = cells, BATCH, ubatch
        params.n_seq_max, params.kv_unified = sequences, unified
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        if exact:
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"no context of {cells} cells, flash attention {flash}, ubatch {ubatch}")
        self.batch = self.api.llama_batch_init(BATCH, 0, 1)
        self.memory = self.api.llama_get_memory(self.context)
        self.lengths, self.next = [0] * sequences, [0] * sequences

    def clear(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.lengths = [0] * len(self.lengths)

    def extend(self, tokens: list[int], sequence: int = 0, logits: str | None = None) -> float:
        """Compute more tokens of a sequence; seconds. logits: a file for all their logits, as float32."""
        total, rows = 0.0, []
        for first in range(0, len(tokens), BATCH):
            chunk = tokens[first : first + BATCH]
            start = self.lengths[sequence]
            self.batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                last = first + i == len(tokens) - 1
                self._put(i, token, start + i, sequence, wanted=last or logits is not None)
            total += self._run()
            self.lengths[sequence] += len(chunk)
            if logits is not None:
                rows.append(np.stack([self._logits(i) for i in range(len(chunk))]))
        self.next[sequence] = int(self._logits(-1).argmax())
        if logits is not None:
            np.concatenate(rows).tofile(logits)
        return total

    def fill(self, cells: int, seed: int) -> None:
        """Replace sequence 0, which must have been computed from a few hundred tokens, by `cells` random cells."""
        size = self.api.llama_state_seq_get_size(self.context, 0)
        state = np.empty(size, np.uint8)
        if self.api.llama_state_seq_get_data(self.context, _pointer(state), size, 0) != size:
            raise RuntimeError("the state could not be read")
        grown = grow(state, cells, seed)
        if self.api.llama_state_seq_set_data(self.context, _pointer(grown), len(grown), 0) != len(grown):
            raise RuntimeError("the enlarged state was not taken")
        # Both caches hold exactly these cells, or the size of what would be saved now differs.
        size = self.api.llama_state_seq_get_size(self.context, 0)
        last = self.api.llama_memory_seq_pos_max(self.memory, 0)
        if size != len(grown) or last != cells - 1:
            raise RuntimeError(f"wanted {cells} cells in {len(grown)} bytes; has position {last}, {size} bytes")
        self.lengths[0] = cells

    def decode(self, tokens: int) -> list[float]:
        """Seconds of each of `tokens` greedy steps of all sequences; then takes back what they added."""
        count, start, first = len(self.lengths), list(self.lengths), list(self.next)
        steps = []
        for _ in range(tokens):
            self.batch.n_tokens = count
            for i in range(count):
                self._put(i, self.next[i], self.lengths[i], i, wanted=True)
            steps.append(self._run())
            for i in range(count):
                self.lengths[i] += 1
                self.next[i] = int(self._logits(i).argmax())
        for i in range(count):
            if not self.api.llama_memory_seq_rm(self.memory, i, start[i], -1):
                raise RuntimeError("a sequence could not be shortened")
        self.lengths, self.next = start, first
        return steps

    def close(self) -> None:
        self._free_context()
        if self.model:
            self.api.llama_model_free(self.model)
            self.model = None

    # ------------------------------------------------------------------------------------------------------------------

    def _put(self, i: int, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch = self.batch
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wanted

    def _run(self) -> float:
        start = time.perf_counter()
        status = self.api.llama_decode(self.context, self.batch)
        self.api.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return seconds

    def _logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, row), (self.vocab,))

    def _free_context(self) -> None:
        if self.batch is not None:
            self.api.llama_batch_free(self.batch)
        if self.context:
            self.api.llama_free(self.context)
        self.batch = self.context = None


def _pointer(values: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library may print must not end up among the answers
    worker = Worker(load_api(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
    worker.close()


if __name__ == "__main__":
    main()
