"""A vLLM server that can be relied on: waited for, started again when it dies, and asked until an answer comes that fits its question."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from preftune.errors import UserError
from preftune.rollout.config import VllmConfig
from preftune.rollout.server import TRANSIENT, Caller, Child, Slow, Unreached, wait_until

ATTEMPTS = 6
"""How often one response is asked for."""
DEATHS = 3
"""How often a server may die with no response in between."""
KEPT = "What was drawn is kept; the same command goes on."


class Service:
    """Serves `model`, a plain Hugging Face folder or a Hub id, in products of `dtype` ("bfloat16", "float32").

    With `config.url` the server runs already, else `start` starts one and `close` ends it. All else waits until it answers; `say` is told
    when it is started again. May be used by many threads.
    """

    def __init__(self, config: VllmConfig, model: str, dtype: str, cache_bytes: int, say: Callable[[str], None]) -> None:
        self.config, self.model, self.say = config, model, say
        self.child = None if config.url else Child(config, dtype, cache_bytes)
        self.caller = Caller(config.url.rstrip("/") if config.url else self.child.address)  # type: ignore[union-attr]
        self.where = config.url or "rollout.vllm"
        self.window = 0
        """Tokens of prompt and response together."""
        self.name = ""
        """What the server calls the model; empty until it has answered."""
        self.processed = False
        """Whether it tells log-probabilities of the distribution that it draws from, not of the model's own."""
        self.reloads = True
        """Whether it takes new weights while it runs; else it is started again for them."""
        self._replaced = False
        self._deaths = self._starts = 0
        self._mending = threading.Lock()

    # --- its life ---------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the server, where it does not run already. Raises UserError where there is no vLLM to start."""
        if self.child is not None:
            self.child.require()
            self._launch()

    def close(self) -> None:
        """End a server that was started here."""
        if self.child is not None:
            self.child.close()

    def ready(self, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the server answers; False where `give_up` says so before. Raises UserError where it does not come up."""
        if self.name:
            return True
        self._await(threading.Event(), give_up)
        if give_up():
            return False
        self._look()
        return True

    def _launch(self) -> None:
        assert self.child is not None
        self._starts += 1
        self.child.start(self.model)

    def _await(self, leaving: threading.Event, give_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until the server answers; one of ours that is dead is started again. Raises UserError when that has failed too often."""
        with self._mending:
            ended = lambda: self.child is not None and not self.child.alive
            if self.caller.healthy() and not ended():
                return
            while not (leaving.is_set() or give_up()):
                if ended():
                    self._revive(leaving)
                if not wait_until(lambda: ended() or give_up() or self.caller.healthy(), self.config.patience, leaving):
                    if leaving.is_set():
                        return
                    raise UserError(f"no vLLM server answers within {self.config.patience:g} s", where=self.where, fix=KEPT)
                if not ended():
                    break
            if self.child is None and self._replaced:  # it runs again, with the weights that it was first started with
                self._reload(self.model)

    def _revive(self, leaving: threading.Event) -> None:
        assert self.child is not None
        reason = self.child.last_words()
        self._deaths += 1
        if self._deaths > DEATHS or not self.name:  # one that never ran would not run the next time
            raise UserError(f"the vLLM server ended: {reason}", where=self.where, fix=KEPT)
        self.say(f"the vLLM server ended ({reason}); it is started again")
        if not leaving.wait(2.0 ** (self._deaths - 1)):
            self._launch()

    def _end_hung(self, starts: int) -> None:
        """End a server of ours that hangs, unless it has been started again since."""
        with self._mending:
            if self.child is not None and starts == self._starts:
                self.child.kill()

    def _look(self) -> None:
        """The served model's name and window, and what its log-probabilities mean."""
        try:
            status, answer = self.caller.ask("/v1/models", timeout=60)
            name, self.window = str(answer["data"][0]["id"]), int(answer["data"][0]["max_model_len"])
        except Unreached as error:
            raise UserError(f"the vLLM server does not answer: {error}", where=self.where) from None
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"this is no vLLM server: it answers with status {status} to /v1/models", where=self.where) from None
        # the likeliest token alone can be drawn: its log-probability is 0 as drawn, and less under the model
        choice = self.complete({"model": name, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 1.0, "top_k": 1})
        assert choice is not None
        self.processed = abs(choice["logprobs"]["token_logprobs"][0]) < 1e-6
        self.name = name

    # --- questions --------------------------------------------------------------------------------------------------------------

    def complete(
        self, question: dict[str, Any], leaving: threading.Event | None = None, stop_ids: Iterable[int] = ()
    ) -> dict[str, Any] | None:
        """The one choice of a completion, asked for until it comes; None where `leaving` is set first.

        `question` has a `prompt` of token ids. A choice has `token_ids` and as many finite `logprobs.token_logprobs`, and its
        `finish_reason` is stop or length. Raises UserError where asking again is of no use, or has been done often enough.
        """
        always = {"model": self.name, "n": 1, "logprobs": 0, "return_token_ids": True, "add_special_tokens": False, "ignore_eos": True}
        body = {**always, "stop_token_ids": sorted(stop_ids), "stream": False, **question}
        leaving = leaving or threading.Event()
        reason, slow = "", 0
        for attempt in range(ATTEMPTS):
            if leaving.wait(0.25 * 2**attempt if attempt else 0):
                return None
            starts = self._starts
            try:
                choice = self._ask(body, leaving)
                self._deaths = 0
                return choice
            except Unreached as error:
                if leaving.is_set():
                    return None
                reason, slow = str(error), slow + isinstance(error, Slow)
                if slow == 2:
                    fix = f"Raise vllm.timeout, or lower vllm.parallel. {KEPT}"
                    raise UserError(f"the vLLM server gave, twice, {reason}", where="vllm.timeout", fix=fix) from None
                if isinstance(error, Slow):
                    self._end_hung(starts)
                self._await(leaving)
        raise UserError(f"the vLLM server gave no response in {ATTEMPTS} tries: {reason}", where=self.where, fix=KEPT)

    def _ask(self, body: dict[str, Any], leaving: threading.Event) -> dict[str, Any]:
        """One try. Raises Unreached where it is worth asking again, UserError where it is not."""
        status, answer = self.caller.ask("/v1/completions", body, timeout=self.config.timeout, leaving=leaving)
        if status >= 500 or status in TRANSIENT:
            raise Unreached(f"status {status}: {_message(answer)}")
        if status != 200:
            raise UserError(f"the vLLM server refuses with status {status}: {_message(answer)}", where=self.where)
        try:
            (choice,) = answer["choices"]
            ids, logps, finish = choice["token_ids"], np.array(choice["logprobs"]["token_logprobs"], float), choice["finish_reason"]
            read = list(choice["prompt_token_ids"])
            sound = len(ids) == len(logps) and 0 < len(ids) <= body["max_tokens"] and all(isinstance(token, int) for token in ids)
        except (KeyError, TypeError, ValueError):
            what = "the server's answer is no completion of vLLM with token ids and log-probabilities"
            raise UserError(what, where=self.where) from None
        if finish not in ("stop", "length"):
            raise Unreached(f"the response ended by {finish}")
        if not (sound and np.isfinite(logps).all()):
            what = "a response's token ids and log-probabilities do not fit each other or what was asked for"
            raise UserError(what, where=self.where)
        if read != body["prompt"]:
            raise UserError("the server read another prompt than it was given", where=self.where)
        return choice

    # --- new weights ------------------------------------------------------------------------------------------------------------

    def serve(self, model: str) -> None:
        """Read the weights in another folder, and forget what was computed with the old ones. Nothing may be under way."""
        self.ready()
        reason = self._reload(model) if self.reloads else ""
        self.model, self._replaced = model, True
        if self.reloads and not reason:
            return
        if self.child is None:
            fix = "Start it with VLLM_SERVER_DEV_MODE=1 in its environment, where it sees the same files."
            raise UserError(f"the server does not take new weights ({reason})", where=self.where, fix=fix)
        if self.reloads:
            self.reloads = False
            self.say(f"the vLLM server does not take new weights while it runs ({reason}); it is started again for them")
        self._launch()
        self._await(threading.Event())

    def _reload(self, model: str) -> str:
        """Why the server did not read other weights while it runs; empty where it did."""
        question: dict[str, Any] = {"method": "preftune_reload", "kwargs": {"folder": model}}
        if self.child is None:
            question = {"method": "reload_weights", "kwargs": {"weights_path": model}}
        try:
            status, answer = self.caller.ask("/collective_rpc", question, timeout=self.config.timeout)
            if status == 200:
                status, answer = self.caller.ask("/reset_prefix_cache", {}, timeout=self.config.timeout)
        except Unreached as error:
            return str(error)
        done = status == 200 and isinstance(answer, dict) and answer.get("success") is True
        return "" if done else f"status {status}: {_message(answer)}"


def _message(answer: Any) -> str:
    """What an error of the server says."""
    found = answer.get("error", answer) if isinstance(answer, dict) else answer
    found = found.get("message", found) if isinstance(found, dict) else found
    return " ".join(str(found).split())[:200]
