"""Errors of a generation request.

    GenerationError
    ├── InvalidRequest      (also a ValueError) a rule is broken; nothing was loaded or changed
    ├── UnsafeImages        the safety checker left no image to return
    └── OutOfDeviceMemory   images of this size and number do not fit into memory

Errors about input images are `preprocess.errors.PreprocessError`, about model files
`weights.errors.WeightsError`. Every message names the value, the rule and the remedy.
"""


class GenerationError(Exception):
    """The request could not be fulfilled."""


class InvalidRequest(GenerationError, ValueError):
    """A value, or a combination of values, that the request may not have."""


class UnsafeImages(GenerationError):
    """The safety checker rejected every image; the message is replicate/cog-sdxl's own."""


class OutOfDeviceMemory(GenerationError):
    """The device ran out of memory; the models are intact and the next request is unaffected."""
