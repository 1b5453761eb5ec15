"""One call, from its bytes to the last byte of its answer: read, sent, metered, translated where it must be."""
