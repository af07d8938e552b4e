"""What can be wrong with pictures that people send.

    PreprocessError
    └── BadPicture          (also a ValueError) a file that is no picture, or one we do not take

Every message names the input, what is wrong with it and the remedy.
"""


class PreprocessError(Exception):
    """What was sent cannot be prepared for a model."""


class BadPicture(PreprocessError, ValueError):
    """A file that holds no picture, a damaged one, or one with too many pixels."""
