"""How much an example thinks: off, High and Max, the longer always holding the shorter. Torch-free."""

from __future__ import annotations

from freehold.train.data.example import Effort


def thinking(effort: Effort, task: str, steps: str, check: str) -> str:
    """The thinking of an answer: nothing without effort; the steps at High; the task, the steps and a check at Max."""
    if effort == "none":
        return ""
    if effort == "high":
        return steps
    return f"{task} {steps} Let me check. {check} That is right."
