"""What can go wrong in a training.

    TrainingError
    ├── InvalidTraining     (also a ValueError) a rule is broken; nothing was loaded or changed
    ├── WrongCheckpoint     the work folder holds checkpoints of another training
    ├── MissingOptimizer    the optimizer asked for cannot run here
    ├── MissingCompiler     there is no compiler for compile_unet
    ├── Diverged            the loss is no number any more
    └── DiskFull            no room for a checkpoint or for what was learnt

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


class MissingCompiler(TrainingError):
    """No C++ compiler was found, which torch.compile needs on a CPU."""


class Diverged(TrainingError):
    """The loss became infinite or not a number."""


class DiskFull(TrainingError):
    """A checkpoint, or what was learnt, does not fit on the disk."""
