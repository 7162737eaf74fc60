"""The one exception a user may see: what happened, why, and what to type next."""

from __future__ import annotations

INTERRUPTED = 130  # the exit code after Ctrl-C


class Dsv2Error(Exception):
    """A failure the user can act on. `exit_code` is 1 for a failed run, 2 for wrong usage."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", exit_code: int = 1) -> None:
        super().__init__(what)
        self.what, self.why, self.fix, self.exit_code = what, why, fix, exit_code

    @property
    def sentence(self) -> str:
        """What happened and why, in one line."""
        return f"{self.what} ({self.why})" if self.why else self.what


class UsageError(Dsv2Error):
    """The command line asks for something that cannot be done; exit code 2."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix, exit_code=2)
