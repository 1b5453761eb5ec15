"""The operations on native x86-64 kernels (`native/*.cpp`), for bf16 inference: the fast twin of `reference.py`.

Each call hands addresses to C and nothing else; what the kernels do not take (weights that are not packed, other dtypes
and devices, unusual shapes) goes to the reference. Gradients are not recorded: use it under `torch.inference_mode()`.

Up to 16 rows (decode, speculation) every result is reduced in one order that depends on neither the number of rows nor
the number of threads, so batching never changes a token. More rows (prefill) are multiplied in tiles that sum in
another order, and may differ in the last bits. Codes of quantised weights are exact in both, and sums are fp32;
AVX-512-BF16 multiplies treat denormal bf16 inputs as zero, which is far below fp32 rounding of such sums. Shape
suffixes as in `interface.py`.
"""

from __future__ import annotations

import ctypes
from typing import NoReturn

import torch
from torch import Tensor

from freehold.errors import EngineError
from freehold.model.index_keys import Fp8Keys, IndexKeys
from freehold.model.inputs import Span
from freehold.model.latents import Fp8Latents, Latents
from freehold.model.ops.interface import HeadWeights, Weight
from freehold.model.ops.library import Native
from freehold.model.ops.reference import ReferenceOps
from freehold.model.packed import PANEL, PackedWeight
from freehold.model.pager import ExpertPager

DEFAULT_THREADS = torch.get_num_threads()
"""What torch found when this module was first imported: one a core, or OMP_NUM_THREADS."""

SMALL_ROWS = 16
"""Up to this many rows use the kernels that read each weight once; more use a blocked matrix multiplication."""

MOST_CHOSEN = 64
"""Experts a token may have: the size of an array in the kernels."""

_BF16, _FP32, _INT64 = torch.bfloat16, torch.float32, torch.int64
_NO_SCRATCH = "a native kernel could not allocate its scratch memory"
_PAGING_FAILED = 2  # what a native call returns when the pager could not read
# In the order of Part in native/context.h.
_PARTS = (
    "norms", "attention.project", "attention.write", "attention.attend", "indexer.project", "indexer.select",
    "router", "experts", "mlp",
)  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class NativeOps(ReferenceOps):
    """Implements `interface.Ops`. Not for concurrent use by design: calls from several threads take turns.

    threads: the caller included, default DEFAULT_THREADS. isa: one of `library.ISAS`, default the best of this machine.
    Raises library.NativeUnavailable.
    """

    name = "native"

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.threads = threads if threads is not None else DEFAULT_THREADS
        self._native = Native(self.threads, isa)
        self._context = self._native.context
        self.pager: ExpertPager | None = None
        """Of the model's experts, if they are paged."""
        self.isa = self._native.isa

    # -- projections ---------------------------------------------------------------------------------------------------

    def linear(self, x_TI: Tensor, weight_OI: Weight, bias_O: Tensor | None = None) -> Tensor:
        if isinstance(weight_OI, Tensor) or x_TI.dtype is not _BF16 or x_TI.dim() != 2:
            return super().linear(x_TI, weight_OI, bias_O)
        return self._product(x_TI, weight_OI, bias_O, _BF16)

    def linear_fp32(self, x_TI: Tensor, weight_OI: Weight) -> Tensor:
        if isinstance(weight_OI, Tensor) or x_TI.dtype is not _BF16 or x_TI.dim() != 2:
            return super().linear_fp32(x_TI, weight_OI)
        return self._product(x_TI, weight_OI, None, _FP32)

    def _product(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows, inner = x.shape
        x = _dense(x)
        if inner != weight.inner:
            raise ValueError(f"inputs have {inner} values and weights {weight.inner}")
        out = torch.empty((rows, weight.outputs), dtype=dtype)
        if self._native.product(
            self._context, out.data_ptr(), weight.outputs, dtype is _FP32, x.data_ptr(), x.stride(0), rows,
            weight.handle, None if bias is None else bias.data_ptr(),
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    def swiglu(self, x_TH: Tensor, gate_IH: Weight, up_IH: Weight, down_HI: Weight) -> Tensor:
        rows = x_TH.shape[0]
        if (
            isinstance(gate_IH, Tensor)
            or isinstance(up_IH, Tensor)
            or isinstance(down_HI, Tensor)
            or not gate_IH.like(up_IH)
            or x_TH.dtype is not _BF16
            or x_TH.dim() != 2
            or x_TH.shape[1] != gate_IH.inner
            or rows == 0
        ):
            return super().swiglu(x_TH, gate_IH, up_IH, down_HI)
        x = _dense(x_TH)
        out = torch.empty((rows, down_HI.outputs), dtype=_BF16)
        if self._native.swiglu(
            self._context, out.data_ptr(), x.data_ptr(), x.stride(0), rows,
            gate_IH.handle, up_IH.handle, down_HI.handle,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    # -- whole layers --------------------------------------------------------------------------------------------------

    def run_layers(self, sizes: int, weights: int, count: int, step: int) -> None:
        """fh_layers(): the addresses are those of the structures of native/layers.h. `fused.FusedLayers` calls it."""
        if result := self._native.layers(self._context, sizes, weights, count, step):
            self._raise(result)

    def profile_parts(self) -> dict[str, float]:
        """Seconds that `run_layers` spent in each part since this was last asked; {} if it did not run."""
        seconds = (ctypes.c_double * len(_PARTS))()
        self._native.clock(self._context, ctypes.addressof(seconds))
        return dict(zip(_PARTS, seconds, strict=True)) if any(seconds) else {}

    # -- norms and rotary embedding ------------------------------------------------------------------------------------

    def rms_norm(self, x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        if x_TH.dtype is not _BF16 or weight_H.dtype is not _BF16 or x_TH.dim() != 2:
            return super().rms_norm(x_TH, weight_H, eps)
        return self._norm(x_TH, weight_H, None, eps)

    def layer_norm(self, x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
        if x_TH.dtype is not _BF16 or weight_H.dtype is not _BF16 or bias_H.dtype is not _BF16 or x_TH.dim() != 2:
            return super().layer_norm(x_TH, weight_H, bias_H, eps)
        return self._norm(x_TH, weight_H, bias_H, eps)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x = _dense(x)
        rows, size = x.shape
        out = torch.empty((rows, size), dtype=_BF16)
        if self._native.norm(
            self._context, out.data_ptr(), x.data_ptr(), x.stride(0), rows, size,
            weight.data_ptr(), None if bias is None else bias.data_ptr(), eps,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    def rope(self, x_TNC: Tensor, cos_TQ2: Tensor, sin_TQ2: Tensor, interleaved: bool, first: int = 0) -> Tensor:
        if x_TNC.dtype is not _BF16 or not cos_TQ2.is_contiguous() or not sin_TQ2.is_contiguous():
            return super().rope(x_TNC, cos_TQ2, sin_TQ2, interleaved, first)
        x = _dense(x_TNC)
        rows, heads, size = x.shape
        row, head, _ = x.stride()
        out = torch.empty((rows, heads, size), dtype=_BF16)
        if self._native.rope(
            self._context, out.data_ptr(), x.data_ptr(), row, head, rows, heads, size,
            first, 2 * cos_TQ2.shape[1], cos_TQ2.data_ptr(), sin_TQ2.data_ptr(), interleaved,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    def write_cache(
        self,
        x_TC: Tensor,
        weight_A: Tensor,
        bias_A: Tensor | None,
        eps: float,
        cos_TQ2: Tensor,
        sin_TQ2: Tensor,
        interleaved: bool,
        first: int,
        cache_SC: Tensor | Fp8Keys | Fp8Latents,
        slots_T: Tensor,
    ) -> None:
        eight, scales, fp8_rank = not isinstance(cache_SC, Tensor), None, 0
        if isinstance(cache_SC, Fp8Keys):
            stored, scales = cache_SC.values_SD, cache_SC.scales_S.data_ptr()
        elif isinstance(cache_SC, Fp8Latents):
            stored, fp8_rank = cache_SC.records_SB, cache_SC.rank
        else:
            stored = cache_SC
        if (
            x_TC.dtype is not _BF16
            or weight_A.dtype is not _BF16
            or stored.dtype is not (torch.uint8 if eight else _BF16)
            or stored.stride(1) != 1
            or not (slots_T.is_contiguous() and cos_TQ2.is_contiguous() and sin_TQ2.is_contiguous())
        ):
            return super().write_cache(
                x_TC, weight_A, bias_A, eps, cos_TQ2, sin_TQ2, interleaved, first, cache_SC, slots_T
            )
        x = _dense(x_TC)
        rows, size = x.shape
        if self._native.write(
            self._context, stored.data_ptr(), stored.stride(0), scales, slots_T.data_ptr(), x.data_ptr(), x.stride(0),
            rows, size, weight_A.shape[0], weight_A.data_ptr(), None if bias_A is None else bias_A.data_ptr(), eps,
            first, 2 * cos_TQ2.shape[1], cos_TQ2.data_ptr(), sin_TQ2.data_ptr(), interleaved, fp8_rank,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return None

    # -- experts -------------------------------------------------------------------------------------------------------

    def route(
        self,
        x_TH: Tensor,
        weight_EH: Weight,
        bias_E: Tensor,
        *,
        top_k: int,
        n_group: int,
        topk_group: int,
        normalise: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        if n_group > 1 or isinstance(weight_EH, Tensor) or x_TH.dtype is not _BF16 or bias_E.dtype is not _FP32:
            return super().route(
                x_TH, weight_EH, bias_E,
                top_k=top_k, n_group=n_group, topk_group=topk_group, normalise=normalise, scale=scale,
            )  # fmt: skip
        scores_TE = self._product(x_TH, weight_EH, None, _FP32)
        rows, experts = scores_TE.shape
        ids_TX = torch.empty((rows, top_k), dtype=_INT64)
        weights_TX = torch.empty((rows, top_k), dtype=_FP32)
        if self._native.route(
            self._context, ids_TX.data_ptr(), weights_TX.data_ptr(), scores_TE.data_ptr(), rows,
            bias_E.data_ptr(), experts, top_k, normalise, scale,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return ids_TX, weights_TX

    def experts(
        self, x_TH: Tensor, ids_TX: Tensor, weights_TX: Tensor, gate_up_EIH: Weight, down_EHI: Weight
    ) -> Tensor:
        rows, chosen = ids_TX.shape
        if (
            isinstance(gate_up_EIH, Tensor)
            or isinstance(down_EHI, Tensor)
            or x_TH.dtype is not _BF16
            or x_TH.shape[1] != gate_up_EIH.inner
            or chosen > MOST_CHOSEN
            or rows == 0
            or down_EHI.inner % PANEL
            or not (ids_TX.is_contiguous() and weights_TX.is_contiguous())
        ):
            return super().experts(x_TH, ids_TX, weights_TX, gate_up_EIH, down_EHI)
        x = _dense(x_TH)
        out = torch.empty((rows, down_EHI.outputs), dtype=_BF16)
        if result := self._native.experts(
            self._context, out.data_ptr(), x.data_ptr(), x.stride(0), rows, ids_TX.data_ptr(), weights_TX.data_ptr(),
            chosen, down_EHI.count, down_EHI.inner, gate_up_EIH.handle, down_EHI.handle,
        ):  # fmt: skip
            self._raise(result)
        return out

    def _raise(self, result: int) -> NoReturn:
        """What a native call that uses experts failed with."""
        if result == _PAGING_FAILED:
            failure = None if self.pager is None else self.pager.failure
            raise failure or EngineError("an expert that a step needs was not brought into memory")
        raise MemoryError(_NO_SCRATCH)

    # -- selection and attention ---------------------------------------------------------------------------------------

    def select(
        self,
        query_TJD: Tensor,
        weight_TJ: Tensor,
        keys_SD: IndexKeys,
        spans: tuple[Span, ...],
        block_size: int,
        topk: int,
    ) -> Tensor:
        heads, dim = query_TJD.shape[1:]
        if isinstance(keys_SD, Fp8Keys):
            keys, scales = keys_SD.values_SD, keys_SD.scales_S.data_ptr()
            stored = keys.dtype is torch.uint8 and keys_SD.scales_S.dtype is _FP32 and keys_SD.scales_S.is_contiguous()
        else:
            keys, scales, stored = keys_SD, None, keys_SD.dtype is _BF16
        if query_TJD.dtype is not _BF16 or not stored or weight_TJ.dtype is not _FP32 or dim % 2:
            return super().select(query_TJD, weight_TJ, keys_SD, spans, block_size, topk)
        query, weight, keys = _dense(query_TJD), _dense(weight_TJ), _dense(keys)
        rows = sum(span.length for span in spans)
        width = min(topk, max((span.end for span in spans), default=0))
        out = torch.empty((rows, width), dtype=_INT64)
        query_row, query_head, _ = query.stride()
        weight_row, row = weight.stride(0), 0
        for span in spans:
            table = span.table_B.contiguous()
            if self._native.select(
                self._context, out.data_ptr() + 8 * width * row, width,
                query.data_ptr() + 2 * query_row * span.row, query_row, query_head,
                weight.data_ptr() + 4 * weight_row * span.row, weight_row, span.length, heads, dim,
                keys.data_ptr(), keys.stride(0), scales, table.data_ptr(), block_size, span.start, topk,
            ):  # fmt: skip
                raise MemoryError(_NO_SCRATCH)
            row += span.length
        return out

    def absorb(self, query_RNC: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        rows, heads, size = query_RNC.shape
        if query_RNC.dtype is not _BF16 or isinstance(kv_b_OV, Tensor):
            return super().absorb(query_RNC, kv_b_OV, nope)
        query, up_key = _dense(query_RNC), kv_b_OV.up_key
        query_row, query_head, _ = query.stride()
        out = torch.empty((rows, heads, up_key.outputs + size - nope), dtype=_BF16)
        if self._native.absorb(
            self._context, out.data_ptr(), query.data_ptr(), query_row, query_head, rows, heads, size - nope,
            up_key.handle,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    def unabsorb(self, mixed_RNV: Tensor, kv_b_OV: HeadWeights, nope: int) -> Tensor:
        rows, heads, _ = mixed_RNV.shape
        if mixed_RNV.dtype is not _BF16 or isinstance(kv_b_OV, Tensor):
            return super().unabsorb(mixed_RNV, kv_b_OV, nope)
        mixed, up_value = mixed_RNV.contiguous(), kv_b_OV.up_value
        out = torch.empty((rows, heads, up_value.outputs), dtype=_BF16)
        if self._native.unabsorb(self._context, out.data_ptr(), mixed.data_ptr(), rows, heads, up_value.handle):
            raise MemoryError(_NO_SCRATCH)
        return out

    def sparse_attention(
        self, query_RNL: Tensor, latent_SL: Latents, slots_RK: Tensor, rank: int, scale: float
    ) -> Tensor:
        fp8 = isinstance(latent_SL, Fp8Latents)
        latent = latent_SL.records_SB if isinstance(latent_SL, Fp8Latents) else latent_SL
        if query_RNL.dtype is not _BF16 or not (fp8 or latent.dtype is _BF16):
            return super().sparse_attention(query_RNL, latent_SL, slots_RK, rank, scale)
        slots = _dense(slots_RK)
        return self._attend(_dense(query_RNL), _dense(latent), slots, slots.stride(0), -1, rank, scale, fp8)

    def dense_attention(
        self,
        query_TNC: Tensor,
        latent_SL: Latents,
        kv_b_OV: HeadWeights,
        span: Span,
        block_size: int,
        nope: int,
        scale: float,
    ) -> Tensor:
        """In the absorbed form too: it skips what lies ahead of a row and needs no keys and values of every head."""
        wide = isinstance(latent_SL, Tensor) and latent_SL.dtype is not _BF16
        if query_TNC.dtype is not _BF16 or wide or isinstance(kv_b_OV, Tensor):
            return super().dense_attention(query_TNC, latent_SL, kv_b_OV, span, block_size, nope, scale)
        query_RNL = self.absorb(query_TNC[span.row : span.row + span.length], kv_b_OV, nope)
        slots = span.slots_P(block_size)
        if isinstance(latent_SL, Fp8Latents):  # read once, not for every row
            latent_SL, slots = self.read_latents(latent_SL, slots), torch.arange(len(slots))
        mixed = self._attend(query_RNL, _dense(latent_SL), slots, 0, span.start, kv_b_OV.up_key.outputs, scale)
        return self.unabsorb(mixed, kv_b_OV, nope)

    def read_latents(self, latents: Fp8Latents, slots_P: Tensor) -> Tensor:
        """`latents.rows(slots_P)` in bf16, which is exact: [P, L]."""
        slots, records = slots_P.contiguous(), latents.records_SB
        out = torch.empty((len(slots), latents.rank + latents.rope), dtype=_BF16)
        if self._native.read(
            self._context, out.data_ptr(), records.data_ptr(), records.stride(0), slots.data_ptr(), len(slots),
            latents.rank, latents.rope,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out

    def _attend(
        self,
        query: Tensor,
        latent: Tensor,
        slots: Tensor,
        slots_row: int,
        start: int,
        rank: int,
        scale: float,
        fp8: bool = False,
    ) -> Tensor:
        rows, heads, latent_dim = query.shape
        query_row, query_head, _ = query.stride()
        out = torch.empty((rows, heads, rank), dtype=_BF16)
        if self._native.attend(
            self._context, out.data_ptr(), query.data_ptr(), query_row, query_head, rows, heads,
            latent.data_ptr(), latent.stride(0), latent_dim, rank,
            slots.data_ptr(), slots_row, slots.shape[-1], start, scale, fp8,
        ):  # fmt: skip
            raise MemoryError(_NO_SCRATCH)
        return out
