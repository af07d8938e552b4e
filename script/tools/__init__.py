"""Tools that keep generated files equal to their sources."""
