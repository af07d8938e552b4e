"""The trainer core: ready examples in, trained weights out. Knows nothing of cog."""
