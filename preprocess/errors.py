"""What can be wrong with the images, archives and captions of a request or training.

    PreprocessError
    ├── BadImage            (also a ValueError) a file that is no image, or one that is not accepted
    ├── BadArchive          (also a ValueError) no archive, an unsafe one, or one of too few images
    ├── BadCaptions         (also a ValueError) captions that are unreadable or match no image
    ├── DiskFull            no room to unpack an archive
    └── ModelMissing        the edition of the weights lacks a model

Every message names the input, the fault and the remedy; nothing stays on the disk.
"""


class PreprocessError(Exception):
    """An input cannot be prepared for a model."""


class BadImage(PreprocessError, ValueError):
    """A file that holds no image, a damaged one, or one with too few or too many pixels."""


class BadArchive(PreprocessError, ValueError):
    """A file that is no archive, is damaged, hostile or too large, or holds too few images."""


class BadCaptions(PreprocessError, ValueError):
    """Captions that cannot be read, match no image, or never contain the trigger word."""


class DiskFull(PreprocessError):
    """The archive's content does not fit on the disk."""


class ModelMissing(PreprocessError):
    """The edition of the weights lacks the model that a setting needs."""
