"""Where an engine's time goes, part by part, beside what the machine could do: `freehold bench engine`."""
