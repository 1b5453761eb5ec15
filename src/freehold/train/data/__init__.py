"""Generated training and evaluation data: pure functions of (kind, split, seed, index). Torch-free."""
