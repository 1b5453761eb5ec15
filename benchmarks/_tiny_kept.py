"""Figures of models that were trained for comparison and are not shipped: `results/tiny_retrained_ARM.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from _common import RESULTS
from _tiny_losses import Losses


@dataclass(frozen=True)
class Retrained:
    """One model. tokens, seconds: of its training. losses: by held-out document. rates: [value, low, high]."""

    arm: str
    tokens: int
    seconds: float
    digest: str
    losses: Losses
    rates: dict[str, list[float]]
    facts: dict[str, Any]

    def check_same(self, digest: str) -> None:
        """Raises ValueError if it was measured on other held-out tokens: then no difference means anything."""
        if self.digest != digest:
            raise ValueError(
                f"tiny_retrained_{self.arm}.json was measured on other held-out documents (the data, the tokenizer or "
                "their number changed since): retrain it with benchmarks/_tiny_retrain.py"
            )

    def summary(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "seconds": self.seconds, "rates": self.rates, **self.facts}

    def save(self) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        document = {
            "arm": self.arm,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "digest": self.digest,
            "rates": self.rates,
            "facts": self.facts,
            "losses": self.losses.as_dict(),
        }
        path = RESULTS / f"tiny_retrained_{self.arm}.json"
        path.write_text(json.dumps(document) + "\n")
        print(f"wrote {path.name}")


def kept(arm: str) -> Retrained | None:
    path = RESULTS / f"tiny_retrained_{arm}.json"
    if not path.exists():
        return None
    raw = json.loads(path.read_text())
    return Retrained(
        raw["arm"], raw["tokens"], raw["seconds"], raw["digest"], Losses.from_dict(raw["losses"]), raw["rates"],
        raw["facts"],
    )  # fmt: skip
