"""The one error a user may see, and the exit codes of the command line."""

EXIT_USER = 2
EXIT_NONFINITE = 3
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2, never a traceback.

    `what` says what is wrong, `where` the file:line, key or path it concerns, `fix` what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        if self.fix:
            line = f"{line.rstrip('.')}. {self.fix}"
        return " ".join(line.split())


class NonFiniteError(Exception):
    """Training was stopped because too many steps gave non-finite numbers: exit code 3."""
