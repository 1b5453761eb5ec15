"""The native kernels against the reference, and the promises that go beyond it: rows, threads, forks, fallbacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from freehold.model.group_quant import GroupQuantized
from freehold.model.inputs import Span
from freehold.model.ops.library import Native
from freehold.model.ops.native import SMALL_ROWS, NativeOps
from freehold.model.ops.reference import ReferenceOps
from freehold.model.packed import KINDS, Kind, PackedWeight
from tests.native_cases import (
    ALL_ISAS,
    SUPPORTED,
    assert_close,
    assert_product,
    generator,
    native,
    needs_native,
    normal,
    packed,
    packed_heads,
    terms_of,
    twin_weight,
)

REFERENCE = ReferenceOps()
ROUTING = {"top_k": 4, "n_group": 1, "topk_group": 1, "normalise": True, "scale": 2.5}
# Two FP8 groups, the second one ragged; no count of outputs but the experts' width is whole panels.
HIDDEN, WIDTH, HEADS, NOPE, ROPE, VALUE, RANK = 168, 48, 5, 16, 8, 10, 72
EXPERTS, BLOCK, SLOTS = 16, 16, 640

pytestmark = [needs_native, pytest.mark.usefixtures("no_gradients")]


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Inputs:
    """One set of tensors for every operation. Rows of `x` and its like may be taken one by one."""

    ROWS = ("x", "ids", "chosen", "query", "angles", "latent_query", "mixed", "slots", "index_query", "index_weight")

    def __init__(self, rows: int, kind: Kind = "bf16", seed: int = 0) -> None:
        g = generator(seed)
        self.rows = rows
        self.x = normal(g, rows, HIDDEN)
        self.bias, self.norm, self.norm_bias = normal(g, 51), normal(g, HIDDEN), normal(g, HIDDEN)
        self.weight = packed(normal(g, 51, HIDDEN), kind)
        self.gate, self.up = (packed(normal(g, WIDTH + 3, HIDDEN)[:WIDTH] / 10, kind) for _ in range(2))
        self.down = packed(normal(g, HIDDEN, WIDTH) / 6, kind)
        self.router = packed(normal(g, EXPERTS, HIDDEN) / 10, "bf16")
        self.correction = torch.randn(EXPERTS, generator=g) / 20
        self.gate_up_E = packed(normal(g, EXPERTS, 2 * WIDTH, HIDDEN) / 10, kind)
        self.down_E = packed(normal(g, EXPERTS, HIDDEN, WIDTH) / 6, kind)
        self.ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:4] for _ in range(rows)])
        self.chosen = torch.rand(rows, 4, generator=g)
        self.query = normal(g, rows, HEADS, NOPE + ROPE)
        self.kv_b = packed_heads(normal(g, HEADS * (NOPE + VALUE), RANK) / 8, HEADS, NOPE, kind)
        self.angles = torch.rand(rows, ROPE // 2, generator=g) * 6
        self.latent = normal(g, SLOTS, RANK + ROPE)
        self.latent_query, self.mixed = normal(g, rows, HEADS, RANK + ROPE), normal(g, rows, HEADS, RANK)
        self.slots = torch.stack([torch.randperm(SLOTS, generator=g)[:150] for _ in range(rows)])
        self.slots[0, 70:] = -1  # a shorter context than the others
        self.index_query, self.index_weight = normal(g, rows, 3, 24), torch.randn(rows, 3, generator=g)

    def part(self, first: int, last: int) -> Inputs:
        """Rows first .. last of these."""
        some = object.__new__(Inputs)
        some.__dict__.update(self.__dict__)
        some.rows = last - first
        for name in self.ROWS:
            setattr(some, name, getattr(self, name)[first:last])
        return some


Operation = Callable[[ReferenceOps, Inputs], Tensor]

# Every operation whose rows are independent, by name: with weights of any kind, and the others (routers are bf16).
WEIGHTED: dict[str, Operation] = {
    "linear": lambda ops, a: ops.linear(a.x, a.weight, a.bias),
    "linear_fp32": lambda ops, a: ops.linear_fp32(a.x, a.weight),
    "swiglu": lambda ops, a: ops.swiglu(a.x, a.gate, a.up, a.down),
    "experts": lambda ops, a: ops.experts(a.x, a.ids, a.chosen, a.gate_up_E, a.down_E),
    "absorb": lambda ops, a: ops.absorb(a.query, a.kv_b, NOPE),
    "unabsorb": lambda ops, a: ops.unabsorb(a.mixed, a.kv_b, NOPE),
}
PLAIN: dict[str, Operation] = {
    "route": lambda ops, a: ops.route(a.x, a.router, a.correction, **ROUTING)[1],
    "rms_norm": lambda ops, a: ops.rms_norm(a.x, a.norm, 1e-5),
    "layer_norm": lambda ops, a: ops.layer_norm(a.x, a.norm, a.norm_bias, 1e-6),
    "rope": lambda ops, a: ops.rope(a.query, a.angles.cos(), a.angles.sin(), True, NOPE),
    "rope of halves": lambda ops, a: ops.rope(a.query, a.angles.cos(), a.angles.sin(), False),
    "sparse_attention": lambda ops, a: ops.sparse_attention(a.latent_query, a.latent, a.slots, RANK, 0.1),
}
OPERATIONS = WEIGHTED | PLAIN
CASES = [(name, kind) for name in WEIGHTED for kind in KINDS] + [(name, "bf16") for name in PLAIN]


@pytest.mark.parametrize("rows", [1, 5, SMALL_ROWS, SMALL_ROWS + 1, 37, 300])
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_every_operation_is_its_reference(isa: str, name: str, kind: Kind, rows: int) -> None:
    inputs = Inputs(rows, kind)
    assert_close(OPERATIONS[name](native(isa), inputs), OPERATIONS[name](REFERENCE, inputs))


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, name: str, kind: Kind) -> None:
    """Batching and speculation never change a token."""
    inputs, ops = Inputs(SMALL_ROWS, kind), native(isa)
    alone = torch.cat([OPERATIONS[name](ops, inputs.part(i, i + 1)) for i in range(SMALL_ROWS)])
    for rows in range(1, SMALL_ROWS + 1):
        assert torch.equal(OPERATIONS[name](ops, inputs.part(0, rows)), alone[:rows]), f"{rows} rows"
    for first in (1, 5, 11):  # other neighbours, another place in a tile
        assert torch.equal(OPERATIONS[name](ops, inputs.part(first, SMALL_ROWS)), alone[first:]), f"from {first}"


@pytest.mark.parametrize("rows", [1, 3, 40, 300])
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_number_of_threads_changes_nothing(isa: str, name: str, kind: Kind, rows: int) -> None:
    inputs = Inputs(rows, kind)
    results = [OPERATIONS[name](native(isa, threads), inputs) for threads in (1, 2, 3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [SMALL_ROWS, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_every_weight_is_multiplied_as_what_it_stands_for(isa: str, kind: Kind, rows: int) -> None:
    """Each input alone: the product is the weight itself."""
    weight = packed(normal(generator(7), 37, 200), kind)
    expected = twin_weight(weight)
    for first in range(0, 200, rows):
        x = torch.eye(200)[first : first + rows].bfloat16()
        x = torch.cat((x, x.new_zeros(rows - x.shape[0], 200)))  # of 200 rows the last block is cut
        out = native(isa).linear_fp32(x, weight)
        assert torch.equal(out[: 200 - first], expected.T[first : first + rows])


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_every_byte_of_fp8_is_the_number_it_stands_for(isa: str, rows: int) -> None:
    """Subnormal numbers and signed zeros among them; a NaN reaches its own output and no other."""
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    weight = PackedWeight(256, 16, "fp8")
    weight.load_codes(codes, torch.full((256, 1), 2.0**-3), 0)
    x = torch.zeros(rows, 16).bfloat16()
    x[:, 5] = 1.0
    expected = codes[:, 0].view(torch.float8_e4m3fn).float() * 2.0**-3
    out = native(isa).linear_fp32(x, weight)
    assert expected.isnan().sum() == 2
    assert all(torch.equal(row.nan_to_num(1e9), expected.nan_to_num(1e9)) for row in out)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_int8_codes_of_another_writer_reach_minus_128(isa: str) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, 8).contiguous()
    weight = PackedWeight(256, 8, "int8", group=8)
    weight.load(GroupQuantized(codes, torch.full((256, 1), -0.5).bfloat16(), 8, 8))
    for rows in (2, 30):
        out = native(isa).linear_fp32(torch.eye(8)[:1].bfloat16().expand(rows, 8), weight)
        assert torch.equal(out, (codes[:, 0].float() * -0.5).expand(rows, 256))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_large_work_is_cut_for_threads_and_stays_the_same(isa: str, kind: Kind) -> None:
    g = generator(3)
    x, rows = normal(g, 1, 1000), normal(g, 70, 1000)
    weight, down = packed(normal(g, 2001, 1000), kind), packed(normal(g, 1000, 2000) / 40, kind)
    gate = packed(normal(g, 2000, 1000), kind)
    calls: list[Callable[[ReferenceOps], Tensor]] = [
        lambda ops: ops.linear(x, weight),
        lambda ops: ops.linear(rows, weight),
        lambda ops: ops.swiglu(x, gate, gate, down),
        lambda ops: ops.swiglu(rows, gate, gate, down),
    ]
    if kind == "bf16":
        latent, query = normal(g, 5000, 288), normal(g, 1, 8, 288)
        slots = torch.randperm(5000, generator=g)[None, :1000]
        calls.append(lambda ops: ops.sparse_attention(query, latent, slots, 256, 0.06))
    for call in calls:
        results = [call(native(isa, threads)) for threads in (1, 2, 3)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
        assert_close(results[0], call(REFERENCE))
    for x_TI in (x, rows):
        twin = twin_weight(weight)
        assert_product(native(isa).linear(x_TI, weight), x_TI.float() @ twin.T, terms_of(x_TI, twin))


@pytest.mark.parametrize("rows", [SMALL_ROWS, 100])
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_routing_chooses_the_same_experts(isa: str, rows: int) -> None:
    inputs = Inputs(rows)
    router = inputs.router.dequantize()
    inputs.correction[3] = inputs.correction[7]
    router[3] = router[7]  # two experts with equal scores: the lower one first
    ids, _ = native(isa).route(inputs.x, packed(router, "bf16"), inputs.correction, **ROUTING)
    expected, _ = REFERENCE.route(inputs.x, router, inputs.correction, **ROUTING)
    assert torch.equal(ids.sort(-1).values, expected.sort(-1).values)
    assert bool((ids == 3).any())
    assert not bool(((ids == 7).any(-1) & ~(ids == 3).any(-1)).any())


@pytest.mark.parametrize(("first", "normed", "with_bias"), [(RANK, RANK, False), (0, RANK + ROPE, True)])
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_cache_rows_are_the_reference_and_no_others_change(isa: str, first: int, normed: int, with_bias: bool) -> None:
    g = generator(5)
    rows = 9
    x, weight, angles = normal(g, rows, RANK + ROPE), normal(g, normed), torch.rand(rows, ROPE // 2, generator=g)
    bias = normal(g, normed) if with_bias else None
    before = normal(g, 50, RANK + ROPE)
    slots = torch.randperm(50, generator=g)[:rows]
    caches = [before.clone(), before.clone()]
    for ops, cache in zip((native(isa), REFERENCE), caches, strict=True):
        ops.write_cache(x, weight, bias, 1e-6, angles.cos(), angles.sin(), True, first, cache, slots)
    assert_close(caches[0], caches[1])
    others = torch.ones(50, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(caches[0][others], before[others])


SELECTIONS = {
    "decode": [(0, 1, 500)],
    "decode of several": [(0, 1, 500), (1, 1, 30), (2, 1, 199)],
    "prefill from nothing": [(0, 300, 0)],
    "prefill goes on": [(0, 70, 400)],
    "mixed": [(2, 1, 333), (3, 120, 100), (123, 1, 17)],
}


@pytest.mark.parametrize("topk", [1, 16, 33, 256, 1000])
@pytest.mark.parametrize("case", SELECTIONS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_selection_is_the_same_set_with_many_ties(isa: str, case: str, topk: int) -> None:
    g = generator(len(case) + topk)
    # Small whole numbers: every score is exact, and most are shared by many positions.
    keys = torch.randint(-2, 3, (SLOTS, 24), generator=g).bfloat16()
    query = torch.randint(-2, 3, (420, 5, 24), generator=g).bfloat16()
    weight = torch.randint(-2, 3, (420, 5), generator=g).float()
    table = torch.randperm(SLOTS // BLOCK, generator=g)
    spans = tuple(Span(row, length, start, table) for row, length, start in SELECTIONS[case])
    expected = REFERENCE.select(query, weight, keys, spans, BLOCK, topk)
    for threads in (1, 3):
        chosen = native(isa, threads).select(query, weight, keys, spans, BLOCK, topk)
        assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_selection_over_a_long_context_cut_into_ranges(isa: str) -> None:
    g = generator(9)
    slots, topk = 40_000, 300
    keys = torch.randint(-1, 2, (slots, 16), generator=g).bfloat16()
    query, weight = torch.randint(-1, 2, (20, 4, 16), generator=g).bfloat16(), torch.ones(20, 4)
    table = torch.randperm(slots // 50, generator=g)
    for span in (Span(0, 1, slots - 1, table), Span(0, 20, slots - 20, table)):
        expected = REFERENCE.select(query, weight, keys, (span,), 50, topk)
        for threads in (1, 2, 3):
            chosen = native(isa, threads).select(query, weight, keys, (span,), 50, topk)
            assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_scores_that_only_rise_or_are_not_numbers_are_selected_right(isa: str) -> None:
    """Rising scores replace the whole candidate list again and again; NaN counts as the largest score."""
    keys = torch.zeros(8192, 2, dtype=torch.bfloat16)
    keys[:, 0] = torch.arange(8192) // 64 + 1  # exact in bf16 up to 256
    query, weight = torch.tensor([[[1.0, 0.0]]]).bfloat16(), torch.ones(1, 1)
    span = Span(0, 1, 8191, torch.arange(8192 // BLOCK))
    for _ in range(2):
        expected = REFERENCE.select(query, weight, keys, (span,), BLOCK, 100)
        chosen = native(isa).select(query, weight, keys, (span,), BLOCK, 100)
        assert torch.equal(chosen.sort(-1).values, expected.sort(-1).values)
        keys[5::40, 1], keys[77, 0], keys[4001, 0] = float("nan"), float("inf"), float("-inf")


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 40), (30, 100)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ALL_ISAS)
def test_dense_attention_is_causal_and_its_reference(isa: str, kind: Kind, start: int, length: int) -> None:
    g = generator(11)
    query = normal(g, 150, HEADS, NOPE + ROPE)
    kv_b = packed_heads(normal(g, HEADS * (NOPE + VALUE), RANK) / 8, HEADS, NOPE, kind)
    latent = normal(g, SLOTS, RANK + ROPE)
    latent[SLOTS // 2 :] = float("nan")
    span = Span(3, length, start, torch.randperm(SLOTS // 2 // BLOCK, generator=g))
    future = int(span.slots_P(BLOCK)[-1])
    expected = REFERENCE.dense_attention(query.float(), latent.float(), kv_b, span, BLOCK, NOPE, 0.2)
    out = native(isa).dense_attention(query, latent, kv_b, span, BLOCK, NOPE, 0.2)
    assert_close(out, expected, scale=float(expected.abs().max()) + 1)
    latent[future] = float("nan")  # only the last row sees the last position
    again = native(isa).dense_attention(query, latent, kv_b, span, BLOCK, NOPE, 0.2)
    assert torch.equal(again[:-1], out[:-1])
    assert bool(again[-1].isnan().all())


def test_what_lies_in_padded_slots_is_never_read() -> None:
    inputs = Inputs(2)
    inputs.latent[0] = float("nan")
    inputs.slots[inputs.slots == 0] = 1
    out = native(SUPPORTED[0]).sparse_attention(inputs.latent_query, inputs.latent, inputs.slots, RANK, 0.1)
    assert bool(out.isfinite().all())


def test_other_dtypes_and_shapes_go_to_the_reference() -> None:
    ops, inputs = native(SUPPORTED[0]), Inputs(3, "int4")
    single, plain = inputs.x.float(), inputs.weight.dequantize(dtype=torch.float32)
    assert torch.equal(ops.linear(single, inputs.weight), REFERENCE.linear(single, plain))
    assert torch.equal(ops.linear_fp32(single, inputs.weight), REFERENCE.linear_fp32(single, plain))
    assert torch.equal(ops.linear(inputs.x, plain.bfloat16()), REFERENCE.linear(inputs.x, plain.bfloat16()))
    for call in (WEIGHTED["swiglu"], WEIGHTED["experts"]):
        inputs.x = single
        assert torch.equal(call(ops, inputs), call(REFERENCE, inputs))
    half, norm = single.half(), inputs.norm.half()
    assert torch.equal(ops.rms_norm(half, norm, 1e-5), REFERENCE.rms_norm(half, norm, 1e-5))


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    """Grouped routing, matrices of two kinds in one MLP, experts whose width is not whole panels, and no rows."""
    ops, inputs = native(SUPPORTED[0]), Inputs(3)
    grouped = {**ROUTING, "n_group": 4, "topk_group": 2}
    found = [each.route(inputs.x, inputs.router, inputs.correction, **grouped) for each in (ops, REFERENCE)]
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], tolerance=1e-5)
    other = packed(inputs.up.dequantize(), "int8")
    mlp = (inputs.x, inputs.gate, other, inputs.down)
    assert_close(ops.swiglu(*mlp), REFERENCE.swiglu(*mlp))
    g = generator(4)
    gate_up, down = packed(normal(g, EXPERTS, 2 * 40, HIDDEN), "fp8"), packed(normal(g, EXPERTS, HIDDEN, 40), "fp8")
    routed = (inputs.x, inputs.ids, inputs.chosen, gate_up, down)
    assert torch.equal(ops.experts(*routed), REFERENCE.experts(*routed))
    empty = inputs.x[:0]
    assert ops.linear(empty, inputs.weight).shape == (0, 51)
    assert ops.swiglu(empty, inputs.gate, inputs.up, inputs.down).shape == (0, HIDDEN)
    assert ops.absorb(inputs.query[:0], inputs.kv_b, NOPE).shape == (0, HEADS, RANK + ROPE)


def test_inputs_of_another_width_are_refused() -> None:
    inputs = Inputs(3)
    with pytest.raises(ValueError, match="inputs have 160 values and weights 168"):
        native(SUPPORTED[0]).linear(inputs.x[:, :160], inputs.weight)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(Exception, match="sse2"):
        Native(1, "sse2")


def test_two_python_threads_share_one_object() -> None:
    ops, inputs = NativeOps(2), Inputs(4)
    weight = packed(normal(generator(1), 4000, HIDDEN), "int4")
    expected = ops.linear(inputs.x, weight)
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(200) if not torch.equal(ops.linear(inputs.x, weight), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_forked_child_computes_with_threads_of_its_own() -> None:
    ops, inputs = NativeOps(2), Inputs(1)
    weight = packed(normal(generator(1), 8000, HIDDEN), "int8")
    expected = ops.linear(inputs.x, weight)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs is ended
        same = all(torch.equal(ops.linear(inputs.x, weight), expected) for _ in range(50))
        del ops
        os._exit(0 if same else 3)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(ops.linear(inputs.x, weight), expected)


def test_the_interpreter_exits_while_the_threads_wait() -> None:
    script = (
        "import torch\n"
        "from freehold.model.ops.native import NativeOps\n"
        "from freehold.model.packed import PackedWeight\n"
        "ops = NativeOps(3)\n"
        "x, w = torch.ones(1, 64).bfloat16(), PackedWeight(9000, 64, 'bf16')\n"
        "w.load(torch.ones(9000, 64))\n"
        "print(int(ops.linear(x, w).float().sum()))\n"
        "other = NativeOps(2); other.linear(x, w); del other\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(9000 * 64)), done.stderr
