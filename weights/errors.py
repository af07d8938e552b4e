"""Errors of everything between the name of weights and the tensors of a file.

Every message names the file, where it comes from and what to do about it.
"""


class WeightsError(Exception):
    """Weights cannot be provided."""


class UnknownWeights(WeightsError):
    """The catalog has no such entry in the requested edition."""


class WrongSetting(WeightsError, ValueError):
    """An environment variable has a value that it may not have."""


class MissingPackaged(WeightsError):
    """A folder of the miniature edition is not in the repository."""


class IncompleteModel(WeightsError):
    """A model's files do not hold every value that the model has."""


class LockMismatch(WeightsError):
    """The lock file was written for another repository, revision or list of files."""


class BadWeights(WeightsError):
    """A file is not trained weights that we read, is malformed, or does not fit the model."""


class InvalidSource(WeightsError, ValueError):
    """A reference to weights, or a token for them, breaks a rule. Nothing was fetched."""


class DownloadError(WeightsError):
    """A file could not be fetched. Nothing has its final name."""


class Offline(DownloadError):
    """A file is missing and offline mode is on."""


class AccessDenied(DownloadError):
    """The server wants a token, or another one."""


class NotOnServer(DownloadError):
    """The server has no such repository, revision or file."""


class TransferFailed(DownloadError):
    """The transfer failed as often as allowed."""


class ChecksumMismatch(DownloadError):
    """Size or hash differ from those of the lock, the catalog or the hub."""


class RefusedAddress(DownloadError):
    """An address that is not public, or not https, in a reference or behind a redirect."""


class TooLarge(DownloadError):
    """The file has more bytes than weights from users may have."""


class DiskFull(DownloadError):
    """The disk has no room for what remains to be written."""
