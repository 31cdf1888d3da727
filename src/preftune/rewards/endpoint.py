"""A judge behind an OpenAI-compatible server: one question a response, several under way at once, asked again when the server stumbles."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

from preftune.errors import UserError
from preftune.records import Example, Message, Response
from preftune.rewards.config import EndpointConfig

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class Endpoint:
    """Scores by asking; the key is read from the environment when a question is sent, and is never shown."""

    def __init__(self, config: EndpointConfig) -> None:
        try:
            self.pattern = re.compile(config.pattern)
        except re.error as error:
            raise UserError(f"no regular expression: {error}", where="endpoint.pattern") from None
        self.config = config
        # POSTs are repeated too: a question changes nothing at the server
        self.retries = urllib3.Retry(
            total=config.attempts - 1,
            backoff_factor=0.5,
            status_forcelist=(408, 409, 425, 429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self.pool = urllib3.PoolManager(num_pools=1, maxsize=config.parallel, timeout=urllib3.Timeout(config.timeout))

    def __call__(self, examples: Sequence[Example]) -> list[list[float]]:
        """Scores of all responses of the records."""
        questions = [(example, response) for example in examples for response in example.responses]
        with ThreadPoolExecutor(min(self.config.parallel, max(1, len(questions)))) as threads:
            found = iter(list(threads.map(lambda one: self.ask(*one), questions)))
        return [[next(found) for _ in example.responses] for example in examples]

    def ask(self, example: Example, response: Response) -> float:
        """One response's score."""
        reply = self.reply(self.question(example, response), example.where)
        matches = list(self.pattern.finditer(reply))
        if not matches:
            what = f"the judge's reply has no number: {reply.strip()[:120]!r}"
            raise UserError(what, where=example.where, fix="Change endpoint.instruction or endpoint.pattern.")
        return float(matches[-1][1] if self.pattern.groups else matches[-1][0])

    def question(self, example: Example, response: Response) -> str:
        """The instruction with the record in it; texts are put in as they stand, braces and all."""
        values = {"prompt": as_text(example.prompt), "response": response.text, "answer": example.reference_answer or ""}
        return re.sub(r"\{(prompt|response|answer)\}", lambda match: values[match[1]], self.config.instruction)

    def reply(self, question: str, where: str) -> str:
        """What the server answers. Raises UserError where it does not, or with something else than a chat completion."""
        config = self.config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        headers = {"content-type": "application/json"}
        if key := os.environ.get(config.key_from):
            headers["authorization"] = f"Bearer {key}"
        url = f"{config.url.rstrip('/')}/chat/completions"
        try:
            answer = self.pool.request("POST", url, body=json.dumps(body), headers=headers, retries=self.retries, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise UserError(f"the judge does not answer: {_cause(error)}", where=url, fix="What was scored is kept; try again.") from None
        if answer.status != 200:
            said = answer.data[:200].decode(errors="replace")
            fix = f"Set {config.key_from} to its key." if answer.status in (401, 403) else "What was scored is kept; try again."
            raise UserError(f"the judge answers with status {answer.status}: {said}", where=url, fix=fix)
        try:
            return _content(json.loads(answer.data))
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"the judge's answer is no chat completion: {answer.data[:120]!r}", where=url) from None


def as_text(prompt: str | Sequence[Message]) -> str:
    """A conversation as a judge reads it."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{_NAMES.get(turn.role, turn.role)}: {turn.content}" for turn in prompt)


def _content(answer: Any) -> str:
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError
    return text


def _cause(error: BaseException) -> str:
    """The reason at the bottom, without the addresses in front of it."""
    reason = getattr(error, "reason", None)
    return _cause(reason) if isinstance(reason, BaseException) else f"{type(error).__name__}: {str(error).rpartition(': ')[2]}"
