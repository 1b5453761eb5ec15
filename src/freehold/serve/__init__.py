"""Text and HTTP in front of the engine: templates, parsing, the APIs, and `LLM`."""
