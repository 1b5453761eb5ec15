"""Wrong engines on purpose: what checks must catch. None of this is reachable from `src/`."""
