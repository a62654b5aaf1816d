"""The error family of the project: every mistake a user can make is one of these, never a traceback from deep inside.

A message names the offending value, what was expected and the remedy, in one line where one line can hold it.
`exit_code` is what the command line returns: 2 user error, 3 data error, 4 interrupted but resumable, 1 anything else.
"""

from __future__ import annotations

import errno

# Errors of the operating system about files that the user can put right; anything else is a bug.
USERS_FILE_ERRORS = frozenset(
    {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT, errno.ENAMETOOLONG}
)


class DinoScaleError(Exception):
    """Base of the family. Instances carry one string, so they survive pickling between processes."""

    exit_code = 1


class UserError(DinoScaleError):
    """A command, an argument or a folder that cannot be used as asked."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every problem with file and line."""


class RunFolderError(UserError):
    """A run folder that exists where none may, or is missing or unusable where one must be."""


class SaveError(UserError):
    """A checkpoint that the run cannot end without could not be written (disk full, folder gone); earlier ones stay."""


class DataError(DinoScaleError):
    """Annotations, images, shards or weights whose content is wrong."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint that is torn, altered, or does not fit the run it is loaded into."""


class NonFiniteError(UserError):
    """Gradients were NaN or infinite more often than the configuration allows; settings or data have to change."""


class WorkerMemoryError(UserError):
    """A worker needed more memory than there is; the message says what to change. The run can be resumed then."""


class Interrupted(DinoScaleError):
    """The run was asked to stop and did so cleanly; `dino-scale resume` continues it."""

    exit_code = 4


class WorkerLostError(DinoScaleError):
    """A worker process died without an error of its own (killed, out of memory, host lost); resumable."""

    exit_code = 4


class ClusterLostError(WorkerLostError):
    """The cluster cannot be reached any more, not even to leave it: resumable, and this process must end at once."""
