"""Training models of the GLM-5.2 architecture: data, objectives, optimisers, the loop, fine-tuning, publishing."""
