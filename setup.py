"""Builds the native CPU kernels, `freehold/model/ops/_native.so`: plain C++, no headers of Python or PyTorch.

The kernels are optional. Without a C++ compiler, or on a machine that is not x86-64, the package installs without
them and runs its PyTorch reference instead, which says so when an engine loads.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One object of the same source for each instruction set, chosen at run time; nothing is tuned to the building machine.
ISA_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX512BF16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"],
}
# -ffp-contract=off: a multiply and an add are fused only where the source says so, so every build rounds alike.
# -Wno-maybe-uninitialized: GCC 12's own AVX-512 headers trip it.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
KERNEL_FLAGS = [*FLAGS, "-fno-exceptions", "-fno-rtti", "-Wno-maybe-uninitialized", "-Wno-unused-function"]
NATIVE = Path("native")


class BuildNative(build_ext):
    """Compiles `native/` into a plain shared library."""

    def build_extension(self, ext: Extension) -> None:
        # `build_ext --debug` keeps what profilers need to name functions and lines; optimised all the same.
        symbols = ["-g"] if self.debug else []
        strip = [] if self.debug else ["-s"]
        objects: list[str] = []
        temp = Path(self.build_temp)
        kernels = str(NATIVE / "kernels.cpp")
        for isa, flags in ISA_FLAGS.items():
            objects += self.compiler.compile(
                [kernels], str(temp / isa), [(f"FH_ISA_{isa}", None)], extra_postargs=[*KERNEL_FLAGS, *flags, *symbols]
            )
        others = [source for source in ext.sources if source != kernels]
        objects += self.compiler.compile(others, str(temp), extra_postargs=[*FLAGS, *symbols])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), libraries=["pthread"], extra_postargs=strip, target_lang="c++"
        )

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module, so without the interpreter's suffix.
        return str(Path(*fullname.split("."))) + ".so"


def extensions() -> list[Extension]:
    if platform.machine().lower() not in ("x86_64", "amd64") or platform.system() == "Windows":
        return []
    headers = [str(path) for path in sorted(NATIVE.glob("*.h"))]
    sources = [str(path) for path in sorted(NATIVE.glob("*.cpp"))]
    return [Extension("freehold.model.ops._native", sources, depends=headers, language="c++", optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
