"""What can be wrong with pictures, archives and captions that people send.

    PreprocessError
    ├── BadPicture          (also a ValueError) a file that is no picture, or one we do not take
    ├── BadArchive          (also a ValueError) no archive, one that is unsafe, or of too few photos
    ├── BadCaptions         (also a ValueError) captions that are unreadable or fit no picture
    ├── DiskFull            no room to unpack an archive
    └── ModelMissing        what was asked for takes a model that the edition of the weights lacks

Every message names the input, what is wrong with it and the remedy; nothing stays on the disk.
"""


class PreprocessError(Exception):
    """What was sent cannot be prepared for a model."""


class BadPicture(PreprocessError, ValueError):
    """A file that holds no picture, a damaged one, or one with too few or too many pixels."""


class BadArchive(PreprocessError, ValueError):
    """A file that is no archive, is damaged, hostile or too large, or holds too few pictures."""


class BadCaptions(PreprocessError, ValueError):
    """Captions that cannot be read, belong to no picture, or never say the trigger word."""


class DiskFull(PreprocessError):
    """The archive's content does not fit on the disk."""


class ModelMissing(PreprocessError):
    """The edition of the weights has no model for what was asked."""
