"""The OpenAI-compatible HTTP server: validates requests, streams answers, counts what happens."""
