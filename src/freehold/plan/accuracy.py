"""What a predicted time is worth: its basis, and the interval that measured ones were found in. Torch-free.

    expected("sglang", gpu("h200"), load("glm-5-fp8"), Layout(tp=8), drafts=0).tpot        # (0.93, 1.08)

Three distances from what was measured (`calibration.toml`):

    near    the same GPU architecture, precision, engine and kind of layout: the residuals of the fit itself
    apart   another GPU or precision, else alike: residuals of groups that were left out of the fit
    far     another engine or vendor, drafts, IndexShare, several nodes or attention groups: what such runs show

An interval holds measured over predicted: nine runs of ten of the first two kinds, twice the range of the few runs of
the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from freehold.plan.measured import runs, table
from freehold.plan.types import Basis, Engine, Figure, Gpu, Layout, ModelSpec

Distance = Literal["near", "apart", "far"]


@dataclass(frozen=True, slots=True)
class Expected:
    """ttft, tpot: factors of a predicted time, from low to high."""

    distance: Distance
    ttft: tuple[float, float]
    tpot: tuple[float, float]
    source: str

    @property
    def basis(self) -> Basis:
        return "interpolated" if self.distance == "near" else "roofline"

    def of_ttft(self, seconds: float) -> Figure:
        return self._figure(seconds, self.ttft)

    def of_tpot(self, seconds: float) -> Figure:
        return self._figure(seconds, self.tpot)

    def of_rate(self, rate: float) -> Figure:
        """Tokens or requests a second: as many fewer as a token takes longer."""
        return self._figure(rate, (1 / self.tpot[1], 1 / self.tpot[0]))

    def _figure(self, value: float, ends: tuple[float, float]) -> Figure:
        return Figure(value, value * ends[0], value * ends[1], self.basis, self.source)


def expected(engine: Engine, gpu: Gpu, model: ModelSpec, layout: Layout, *, drafts: int) -> Expected:
    """The interval for a setup."""
    distance = _distance(engine, gpu, model, layout, drafts)
    entry = table()["intervals"][distance]
    ttft, tpot = ((float(entry[name][0]), float(entry[name][1])) for name in ("ttft", "tpot"))
    return Expected(distance, ttft, tpot, entry["source"])


def _distance(engine: Engine, gpu: Gpu, model: ModelSpec, layout: Layout, drafts: int) -> Distance:
    setups = [run.setup for run in runs()]
    plain = layout == Layout(tp=layout.tp) and layout.tp <= gpu.node and not drafts
    every_layer = len(model.config.full_layers) == model.config.num_hidden_layers
    same_kind = engine in {setup.engine for setup in setups} and gpu.kind in {setup.gpu.kind for setup in setups}
    if not (plain and every_layer and same_kind):
        return "far"
    same = any((setup.gpu.arch, setup.model.dtype) == (gpu.arch, model.dtype) for setup in setups)
    return "near" if same and layout.tp in {setup.layout.tp for setup in setups} else "apart"
