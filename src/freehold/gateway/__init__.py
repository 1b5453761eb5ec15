"""One OpenAI-compatible address in front of every engine and API."""
