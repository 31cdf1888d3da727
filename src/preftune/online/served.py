"""A vLLM server in the sampler's place: started when it is first needed, and given the policy's weights whenever they are others."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.online.config import OnlineConfig
from preftune.packing.chat import ChatTokenizer
from preftune.rollout.vllm import VllmServer


class Served:
    """Serves the policy; `close` ends a server that was started here, and removes the weights that were written for it."""

    def __init__(self, config: OnlineConfig, tokenizer: ChatTokenizer, compute: torch.dtype, console: Console) -> None:
        self.config, self.tokenizer, self.compute, self.console = config, tokenizer, compute, console
        self._scratch = tempfile.TemporaryDirectory(prefix="preftune-")
        self._server: VllmServer | None = None
        self._step: int | None = None

    def engine(self, policy: LanguageModel, step: int) -> VllmServer:
        """The server with the weights of `policy`, which are those after `step` steps; that they have arrived is proven (see `push`)."""
        server = self._server or self._start(policy)
        if step != self._step:
            server.push(policy, self.tokenizer, Path(self._scratch.name))
            self._step = step
        return server

    def _start(self, policy: LanguageModel) -> VllmServer:
        rollout, folder = self.config.rollout, Path(self._scratch.name) / "start"
        save_model(policy, self.tokenizer, folder)
        self._server = VllmServer(
            rollout.vllm, str(folder), frozenset(self.tokenizer.turn_ends), self.tokenizer.decode,
            compute=self.compute, cache_bytes=int(rollout.cache_gb * 1e9), say=self._say,
        )  # fmt: skip
        if not rollout.vllm.url:
            self._say("vLLM starts to serve the policy; this may take minutes")
        self._server.start()
        return self._server

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True, style="yellow", markup=False)

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.close()
        self._scratch.cleanup()
