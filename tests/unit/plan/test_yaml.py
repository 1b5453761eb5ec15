"""What the planner writes as YAML, a YAML parser reads back equal: every kind of manifest, and any plain data."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from freehold.cli.plan_options import Asked, question_of
from freehold.errors import FreeholdError
from freehold.plan.flags import VERSIONS
from freehold.plan.hardware import gpus
from freehold.plan.manifest import manifest
from freehold.plan.planner import deployment_of
from freehold.plan.search import candidates
from freehold.plan.yaml import to_yaml

MODELS = ("glm-5.2", "glm-5.2-fp8", "glm-5.2-nvfp4", "glm-5.2-w4a16", "glm-5.3-fp8", "deepseek-v3.2")
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
TRICKY = st.sampled_from(
    "|~|null|Yes|on|1|1e3|0x1f|1_000|12:30|12:30:45|2026-11-22|=|<<|- a|a: b|a #b|#a|a:|:a|*a|&a|!a|%a|@a|>|[a|{a|a\n|"
    "\ta|'a'|\"a|.5|.inf|.nan|--a|-a|$(A)|$A|\x7f|\x85a|a\u2028b|\ufeffa|\uffff|😀|TRUE|Null|0o7".split("|")
)
SCALARS = TRICKY | TEXT | st.integers(-(10**12), 10**12) | st.booleans() | st.none()
DATA: Any = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TRICKY | TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("on", [key for key, gpu in gpus().items() if gpu.kind != "cpu"])
@pytest.mark.parametrize("model", MODELS)
def test_every_manifest_reads_back_equal(model: str, on: str) -> None:
    asked = question_of(Asked(model=model, gpu_price=2.0), f"{2 * gpus()[on].node}x{on}")  # type: ignore[arg-type]
    try:
        run, _, _ = candidates(asked.model, asked.cluster, ("vllm", "sglang"))
    except FreeholdError:
        return  # nothing fits, so there is no manifest
    for candidate in run[::7]:  # neighbours differ by one number in one flag
        engine = next(known for known in VERSIONS if known == candidate.engine)
        documents = manifest(deployment_of(asked, candidate, engine))
        assert list(yaml.safe_load_all(to_yaml(documents))) == documents


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(TRICKY | TEXT, DATA, min_size=1, max_size=4), min_size=1, max_size=3))
def test_any_plain_data_reads_back_equal(documents: list[dict[str, Any]]) -> None:
    assert list(yaml.safe_load_all(to_yaml(documents))) == documents


def test_what_is_no_plain_data_is_refused() -> None:
    with pytest.raises(TypeError, match="no YAML for bytes"):
        to_yaml([{"a": b"b"}])
