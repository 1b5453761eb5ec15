"""What quantising did to the weights: the error of each tensor, and of each kind of tensor. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPORT_NAME = "quantization-report.json"


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far a quantised matrix is from the one it was made of.

    stored: how it is stored, in words. rms: of the original weights. relative_rms: RMS of the error by rms (0 if all
    weights are 0). max_abs: the largest error of one weight. cosine: between both matrices, as vectors.
    """

    name: str
    part: str
    stored: str
    weights: int
    rms: float
    relative_rms: float
    max_abs: float
    cosine: float


@dataclass(frozen=True, slots=True)
class KindError:
    """The errors of one part of the model that is stored one way, as if it were one matrix; worst: of one tensor."""

    part: str
    stored: str
    tensors: int
    weights: int
    relative_rms: float
    worst: float
    least_cosine: float

    @property
    def snr_db(self) -> float:
        """Signal to noise in decibels; infinite without error."""
        return -20 * math.log10(self.relative_rms) if self.relative_rms else math.inf


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What `quantize_checkpoint` wrote. Bytes are of tensor data; kept_shards were there from an interrupted run."""

    source: str
    scheme: str
    source_bytes: int
    total_bytes: int
    bits_per_weight: float
    shards: int
    kept_shards: int
    errors: tuple[TensorError, ...]

    @property
    def worst_first(self) -> list[TensorError]:
        return sorted(self.errors, key=lambda error: error.relative_rms, reverse=True)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the kinds, and the tensors with the worst first."""
        raw = asdict(self)
        raw["kinds"] = [asdict(kind) for kind in by_kind(self.errors)]
        raw["tensors"] = [asdict(error) for error in self.worst_first]
        del raw["errors"]
        return raw


def by_kind(errors: Iterable[TensorError]) -> list[KindError]:
    """Errors by part and form, the largest share of weights first."""
    kinds: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        kinds.setdefault((error.part, error.stored), []).append(error)
    found = [
        KindError(
            part,
            stored,
            len(members),
            sum(error.weights for error in members),
            _pooled(members),
            max(error.relative_rms for error in members),
            min(error.cosine for error in members),
        )
        for (part, stored), members in kinds.items()
    ]
    return sorted(found, key=lambda kind: kind.weights, reverse=True)


def error_from_json(raw: Mapping[str, Any]) -> TensorError:
    """The inverse of `asdict`. Raises TypeError for other keys."""
    return TensorError(**raw)


def source_name(directory: str | Path) -> str:
    """How reports name a checkpoint: its folder, without the path to it."""
    return Path(directory).resolve().name


def _pooled(errors: list[TensorError]) -> float:
    signal = math.fsum(error.weights * error.rms**2 for error in errors)
    noise = math.fsum(error.weights * (error.rms * error.relative_rms) ** 2 for error in errors)
    return math.sqrt(noise / signal) if signal else 0.0
