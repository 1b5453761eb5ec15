"""Experiments: what is watched, when it is enough, and what follows."""
