"""What every test runs with: few threads, and hypothesis profiles."""

from __future__ import annotations

import os

# Before anything imports torch: tests are many and small, and their order of summation must not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import HealthCheck, settings

# A slow or busy machine must not fail a property: no deadlines. `make nightly` takes many more examples.
_SLOW = [HealthCheck.too_slow]
settings.register_profile("default", deadline=None, suppress_health_check=_SLOW, derandomize=True)
settings.register_profile("nightly", deadline=None, suppress_health_check=_SLOW, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
