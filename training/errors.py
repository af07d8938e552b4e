"""What can go wrong in a training.

    TrainingError
    ├── InvalidTraining     (also a ValueError) a rule is broken; nothing was loaded or changed
    ├── WrongCheckpoint     the work folder holds checkpoints of another training
    ├── MissingOptimizer    the optimizer asked for cannot run here
    └── Diverged            the loss is no number any more

Every message names the value, the rule and the remedy.
"""


class TrainingError(Exception):
    """The training could not be done."""


class InvalidTraining(TrainingError, ValueError):
    """A setting, an example, or a combination of them, that a training may not have."""


class WrongCheckpoint(TrainingError):
    """A checkpoint that this training cannot continue from."""


class MissingOptimizer(TrainingError):
    """The optimizer's library is not installed, or cannot run on this device."""


class Diverged(TrainingError):
    """The loss became infinite or not a number."""
