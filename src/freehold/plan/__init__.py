"""`freehold plan`: whether a model fits, on what, how fast, at what cost. Torch-free."""
