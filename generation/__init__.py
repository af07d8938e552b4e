"""The inference core: a request in, pictures out. Imports neither cog nor the boundary files."""
