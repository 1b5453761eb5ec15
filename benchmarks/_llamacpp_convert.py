"""Runs llama.cpp's own converter: `python _llamacpp_convert.py LLAMA.CPP-SOURCE CHECKPOINT OUTPUT.gguf TYPE`.

The converter recognises a tokenizer by a hash of what it makes of a test string, and knows no made-up one. Ours splits
text as GLM-4's does, so it is told so; nothing else is changed. The MTP layer is left out (neither engine is timed
with it). Needs torch and transformers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    source, checkpoint, output, kind = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source) / "gguf-py")]
    converter: Any = importlib.import_module("convert_hf_to_gguf")  # files of that source, not a dependency of ours
    base: Any = importlib.import_module("conversion.base")

    def glm4(_self: Any, _tokenizer: Any) -> str:
        return "glm4"

    base.TextModel.get_vocab_base_pre = glm4
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", kind, "--no-mtp", "--outfile", output]
    converter.main()


if __name__ == "__main__":
    main()
