"""What can go wrong while a picture is made.

    GenerationError
    ├── InvalidRequest      (also a ValueError) a rule is broken; nothing was loaded or changed
    ├── UnsafePictures      the safety check has left nothing to give out
    └── OutOfDeviceMemory   the device has no room for a picture of this size and number

Errors about pictures that are sent are `preprocess.errors.PreprocessError`, about model files
`weights.errors.WeightsError`. Every message names the value, the rule
and the remedy.
"""


class GenerationError(Exception):
    """The request could not be fulfilled."""


class InvalidRequest(GenerationError, ValueError):
    """A value, or a combination of values, that the request may not have."""


class UnsafePictures(GenerationError):
    """Every picture of the request was found unsafe; the message is replicate/cog-sdxl's own."""


class OutOfDeviceMemory(GenerationError):
    """The device ran out of memory; the models are intact and the next request is unaffected."""
