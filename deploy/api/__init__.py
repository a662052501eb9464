"""The OpenAI protocol: what a client may send and what it gets back. Knows no engine, no FastAPI, no Ray."""
