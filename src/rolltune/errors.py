"""The errors that end a run with a message and without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A user's mistakes in a config, all of them, one line each: ``key: what is wrong; what would be right``."""

    def __init__(self, problems: Sequence[str], *, on_all_ranks: bool = False):
        super().__init__("\n".join(problems))
        self.problems = list(problems)
        self.on_all_ranks = on_all_ranks  # every rank raises the same error, and rank 0 prints it


class RunStopped(RuntimeError):
    """A run that ended before its last step without a mistake in its config; the message says why, and how to
    resume."""


class RankFailed(RunStopped):
    """Another rank has failed with an error that keeps its traceback there. No rank may wait for it."""


class RankLost(RankFailed):
    """A collective failed, because a rank, its machine or the link to it is gone."""


class StopRequested(RuntimeError):
    """A step is left because the run was asked to stop; the weights are those of the last step."""


class SyncError(RuntimeError):
    """A sampler does not have the policy's weights; the message says what is wrong. Nothing was trained on it."""


class EngineError(RuntimeError):
    """An engine behind a sampler did not do what it was asked; the message says which, and what it answered."""


# Errors that all ranks raise, and that end a run with their message alone.
STOPS = (RunStopped, SyncError, EngineError, FloatingPointError)


def os_error_text(error: OSError) -> str:
    """Return what the system says of an error, with the file if there is one."""
    what = error.strerror or str(error)
    return what if error.filename is None else f"{error.filename}: {what}"
