"""`freehold plan`: whether a model fits, on what, how fast, at what cost. Torch-free.

What is known is in tables with the source and date of every figure (`*.toml`); what follows from it is counted.
"""
