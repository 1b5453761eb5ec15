"""What tokens cost, in whole micro-dollars (1e-6 USD), so that sums are exact. Torch-free."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from freehold.gateway.call import Price
from freehold.gateway.config import Prices

_MILLION = 1_000_000


def price_of(prices: Prices) -> Price:
    """Micro-dollars a million tokens, from the settings' USD a million tokens: 0.15 becomes exactly 150,000."""
    cached = prices.cached_input
    return Price(_micro(prices.input), None if cached is None else _micro(cached), _micro(prices.output))


def cost(price: Price, input_tokens: int | None, cached_tokens: int | None, output_tokens: int | None) -> int | None:
    """What an attempt cost, rounded up to a micro-dollar: a call is not free because it is small. None if its tokens
    are unknown and not free.

    input_tokens include the cached ones; output_tokens include reasoning, as in `freehold.ledger.Row`. Output that was
    not delivered was generated all the same, and costs as much. Unknown cached tokens count as not cached.
    """
    if input_tokens is None or output_tokens is None:
        return None if price.input or price.output or price.cached_input else 0
    cached_price = price.input if price.cached_input is None else price.cached_input
    cached = min(max(cached_tokens or 0, 0), input_tokens)
    return -(
        -((input_tokens - cached) * price.input + cached * cached_price + output_tokens * price.output) // _MILLION
    )


def at_most(price: Price, input_tokens: int, output_tokens: int) -> int:
    """What so many tokens can cost at the most, rounded up: for reservations. No actual `cost` of them is above it."""
    dearest = max(price.input, price.cached_input or 0)
    return -(-(input_tokens * dearest + output_tokens * price.output) // _MILLION)


def _micro(dollars: float) -> int:
    """As the decimal number that was written, not as the binary one it became."""
    return int((Decimal(repr(dollars)) * _MILLION).to_integral_value(ROUND_HALF_UP))
