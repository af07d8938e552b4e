"""File formats of trained weights: detected, validated, read and written."""
