"""Models behind OpenAI-compatible endpoints: client, budget, and a server of one's own."""
