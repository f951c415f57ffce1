"""The errors a user can act on.

Each message is one sentence that names the key, file or tensor, the value found, and what to do.  The command line prints
them without a traceback and exits with status 1; everything else that is raised is a bug in jaxllm.
"""

from __future__ import annotations


class JaxllmError(Exception):
    """A condition the user can act on; printed as one sentence, without a traceback."""


class ConfigError(JaxllmError):
    """A run file (or `--set`) says something that cannot be.

    `key` is the dotted path of the offending key, for example `training.global_batch` (empty: the whole file).  Whoever raises
    it need not know where the value came from: the loader, and the command line for what is found later, add `location`, which
    is `FILE:LINE` or the `--set` that gave the value.  `others` are further errors of the same file, found together with this.
    """

    def __init__(self, key: str, message: str, location: str | None = None, others: tuple[ConfigError, ...] = ()) -> None:
        super().__init__(message)
        self.key = key
        self.message = message
        self.location = location
        self.others = others

    def __str__(self) -> str:
        sentence = ": ".join(part for part in (self.location, self.key, self.message) if part)
        return "\n".join([sentence, *map(str, self.others)])


class DataError(JaxllmError):
    """A source file, a document or a tokenizer cannot be used."""


class CheckpointError(JaxllmError):
    """A checkpoint is damaged, incomplete, or does not belong to this run."""


class BackendError(JaxllmError):
    """The backend cannot do what the run asks for on this machine."""


class NonFiniteError(JaxllmError):
    """The loss or the gradient norm is NaN or infinite and the run file says to stop."""
