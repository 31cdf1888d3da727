"""SIGINT and SIGTERM: the first ends what has nothing to save and asks what has to save and stop; the second ends the process at once."""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = "\nStopping after this step, then saving. Send the signal (Ctrl-C) once more to quit at once, without saving.\n"


class Stopped(KeyboardInterrupt):
    """The first signal came while there was nothing to save yet."""


class GracefulStop:
    """While open, `requested` is None until the first SIGINT or SIGTERM, then its number; the second exits with 128 + its number.

    While `patient` is False the first one also raises Stopped, wherever the main thread is; set it to True before work that must be saved.

    Python runs signal handlers only between bytecodes, so two signals during one long backward pass would look like one.
    The second is therefore counted by a thread that the C-level handler wakes, and ends the process even inside a kernel.
    One may stand within another: the inner one alone is told. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, notice: str = NOTICE) -> None:
        self.requested: int | None = None
        self.patient = True
        self._notice = notice.encode()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """0 when nothing was asked, else 130 or 143."""
        return 128 + self.requested if self.requested else 0

    def __enter__(self) -> Self:
        global _open
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._count, name="second-signal", daemon=True)
        self._watcher.start()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._outer, _open = _open, self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._previous:
            return
        self._restore()
        self._write.close()  # the watcher reads the end of the stream and returns
        self._watcher.join()
        self._read.close()

    def _restore(self) -> None:
        global _open
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._previous, _open = {}, self._outer

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested = number
            if not self.patient:
                raise Stopped
            os.write(2, self._notice)  # print() is not allowed to be entered twice, and this may interrupt one

    def _count(self) -> None:
        received = 0
        while numbers := self._read.recv(16):
            for number in numbers:
                received += number in SIGNALS
                if received > 1:
                    os._exit(128 + number)


_open: GracefulStop | None = None


def _forget_in_child() -> None:
    """A forked worker must die of SIGTERM as usual, and its Ctrl-C must not count as its parent's second."""
    if _open is not None:
        _open._restore()


os.register_at_fork(after_in_child=_forget_in_child)
