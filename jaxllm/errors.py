"""The errors a user can act on.

Each message is one sentence that names the key, file or tensor, the value found, and what to do.  The command line prints
them without a traceback and exits with status 1; everything else that is raised is a bug in jaxllm.
"""

from __future__ import annotations


class JaxllmError(Exception):
    """A condition the user can act on; printed as one sentence, without a traceback."""


class ConfigError(JaxllmError):
    """A run file (or `--set`) says something that cannot be.

    `key` is the dotted path of the offending key, for example `training.global_batch`; the loader turns it into a file and a
    line when it reports the error, so whoever raises it need not know where the value came from.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key
        self.message = message

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class DataError(JaxllmError):
    """A source file, a document or a tokenizer cannot be used."""


class CheckpointError(JaxllmError):
    """A checkpoint is damaged, incomplete, or does not belong to this run."""


class BackendError(JaxllmError):
    """The backend cannot do what the run asks for on this machine."""


class NonFiniteError(JaxllmError):
    """The loss or the gradient norm is NaN or infinite and the run file says to stop."""
