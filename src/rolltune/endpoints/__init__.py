"""Models behind OpenAI-compatible endpoints: client, settings, budget, and a local server."""
