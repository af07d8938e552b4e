"""What can go wrong between a model file and its place on disk.

    WeightsError
    ├── UnknownWeights      no entry of that name in that edition of the catalog
    ├── WrongSetting        (also a ValueError) WEIGHTS_EDITION or DEVICE has a wrong value
    ├── MissingPackaged     a folder that the repository should contain is not there
    ├── LockMismatch        the lock file disagrees with the catalog
    └── DownloadError
        ├── Offline           a file is needed, and offline mode forbids fetching it
        ├── AccessDenied      401 or 403: a token is missing, wrong, or has not accepted the licence
        ├── NotOnServer       404: no such repository, revision or file
        ├── TransferFailed    the network or the server failed, and kept failing
        ├── ChecksumMismatch  the bytes are not the expected ones; they were thrown away
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


class LockMismatch(WeightsError):
    """The lock file was written for another repository, revision or list of files."""


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


class NotEnoughDisk(DownloadError):
    """The disk has no room for what remains to be fetched."""
