"""Weights that users bring with a request: parsed, resolved, fetched through a guard, cached."""
