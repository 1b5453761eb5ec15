"""The GLM-5.2 architecture: config, layers, weights, tokenizer. It knows nothing of requests."""
