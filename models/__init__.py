"""Networks in memory: loading, caching, running them fast. Shared by generation and training."""
