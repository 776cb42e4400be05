"""The few named errors of ringflash; each message names the argument, its value and what is allowed."""


class RingflashError(Exception):
    """Base of every error that ringflash raises on purpose."""


class ArgumentError(RingflashError, ValueError):
    """An argument has a value that is not supported; raised before any communication."""


class RankMismatchError(RingflashError, RuntimeError):
    """Ranks of one group disagree on an argument or a configuration value."""


class UnsupportedError(RingflashError, NotImplementedError):
    """A transformation of attention that does not exist here: second derivatives, forward-mode derivatives, vmap."""


class CheckpointError(RingflashError, RuntimeError):
    """A checkpoint is incomplete, damaged, or belongs to another model."""


class RunStoppedError(RingflashError):
    """A training run was stopped by a signal; it has saved a checkpoint and can go on from there."""


class DataError(RingflashError, RuntimeError):
    """A data path holds nothing that can be trained on."""
