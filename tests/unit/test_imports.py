"""What imports torch, and how fast the command line answers."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from tests.source_checks import ROOT

PACKAGE = ROOT / "src" / "freehold"

# The only modules that may import torch. Every other one must not, even indirectly: a new file is torch-free
# unless its name is added here.
TORCH = {
    "freehold.engine.batch",
    "freehold.engine.compare",
    "freehold.engine.bench.ceilings",
    "freehold.engine.bench.profile",
    "freehold.engine.bench.run",
    "freehold.engine.bench.stored",
    "freehold.engine.drafts",
    "freehold.engine.loading",
    "freehold.engine.runner",
    "freehold.engine.sampler",
    "freehold.engine.speculate",
    "freehold.model.adapted",
    "freehold.model.adapters",
    "freehold.model.cache",
    "freehold.model.glm",
    "freehold.model.group_quant",
    "freehold.model.decoder",
    "freehold.model.destinations",
    "freehold.model.index_keys",
    "freehold.model.indexer",
    "freehold.model.inputs",
    "freehold.model.latents",
    "freehold.model.layers",
    "freehold.model.mla",
    "freehold.model.moe",
    "freehold.model.mtp",
    "freehold.model.oracle",
    "freehold.model.ops.choose",
    "freehold.model.ops.fused",
    "freehold.model.ops.interface",
    "freehold.model.ops.native",
    "freehold.model.ops.reference",
    "freehold.model.packed",
    "freehold.model.paged",
    "freehold.model.packing",
    "freehold.model.quant",
    "freehold.model.quantize",
    "freehold.model.quantize_tensors",
    "freehold.model.weights",
    "freehold.train.batches",
    "freehold.train.finetune",
    "freehold.train.head_loss",
    "freehold.train.initial",
    "freehold.train.loop",
    "freehold.train.lora",
    "freehold.train.measure",
    "freehold.train.merge",
    "freehold.train.objective",
    "freehold.train.ops",
    "freehold.train.optim",
    "freehold.train.publish",
    "freehold.train.recipe",
    "freehold.train.saved",
    "freehold.train.stages",
    "freehold.train.tiny",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> set[str]:
    return {module_name(file) for file in PACKAGE.rglob("*.py")}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def torch_after_importing(names: set[str]) -> str:
    """Import the modules one by one in a fresh interpreter; say which brought torch, or ''."""
    code = f"""
import importlib, sys
for name in {sorted(names)!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} imports torch")
"""
    result = run_python(code)
    return result.stderr if result.returncode else ""


def test_only_the_named_modules_import_torch() -> None:
    assert torch_after_importing(modules() - TORCH) == ""


def test_the_torch_check_finds_torch() -> None:
    assert "freehold.model.glm imports torch" in torch_after_importing({"freehold.model.glm", "freehold.types"})


def test_the_list_of_torch_modules_is_current() -> None:
    assert modules() >= TORCH, f"no such modules: {sorted(TORCH - modules())}"


def test_help_needs_no_torch_and_loads_no_command() -> None:
    code = """
import sys
from freehold.cli.main import COMMANDS, main
assert main(["--help"]) == 0
loaded = [name for name in sys.modules if name == "torch" or name in [f"freehold.cli.{c}" for c in COMMANDS]]
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_help_takes_less_than_300_ms() -> None:
    """Processor seconds, the best of several: a busy machine must not fail it, a slow import must."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "freehold.cli.main", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3
