"""Training of the GLM-5.2 architecture: a small model from nothing, and one's own data on a model one has."""
