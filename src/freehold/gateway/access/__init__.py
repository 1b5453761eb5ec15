"""Whether a call may be made: keys, rates, concurrency, budgets."""
