"""The OpenAI-compatible HTTP API. Knows the engine only through dwarfstar_engine.serving."""
