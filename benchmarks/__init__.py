"""Benchmarks beside diffusers and cog-sdxl: the Python of script/bench."""
