"""A vLLM server as a process and as an address: started, watched and ended; asked over HTTP, and left in the middle of an answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from preftune.errors import UserError
from preftune.rollout import launch, worker
from preftune.rollout.config import VllmConfig

KEY = "VLLM_API_KEY"
"""Environment variable with the key of a server that runs already and wants one."""
TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses below 500 after which the same question may be answered."""
UNSET = ("LD_PRELOAD", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What of our environment is not another Python's."""


class Unreached(Exception):
    """The server did not answer as one that works; it may later."""


class Slow(Unreached):
    """It did not answer in time."""


class _Socket(http.client.HTTPConnection):
    """HTTP over a Unix socket, which no other user of the machine can open."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Caller:
    """Asks the server at `address`: http://host:port, or the path of a Unix socket. May be used by many threads."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def ask(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout: float, leaving: threading.Event | None = None
    ) -> tuple[int, Any]:
        """Status and JSON (None where it is none) of a GET, or of a POST of `body`.

        Raises Unreached for any failure of the connection, and at once when `leaving` is set and `interrupt` called.
        """
        connection, waiting = self._connection(timeout), None
        headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY):
            headers["authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            waiting = connection.sock  # http.client forgets it where a connection ends with its answer
            with self._lock:
                if leaving is not None and leaving.is_set():
                    raise Unreached("nobody waits for it any more")
                self._open.add(waiting)
            connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except TimeoutError:
            raise Slow(f"no answer within {timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise Unreached(f"{type(error).__name__}: {error}") from None
        finally:
            with self._lock:
                self._open.discard(waiting)
            connection.close()
        try:
            return status, json.loads(data)
        except ValueError:
            return status, None

    def interrupt(self) -> None:
        """Hang up wherever an answer is waited for."""
        with self._lock:
            for waiting in self._open:
                with contextlib.suppress(OSError):  # it has just ended by itself
                    waiting.shutdown(socket.SHUT_RDWR)

    def healthy(self) -> bool:
        """Whether the server answers, and its engine lives."""
        try:
            return self.ask("/health", timeout=10)[0] == 200
        except Unreached:
            return False

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if not self.address.startswith("http://"):
            return _Socket(self.address, timeout)
        parts = urlsplit(self.address)
        return http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)


class Child:
    """`vllm serve` as a child process with a Unix socket in a private folder, which also holds its log."""

    def __init__(self, config: VllmConfig, dtype: str, cache_bytes: int) -> None:
        self.config, self.dtype, self.cache_bytes = config, dtype, cache_bytes
        self.python = config.python or sys.executable
        folder = tempfile.mkdtemp(prefix="preftune-vllm-")
        if len(folder) > 80:  # a socket's path has 107 characters at most
            shutil.rmtree(folder)
            folder = tempfile.mkdtemp(prefix="preftune-vllm-", dir="/tmp")
        self.folder = Path(folder)
        self.address = str(self.folder / "socket")
        self.log = self.folder / "log"
        self.modules = self.folder / "python"
        self.modules.mkdir()
        shutil.copyfile(worker.__file__, self.modules / "preftune_worker.py")
        self._process: subprocess.Popen[bytes] | None = None

    def require(self) -> None:
        """Raises UserError where the Python that should run it has no vLLM."""
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        try:
            found = subprocess.run([self.python, "-c", code], capture_output=True, timeout=300, env=self._environment()).returncode == 0
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"this Python does not start: {error}", where="vllm.python") from None
        if not found:
            fix = "Run `pip install 'preftune[vllm]'`, or install it in an environment of its own and set vllm.python to that Python."
            raise UserError(f"{self.python} has no vLLM", where="vllm.python", fix=fix)

    def start(self, model: str) -> None:
        """Start to serve `model`; when this returns the server is not yet up."""
        self.stop()
        Path(self.address).unlink(missing_ok=True)
        command = [
            self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--uds", self.address, "--dtype", self.dtype,
            "--served-model-name", "policy", "--load-format", "safetensors", "--generation-config", "vllm",
            "--logprobs-mode", "processed_logprobs", "--worker-extension-cls", "preftune_worker.Reload", *self.config.arguments,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, launch.__file__, str(self.folder), *command],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._environment(), start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and all that it started."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.write(launch.KEEP)
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(launch.GRACE + 5)
        self._end_group()
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End a server that hangs, at once; `alive` is then False."""
        if self._process is not None:
            self._end_group()
            self._process.wait()

    def close(self) -> None:
        """Stop, and remove the folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def last_words(self) -> str:
        """Why the server ended, as far as its log tells."""
        text = re.sub(r"\x1b\[[\d;]*m", "", self.log.read_text(errors="replace")) if self.log.exists() else ""
        lines = [re.sub(r"^\([^)]*\)\s*", "", line).strip() for line in text.splitlines()]
        lines = [re.sub(r"^(ERROR|INFO|WARNING) \S+ \S+ \[[^\]]*\]\s*", "", line) for line in lines if line]
        reasons = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: \S|.*No module named|.*error: ", line)]
        first = [line for line in reasons if "See root cause" not in line and "Engine core initialization" not in line]
        return ((first or reasons or lines or ["it said nothing"])[-1])[:300]

    def _end_group(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1"}
        space = {} if "VLLM_CPU_KVCACHE_SPACE" in kept else {"VLLM_CPU_KVCACHE_SPACE": str(max(1, round(self.cache_bytes / 2**30)))}
        return {**kept, **quiet, **space, "PYTHONPATH": str(self.modules)}


def wait_until(ready: Callable[[], bool], seconds: float, leaving: threading.Event, *, every: float = 0.1) -> bool:
    """Whether it came to be ready in this time; no longer waited for when `leaving` is set."""
    deadline = time.monotonic() + seconds
    while not ready():
        if leaving.wait(every) or time.monotonic() > deadline:
            return False
    return True
