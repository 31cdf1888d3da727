import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from preftune.training.signals import GracefulStop

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

LOOP = """
import sys, time
from preftune.training.signals import GracefulStop
with GracefulStop() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(stop.exit_code)
"""

# One kernel that neither returns nor runs Python's handlers: a join in C without the interpreter's lock.
STUCK = """
import ctypes
from preftune.training.signals import GracefulStop
with GracefulStop() as stop:
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    left = 30
    while left:
        left = libc.sleep(left)
"""

FORKED = """
import os, signal, sys, time
from preftune.training.signals import GracefulStop
with GracefulStop() as stop:
    child = os.fork()
    if not child:
        print(os.getpid(), flush=True)
        time.sleep(30)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert stop.requested is None
    print("alone", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    time.sleep(0.1)
sys.exit(stop.exit_code)
"""


OTHERS = """
import signal, sys, time
from preftune.training.signals import GracefulStop
signal.signal(signal.SIGUSR1, lambda number, frame: None)
with GracefulStop() as stop:
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1):
        signal.raise_signal(number)
        time.sleep(0.05)
print("saved", flush=True)
sys.exit(stop.exit_code)
"""


def start(script: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("number", CODES)
def test_the_first_signal_lets_the_loop_save_and_names_the_exit_code(number: signal.Signals) -> None:
    process, _ = start(LOOP)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (CODES[number], "saved\n")
    assert err.count("Stopping after this step") == 1


@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize("second", CODES)
def test_the_second_signal_ends_the_process_at_once_even_inside_a_kernel(first: signal.Signals, second: signal.Signals) -> None:
    process, _ = start(STUCK)
    process.send_signal(first)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(second)
    began = time.monotonic()
    process.communicate(timeout=10)
    assert process.returncode == CODES[second]
    assert time.monotonic() - began < 2


def test_a_forked_worker_dies_of_sigterm_and_does_not_count_for_its_parent() -> None:
    process, child = start(FORKED)
    assert process.stdout
    os.kill(int(child), signal.SIGTERM)
    assert process.stdout.readline() == "alone\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_other_signals_are_not_counted() -> None:
    process, line = start(OTHERS)
    process.communicate(timeout=10)
    assert (line, process.returncode) == ("saved", 130)


def test_handlers_and_the_wakeup_descriptor_are_restored() -> None:
    before = [signal.getsignal(number) for number in CODES]
    threads = threading.active_count()
    with GracefulStop(notice="") as stop:
        assert stop.requested is None and stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.exit_code) == (signal.SIGTERM, 143)
    assert [signal.getsignal(number) for number in CODES] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = [signal.getsignal(number) for number in CODES]
    seen: list[object] = []

    def work() -> None:
        with GracefulStop() as stop:
            seen.append([signal.getsignal(number) for number in CODES] == before)
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True, None]
