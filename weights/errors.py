"""What can go wrong between a model file and its place on disk.

    WeightsError
    ├── UnknownWeights      no entry of that name in that edition of the catalog
    ├── WrongSetting        (also a ValueError) WEIGHTS_EDITION or DEVICE has a wrong value
    ├── MissingPackaged     a folder that the repository should contain is not there
    ├── IncompleteModel     a model's files lack a part of it
    ├── LockMismatch        the lock file disagrees with the catalog
    ├── InvalidSource       (also a ValueError) what somebody named cannot be a place of weights
    ├── BadWeights          trained weights that a user brought: malformed, or for another model
    └── DownloadError
        ├── Offline           a file is needed, and offline mode forbids fetching it
        ├── AccessDenied      401 or 403: a token is missing, wrong, or has not accepted the licence
        ├── NotOnServer       404: no such repository, revision or file
        ├── TransferFailed    the network or the server failed, and kept failing
        ├── ChecksumMismatch  the bytes are not the expected ones; they were thrown away
        ├── RefusedAddress    the file is where a stranger must not make this machine look
        ├── TooLarge          more bytes than weights that people bring may have
        └── NotEnoughDisk     too little room where weights are kept

Every message names the file, where it comes from and what to do about it.
"""


class WeightsError(Exception):
    """Weights cannot be provided."""


class UnknownWeights(WeightsError):
    """The catalog has no such entry in the edition asked for."""


class WrongSetting(WeightsError, ValueError):
    """An environment variable has a value it may not have."""


class MissingPackaged(WeightsError):
    """A folder of the miniature edition is not in the repository."""


class IncompleteModel(WeightsError):
    """A model's files do not hold every value that the model has."""


class LockMismatch(WeightsError):
    """The lock file was written for another repository, revision or list of files."""


class BadWeights(WeightsError):
    """A file is not trained weights that we read, is malformed, or does not fit the model."""


class InvalidSource(WeightsError, ValueError):
    """A reference to weights, or a token for them, that breaks a rule; nothing was fetched."""


class DownloadError(WeightsError):
    """A file could not be fetched; nothing stands under its final name."""


class Offline(DownloadError):
    """A file is missing and offline mode is on."""


class AccessDenied(DownloadError):
    """The server wants a token, or another one."""


class NotOnServer(DownloadError):
    """The server has no such repository, revision or file."""


class TransferFailed(DownloadError):
    """The transfer failed as often as allowed; what arrived is kept for the next try."""


class ChecksumMismatch(DownloadError):
    """Size or hash differ from what the lock, the catalog or the hub says."""


class RefusedAddress(DownloadError):
    """An address that is not public, or not https, in a reference or behind a redirect."""


class TooLarge(DownloadError):
    """The file has more bytes than weights that people bring may have."""


class NotEnoughDisk(DownloadError):
    """The disk has no room for what remains to be fetched."""
