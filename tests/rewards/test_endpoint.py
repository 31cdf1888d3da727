"""A judge behind HTTP, asked over a real socket: order kept, stumbles asked again, hangs and nonsense one line, the key never shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.records import Example, Message, Response
from preftune.rewards.config import EndpointConfig
from preftune.rewards.endpoint import Endpoint

SECRET = "sk-not-to-be-seen"


class Server(ThreadingHTTPServer):
    """Answers with what `reply` makes of a request's body: (status, content) or bytes as they are."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Any = lambda body, count: (200, "7")
        self.seen: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.headers.append((self.path, dict(self.headers)))
            count = len(self.server.seen)
        found = self.server.reply(body, count)
        status, data = found if isinstance(found, tuple) else (200, found)
        if isinstance(data, str):
            data = json.dumps({"choices": [{"message": {"content": data}}]}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.shutdown()


def judge(server: Server, **changes: Any) -> Endpoint:
    return Endpoint(EndpointConfig(url=f"http://127.0.0.1:{server.server_port}/v1", model="m", **changes))


RECORDS = [
    Example((Message("user", f"Question {i} {{response}}"),), tuple(Response(f"{10 * i + k}") for k in range(3)), where=f"f.jsonl:{i}")
    for i in range(6)
]


def test_scores_stand_by_their_responses_whatever_comes_back_first(server: Server) -> None:
    def reply(body: Any, count: int) -> tuple[int, str]:
        question = body["messages"][0]["content"]
        number = int(question.partition("[response]\n")[2].split()[0])
        time.sleep(0.02 * (count % 3))
        return 200, f"Of 10 I give: {number}"

    server.reply = reply
    assert judge(server)(RECORDS) == [[float(r.text) for r in e.responses] for e in RECORDS]
    assert len(server.seen) == 18
    body = server.seen[0]
    assert body["model"] == "m" and body["temperature"] == 0
    assert "Question 0 {response}" in body["messages"][0]["content"], "braces in a text are its own"
    assert all(path == "/v1/chat/completions" for path, _ in server.headers)


def test_a_server_that_stumbles_is_asked_again(server: Server) -> None:
    server.reply = lambda body, count: (503 if count < 3 else 200, "4")
    assert judge(server)([Example("q", (Response("a"),))]) == [[4.0]]
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (lambda body, count: (200, "no idea"), "f.jsonl:0: the judge's reply has no number: 'no idea'"),
        (lambda body, count: (401, b"who are you"), "Set OPENAI_API_KEY"),
        (lambda body, count: b"<html>", "no chat completion"),
        (lambda body, count: b'{"choices": [{"message": {"content": null}}]}', "no chat completion"),
        (lambda body, count: (500, b"oh"), "status 500"),
    ],
)
def test_what_is_no_score_is_one_line(server: Server, reply: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = reply
    with pytest.raises(UserError) as error:
        judge(server, attempts=2)(RECORDS[:1])
    assert says in str(error.value) and SECRET not in str(error.value)


def test_a_hanging_server_does_not_hang_the_run(server: Server) -> None:
    gate = threading.Event()
    server.reply = lambda body, count: gate.wait(20) and (200, "1")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"the judge does not answer.*kept"):
        judge(server, timeout=0.2, attempts=2)(RECORDS[:1])
    gate.set()
    assert time.monotonic() - start < 10


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(UserError, match="does not answer"):
        Endpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model="m", attempts=1))(RECORDS[:1])


def test_the_key_goes_to_the_server_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge(server)(RECORDS[:1])
    assert all("authorization" not in {k.lower() for k in headers} for _, headers in server.headers)
    server.headers.clear()
    monkeypatch.setenv("MY_KEY", SECRET)
    one = judge(server, key_from="MY_KEY")
    one(RECORDS[:1])
    assert all({k.lower(): v for k, v in headers.items()}["authorization"] == f"Bearer {SECRET}" for _, headers in server.headers)
    assert SECRET not in repr(one.config)


def test_the_number_is_the_last_match_or_its_group(server: Server) -> None:
    server.reply = lambda body, count: (200, "Between 1 and 10: helpful 2? No, helpful 8, so [[6.5]]")
    assert judge(server)([Example("q", (Response("a"),))]) == [[6.5]]
    assert judge(server, pattern=r"helpful (\d+)")([Example("q", (Response("a"),))]) == [[8.0]]
    with pytest.raises(UserError, match="pattern"):
        judge(server, pattern="(")
