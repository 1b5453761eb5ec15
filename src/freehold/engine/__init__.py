"""From requests to tokens: scheduling, the paged cache, sampling. It knows nothing of text formats or HTTP."""
