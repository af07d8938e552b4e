"""What can go wrong in a training.

    TrainingError
    ├── InvalidTraining     (also a ValueError) a broken rule; nothing was loaded or changed
    ├── WrongCheckpoint     the work folder holds checkpoints of another training
    ├── MissingOptimizer    the optimizer cannot run here
    ├── MissingCompiler     there is no compiler for compile_unet
    ├── Diverged            the loss is not finite
    └── DiskFull            no room for a checkpoint or for the trained weights

Every message names the value, the rule and the remedy.
"""


class TrainingError(Exception):
    """The training failed."""


class InvalidTraining(TrainingError, ValueError):
    """An input, or a combination of inputs or examples, that breaks a rule."""


class WrongCheckpoint(TrainingError):
    """A checkpoint that this training cannot resume from."""


class MissingOptimizer(TrainingError):
    """The optimizer's library is not installed, or cannot run on this device."""


class MissingCompiler(TrainingError):
    """No C++ compiler was found, which torch.compile needs on a CPU."""


class Diverged(TrainingError):
    """The loss became infinite or not a number."""


class DiskFull(TrainingError):
    """A checkpoint, or the trained weights, do not fit on the disk."""
