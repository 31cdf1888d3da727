"""Sampling with a vLLM server behind the same function as the local engine: one request a response, over loopback or a Unix socket.

A response has its own seed, so one that a dying server loses is asked for again: nothing is lost and nothing doubled.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import torch

from preftune.errors import UserError
from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer
from preftune.rollout.agreement import PROBE, Agreement, Arrivals, token_logps
from preftune.rollout.config import VllmConfig
from preftune.rollout.samples import Sample
from preftune.rollout.sampling import Sampling
from preftune.rollout.service import Service

KEPT = 32
"""Samples that are kept to compare their log-probabilities with the trainer's."""
LEAST_TEMPERATURE = 0.01
"""vLLM raises what is lower to this."""


class VllmServer:
    """Draws responses from the model in `model`, a plain Hugging Face folder or a Hub id, in products of type `compute`.

    `turn_ends` are the ids that end a turn, `decode` makes text of ids where stop texts are used. With `config.url` the server runs
    already. Open it with `with`, or by `start` and `close`; what is asked first waits until it answers. `seen` holds some prompts and
    their samples.
    """

    def __init__(
        self,
        config: VllmConfig,
        model: str,
        turn_ends: frozenset[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        *,
        compute: torch.dtype = torch.bfloat16,
        cache_bytes: int = 2 * 2**30,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.config, self.turn_ends, self.decode, self.compute = config, turn_ends, decode, compute
        self.service = Service(config, model, str(compute).removeprefix("torch."), cache_bytes, say)
        self.seen: list[tuple[Sequence[int], Sample]] = []
        self._arrivals = Arrivals(compute)
        self._pushed: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the server, where it does not run already. Raises UserError where there is no vLLM to start."""
        try:
            self.service.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End a server that was started here."""
        self.service.close()

    # --- sampling ---------------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        numbers: Sequence[Sequence[int]] | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Sample]:
        """What `Engine.generate` gives, drawn by the server: other draws, and rounding that depends on what is under way beside.

        With both top-p and min-p vLLM applies min-p first. Raises UserError, also for a temperature that vLLM would change.
        """
        asked = [list(range(n)) for _ in prompts] if numbers is None else [list(one) for one in numbers]
        if not self.service.ready(give_up):
            return
        self._judge(prompts, asked, sampling)
        jobs = [(i, number) for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)) for number in asked[i]]
        leaving, ended = threading.Event(), queue.SimpleQueue[Future[Sample | None]]()
        threads = ThreadPoolExecutor(self.config.parallel, thread_name_prefix="vllm")
        try:
            for i, number in jobs:
                threads.submit(self._sample, i, number, prompts[i], sampling, seed, leaving).add_done_callback(ended.put)
            left = len(jobs)
            while left and not give_up():
                try:
                    one = ended.get(timeout=0.2).result()
                except queue.Empty:
                    continue
                left -= 1
                assert one is not None
                if len(self.seen) < KEPT:
                    self.seen.append((prompts[one.prompt], one))
                yield one
        finally:
            leaving.set()
            threads.shutdown(wait=False, cancel_futures=True)
            self.service.caller.interrupt()
            threads.shutdown()

    def _judge(self, prompts: Sequence[Sequence[int]], asked: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if sampling.stop and self.decode is None:
            raise ValueError("stop texts need a `decode`")
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(f"vLLM takes temperatures of 0 and from {LEAST_TEMPERATURE} on", where="temperature", fix="Use 0.")
        if not self.service.processed and not _plain(sampling):
            what = "this server tells no log-probabilities of the distribution that it draws from"
            raise UserError(what, where=self.service.where, fix="Start it with --logprobs-mode processed_logprobs.")
        for i, prompt in enumerate(prompts):
            if asked[i] and not len(prompt):
                raise UserError("a prompt has no token, so there is nothing to go on from", where=f"prompt {i + 1}")
            if asked[i] and self._room(prompt, sampling) < 1:
                what = f"a prompt of {len(prompt)} tokens fills the server's window of {self.service.window}"
                raise UserError(what, where=f"prompt {i + 1}", fix="Shorten it, or serve the model with a larger --max-model-len.")

    def _room(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """New tokens that a response may have; one place is left for reading it again."""
        return min(sampling.max_new_tokens, self.service.window - len(prompt) - 1)

    def _sample(
        self, index: int, number: int, prompt: Sequence[int], sampling: Sampling, seed: int, leaving: threading.Event
    ) -> Sample | None:
        """One response; None where nobody waits for it any more."""
        question = {
            "prompt": list(prompt), "max_tokens": self._room(prompt, sampling), "seed": request_seed(seed, prompt, number),
            "temperature": sampling.temperature, "repetition_penalty": sampling.repetition_penalty, "stop": list(sampling.stop),
        }  # fmt: skip
        greedy = sampling.temperature == 0
        question |= {} if greedy else {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}
        choice = self.service.complete(question, leaving, self.turn_ends)
        if choice is None:
            return None
        ids, finish, drawn = tuple(choice["token_ids"]), choice["finish_reason"], np.array(choice["logprobs"]["token_logprobs"], float)
        logp = drawn if _plain(sampling) else self.score(prompt, ids, leaving)
        if logp is None:
            return None
        text_end = None
        if sampling.stop and ids[-1] not in self.turn_ends and finish == "stop":
            assert self.decode is not None
            text_end = min((at for at in map(self.decode(ids).find, sampling.stop) if at >= 0), default=None)
        return Sample(index, number, ids, finish, logp, np.zeros(len(ids)) if greedy else drawn, text_end)

    def score(self, prompt: Sequence[int], response: Sequence[int], leaving: threading.Event | None = None) -> np.ndarray | None:
        """[T] log-probability at temperature 1 of each token of a response, read by the server; None only where `leaving` is set."""
        question = {"prompt": [*prompt, *response], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choice = self.service.complete(question, leaving)
        if choice is None:
            return None
        try:
            told = choice["prompt_logprobs"][len(prompt) :]
            found = np.array([one[str(token)]["logprob"] for one, token in zip(told, response, strict=True)], dtype=float)
        except (KeyError, TypeError, ValueError):
            raise UserError("the server gives no log-probabilities of a prompt's tokens", where=self.service.where) from None
        if not np.isfinite(found).all():
            raise UserError("the server gives log-probabilities that are no finite numbers", where=self.service.where)
        return found

    # --- new weights ------------------------------------------------------------------------------------------------------------

    def push(self, model: LanguageModel, tokenizer: ChatTokenizer, scratch: Path | None = None) -> Agreement:
        """Serve these weights from now on: written to a folder in `scratch`, read from there, and proven to have arrived.

        Returns how the served log-probabilities of a text agree with the model's own. A server of ours where they do not is started again
        from the folder, now and at every later push. Raises UserError where that does not help either. Nothing may be under way.
        """
        place = scratch or (self.service.child.folder if self.service.child else None)
        if place is None:
            raise ValueError("a server that runs already needs a `scratch` folder that it can read too")
        before, folder = self._pushed, place / "weights-a"
        if before == folder:
            folder = place / "weights-b"
        save_model(model, tokenizer, folder)
        self.service.serve(str(folder.resolve()))
        try:
            found = self.prove(model, tokenizer)
        except UserError as error:
            if self.service.child is None or not self.service.reloads:
                raise
            self.service.reloads = False
            self.service.say(f"{error.what}; it is started again for them")
            self.service.serve(str(folder.resolve()))
            found = self.prove(model, tokenizer)
        self._pushed = folder
        if before not in (None, folder):
            shutil.rmtree(before)
        return found

    def prove(self, model: LanguageModel, tokenizer: ChatTokenizer) -> Agreement:
        """How the server agrees with `model` on a text. Raises UserError where it serves other weights.

        The model reads it in fp32: in bf16 a step far too small to matter moves its own rounding as much as the server's noise, and an
        adapter beside the weights rounds otherwise than one in them.
        """
        self.service.ready()
        first, *rest = tokenizer.encode_prompt(PROBE)
        rest = rest[: self.service.window - 2]
        served = self.score([first], rest)
        with _unrounded(model):
            (ours,) = token_logps(model, [[first]], [rest])
        assert served is not None
        return self._arrivals.check(served, ours)


@contextlib.contextmanager
def _unrounded(model: LanguageModel) -> Iterator[None]:
    """For a while the model's products are fp32, as its weights are."""
    before, model.backbone.compute = model.backbone.compute, torch.float32
    try:
        yield
    finally:
        model.backbone.compute = before


def request_seed(seed: int, prompt: Sequence[int], number: int) -> int:
    """A seed below 2**63 of response `number` to `prompt` (token ids): it depends on nothing else."""
    told = np.array([seed, number, *prompt], dtype=np.uint64).tobytes()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little") >> 1


def _plain(sampling: Sampling) -> bool:
    """Whether the log-probability of a drawn token, as drawn, is the model's own."""
    shaped = sampling.temperature != 0 and (sampling.temperature != 1 or sampling.truncates)
    return not shaped and sampling.repetition_penalty == 1
