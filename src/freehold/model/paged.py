"""Experts that stay on disk: stacks of packed matrices whose memory is a pager's slots.

`packing.pack_model(paged=True)` gives a model such stacks; `page_experts` then opens or makes the file they are in, and
gives them a pager. What the checkpoint is loaded into goes to the file, one matrix at a time, unless it is there
already: then the checkpoint's experts are not even read.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from freehold.errors import ConfigError
from freehold.headers import CheckpointIndex
from freehold.model.checkpoint_files import Progress
from freehold.model.expert_file import ExpertFile, Layout, MatrixBytes, source_files
from freehold.model.glm import Glm
from freehold.model.moe import MoE
from freehold.model.packed import KINDS, PANEL, Kind, PackedWeight, Source
from freehold.model.pager import ExpertPager, check_budget

DIRECTORY = ".freehold"
"""In the checkpoint's directory: what is derived from it, and may be deleted."""


class PagedStack(PackedWeight):
    """A stack of matrices in a pager's file. Of no use until `attach`."""

    def __init__(self, outputs: int, inner: int, kind: Kind, *, count: int, group: int | None = None) -> None:
        super().__init__(outputs, inner, kind, count=count, group=group)
        self.layer, self.matrix = -1, -1  # in the file
        self._one = PackedWeight(outputs, inner, kind, group=group)  # a matrix, wherever it lies

    def _hold(self, codes: Tensor | None = None, scales: Tensor | None = None) -> None:
        none = torch.empty(0, self.panel_bytes, dtype=torch.uint8)
        super()._hold(none, torch.empty(0, dtype=self.scale_dtype))
        if self.kind == "bf16":
            self.scales = None

    @property
    def layout(self) -> MatrixBytes:
        scales = 0 if self.kind == "bf16" else -(-self.inner // self.group) * PANEL * self.scale_dtype.itemsize
        return MatrixBytes(self.panels, self.panel_bytes, scales)

    def attach(self, pager: ExpertPager, layer: int, matrix: int) -> None:
        """Be matrix 0 (gate_up) or 1 (down) of a layer of the pager's file."""
        self.pager, self.layer, self.matrix = pager, layer, matrix
        self._describe(None, None, pager.handle(layer, matrix))

    def wants(self, index: int, first: int) -> bool:
        return not self.pager.file.has(self.layer, index, self.matrix, first // PANEL)

    @torch.no_grad()
    def load(self, source: Source, index: int = 0, first: int = 0, *, name: str = "weight") -> None:
        piece = PackedWeight(source.shape[0], self.inner, self.kind, group=self.group)
        piece.load(source, name=name)
        scales = memoryview(b"") if piece.scales is None else _bytes(piece.scales)
        self.pager.file.write(self.layer, index, self.matrix, first // PANEL, _bytes(piece.codes), scales)

    def dequantize(self, index: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        self.pager.need(self.layer, [index])
        record, form = self.pager.view(self.layer, index), self.layout
        at = self.pager.file.layout.matrix_at(self.layer, self.matrix)
        codes = torch.frombuffer(record, dtype=torch.uint8, offset=at, count=form.panels * form.codes)
        scales = None
        if form.scales:
            size = form.panels * form.scales
            scales = torch.frombuffer(record, dtype=torch.uint8, offset=at + form.scales_at, count=size)
            scales = scales.view(self.scale_dtype).view(form.panels, -1, PANEL)
        self._one._hold(codes.view(form.panels, form.codes), scales)
        return self._one.dequantize(0, dtype)


def page_experts(
    model: Glm, source: Path, directory: Path | None, budget: int, label: str, *, stages: int | None = None
) -> ExpertPager:
    """Give the stacks of a model, which was packed with paged=True, their file and a pager with `budget` bytes.

    source: the checkpoint's directory; directory: of the file, default `.freehold` in it. Load the model next, and then
    call `finish`. Raises CheckpointError, DiskFull, InsufficientMemory, or ConfigError for a model without such stacks.
    """
    stacks = list(_stacks(model))
    if not stacks:
        raise ConfigError("--expert-memory: this model has no routed experts that can be paged")
    layout = Layout(tuple((gate_up.layout, down.layout) for gate_up, down in stacks), stacks[0][0].count)
    check_budget(layout, budget)  # before room is taken on the disk
    files = [shard.path for shard in CheckpointIndex.open(source).shards]
    depends_on = {
        "files": source_files([*files, source / "config.json"]),
        "forms": [[(stack.kind, stack.group, *stack.shape) for stack in pair] for pair in stacks],
        "packing": packing_digest(),
    }
    file = ExpertFile(directory if directory is not None else source / DIRECTORY, layout, label, depends_on)
    if stages is None:
        stages = sum(isinstance(layer.mlp, MoE) for layer in model.decoder_layers)  # dense ones are not in the file
    try:
        pager = ExpertPager(file, budget, stages=stages)
    except BaseException:
        file.close()
        raise
    for layer, pair in enumerate(stacks):
        for matrix, stack in enumerate(pair):
            stack.attach(pager, layer, matrix)
    return pager


def packing_digest() -> str:
    """Of what packing makes of fixed weights, in every kind: it changes whenever the layout of panels does."""
    digest = hashlib.sha256()
    values = torch.arange(32 * 128, dtype=torch.float32).view(32, 128)
    for kind in KINDS:
        weight = PackedWeight(32, 128, kind)
        weight.load((values * 0.37).sin().to(torch.bfloat16))
        digest.update(_bytes(weight.codes))
        if weight.scales is not None:
            digest.update(_bytes(weight.scales))
    return digest.hexdigest()[:16]


def finish(pager: ExpertPager, *, verify: bool = False, progress: Progress | None = None) -> None:
    """After loading: the file is complete and ready to be read. verify: check every record's checksums."""
    pager.file.finish()
    if verify:
        pager.file.verify(progress)


def _stacks(model: Glm) -> Iterator[tuple[PagedStack, PagedStack]]:
    for layer in [*model.decoder_layers, *([model.mtp] if model.mtp is not None else [])]:
        if isinstance(layer.mlp, MoE):
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            if isinstance(gate_up, PagedStack) and isinstance(down, PagedStack):
                yield gate_up, down


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).view(-1).numpy().data
