"""A stand-in for a vLLM server, in numpy alone: its completions with token ids and log-probabilities, its health, its new weights.

In a test it runs in a thread behind a TCP port; as a program it is what a "Python" starts in place of vLLM, behind a Unix socket, and
`fake.json` in its model's folder says when it dies. Its log-probabilities come from a function of the tokens before.
"""

from __future__ import annotations

import hashlib
import json
import os
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY, WINDOW = 24, 64
Logits = Callable[[Sequence[int]], np.ndarray]


def hashed(ids: Sequence[int]) -> np.ndarray:
    """[V] logits that depend on all tokens before."""
    digest = hashlib.blake2b(repr(list(ids)).encode(), digest_size=4).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCABULARY) * 2


def text(ids: Sequence[int]) -> str:
    """One letter a token."""
    return "".join(chr(97 + token % 26) for token in ids)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def processed(logits: np.ndarray, body: dict[str, Any], before: Sequence[int]) -> np.ndarray:
    """[V] log-probabilities of the distribution drawn from, as vLLM shapes it: penalty, temperature, min-p, top-k, top-p."""
    x = logits.copy()
    for token in set(before) if body.get("repetition_penalty", 1.0) != 1 else ():
        x[token] = x[token] / body["repetition_penalty"] if x[token] > 0 else x[token] * body["repetition_penalty"]
    if not body["temperature"]:
        return log_softmax(x)
    x = x / body["temperature"]
    p = np.exp(log_softmax(x))
    x[p < body.get("min_p", 0.0) * p.max()] = -np.inf
    if body.get("top_k", 0):
        x[x < np.sort(x)[-body["top_k"]]] = -np.inf
    order = np.argsort(-x)
    p = np.exp(log_softmax(x))[order]
    x[order[(p.cumsum() - p) >= body.get("top_p", 1.0)]] = -np.inf
    return log_softmax(x)


def complete(body: dict[str, Any], logits: Logits, mode: str = "processed", rows: Logits | None = None) -> dict[str, Any]:
    """The choice that a request gets; `rows` gives the logits behind every token of a text at once."""
    prompt, ids, told = list(body["prompt"]), list[int](), list[float]()
    random = np.random.default_rng(body.get("seed", 0))
    finish, reason = "length", None
    while len(ids) < body["max_tokens"]:
        raw = logits([*prompt, *ids])
        shaped = processed(raw, body, [*prompt, *ids])
        draw = random.random()
        token = int(shaped.argmax()) if not body["temperature"] else int(np.searchsorted(np.exp(shaped).cumsum(), draw))
        token = min(token, len(raw) - 1)
        ids.append(token)
        told.append(float((shaped if mode == "processed" else log_softmax(raw))[token]))
        if token in body.get("stop_token_ids", ()):
            finish = "stop"
            break
        if reason := next((s for s in body.get("stop", ()) if s in text(ids)), None):
            finish = "stop"
            break
    read = None
    if body.get("prompt_logprobs") is not None:
        all_of = rows(prompt) if rows else [logits(prompt[: k + 1]) for k in range(len(prompt))]
        read = [None, *({str(t): {"logprob": float(log_softmax(all_of[k])[t])}} for k, t in enumerate(prompt[1:]))]
    return {
        "index": 0, "text": text(ids), "token_ids": ids, "prompt_token_ids": prompt, "finish_reason": finish, "stop_reason": reason,
        "logprobs": {"token_logprobs": told}, "prompt_logprobs": read,
    }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def address_string(self) -> str:
        return "somebody"

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200 if self.server.well else 503, b"")
        else:
            self.answer(200, {"data": [{"id": "policy", "max_model_len": self.server.window}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        fake = self.server
        if self.path == "/collective_rpc":
            self.answer(*fake.reload(body))
        elif self.path == "/reset_prefix_cache":
            self.answer(200, {"success": True})
        else:
            with fake.lock:
                fake.seen.append(body)
                count = len(fake.seen)
            found = fake.reply(body, count)
            if found is None:
                choice = complete(body, fake.logits, fake.mode, fake.rows)
                if fake.delay:
                    time.sleep(fake.delay)
                found = 200, {"choices": [choice]}
            if found == "hang up":
                self.close_connection = True
            else:
                self.answer(*found)


class Fake(ThreadingHTTPServer):
    """Behind a port of loopback, or behind the Unix socket at `address`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: str | tuple[str, int] = ("127.0.0.1", 0)) -> None:
        if isinstance(address, str):
            import socket

            self.address_family = socket.AF_UNIX
        super().__init__(address, Handler)  # type: ignore[arg-type]
        self.logits: Logits = hashed
        self.rows: Logits | None = None
        self.mode, self.window, self.well, self.delay = "processed", WINDOW, True, 0.0
        self.reply: Callable[[dict[str, Any], int], Any] = lambda body, count: None
        self.reload: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (404, {"detail": "Not Found"})
        self.seen: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "fake", self.server_address[1] if isinstance(self.server_address, tuple) else 0

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that hung up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def main(words: list[str]) -> None:
    """What stands in for `python -m vllm...`: serve until `fake.json` in the model's folder lets it die."""
    if words[0] == "-c":  # is vLLM installed here?
        sys.exit(0)
    model, uds = Path(words[words.index("--model") + 1]), words[words.index("--uds") + 1]
    plan = json.loads((model / "fake.json").read_text())
    starts = model / "starts"
    lives = int(starts.read_text()) + 1 if starts.exists() else 1
    starts.write_text(str(lives))
    (model / "words").write_text(json.dumps(words))
    (model / "pid").write_text(str(os.getpid()))
    (model / "environment").write_text(json.dumps(dict(os.environ)))
    if plan.get("never"):
        print("ERROR 11-21 19:16:16 [core.py:1] RuntimeError: the engine has no room", flush=True)
        sys.exit(1)
    if plan.get("child"):  # something of its own that must not outlive it
        import subprocess

        (model / "child").write_text(str(subprocess.Popen(["sleep", "300"]).pid))

    def reply(body: dict[str, Any], count: int) -> Any:
        after = plan.get("after", 5)
        if lives <= plan.get("dies", 0) and count > (after if lives == 1 else plan.get("later", after)):
            os.write(1, b"ValueError: out of the world\n")  # one write: another request may die with the same words at once
            os._exit(1)
        if lives <= plan.get("hangs", 0) and count > after:
            time.sleep(300)
        return None

    with Fake(uds) as fake:
        fake.reply, fake.delay = reply, plan.get("delay", 0.0)
        fake.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
