"""A model of a run in rounds behind a vLLM server: served while its responses are drawn, compared with the trainer's when they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from preftune.models import load
from preftune.rollout.agreement import agreement, said
from preftune.rollout.folder import plain_folder, turn_ends
from preftune.rollout.vllm import VllmServer
from preftune.rounds.ready import template

if TYPE_CHECKING:
    from preftune.rounds.run import Rounds


class Served:
    """The server of `model`; one that runs already is given its weights, and they are proven to have arrived."""

    def __init__(self, run: Rounds, model: str) -> None:
        self.run, self.model = run, model
        source = load.locate(model)
        self.tokenizer = load.load_tokenizer(source, template=template(run.config))
        self._scratch = tempfile.TemporaryDirectory(prefix="preftune-")
        try:
            folder = plain_folder(source, self.tokenizer, Path(self._scratch.name))
            self.tokenizer.turn_ends |= turn_ends(folder)
            rollout = run.config.rollout
            say = lambda line: run.console.print(line, soft_wrap=True, style="yellow", markup=False)
            self.server = VllmServer(
                rollout.vllm, folder, frozenset(self.tokenizer.turn_ends), self.tokenizer.decode,
                compute=run.compute, cache_bytes=int(rollout.cache_gb * 1e9), say=say,
            )  # fmt: skip
            self.server.start()
            if rollout.vllm.url:
                self.server.service.serve(folder)
                self.server.prove(run.policy(model)[0], self.tokenizer)
            else:
                run.console.print(f"vLLM starts to serve {source.name}; this may take minutes", soft_wrap=True)
        except BaseException:
            self._scratch.cleanup()
            raise

    def close(self) -> None:
        """End a server that was started here."""
        self.server.close()
        self._scratch.cleanup()

    def settle(self) -> dict[str, float]:
        """Close it, and say how the log-probabilities of what it drew agree with the model's own, which then has the memory."""
        self.close()
        if not self.server.seen:
            return {}
        found = agreement(self.run.policy(self.model)[0], self.server.seen)
        self.run.console.print(said(found, self.run.compute), soft_wrap=True)
        return {"sampler_mismatch": found.mean, "sampler_kl": found.k3}
