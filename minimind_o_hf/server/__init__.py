"""The server: one model, many conversations."""
