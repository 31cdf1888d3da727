"""What says which engine samples: the local one, or a vLLM server. No torch here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from preftune.configfile import Section, problem

Text = Annotated[str, Field(min_length=1)]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OURS = (
    "--api-key", "--dtype", "--generation-config", "--host", "--load-format", "--logprobs-mode", "--model", "--port",
    "--served-model-name", "--trust-remote-code", "--uds", "--worker-extension-cls",
)  # fmt: skip
"""Words of `vllm serve` that are set here, or never."""


class EngineName(StrEnum):
    """What samples."""

    local = "local"
    vllm = "vllm"


class VllmConfig(Section):
    """A vLLM server on this machine: one that is started and stopped here, or one that runs already."""

    known_as: ClassVar[dict[str, str]] = {
        "url": "base_url api_base vllm_server_base_url server",
        "arguments": "args extra_args engine_args engine_kwargs",
        "parallel": "concurrency max_concurrency",
    }

    python: Text | None = Field(None, description="Python that has vLLM installed; null is the one that runs Preftune.")
    url: Text | None = Field(None, description="Address of a server on this machine that runs already; null starts one.")
    arguments: tuple[Text, ...] = Field((), description="More words for `vllm serve`, for a server that is started.")
    parallel: int = Field(64, ge=1, le=1024, description="Responses under way at once.")
    timeout: float = Field(600.0, gt=0, description="Seconds to wait for one response.")
    patience: float = Field(600.0, gt=0, description="Seconds to wait for the server, at its start and where it does not answer.")

    @model_validator(mode="after")
    def _usable(self) -> VllmConfig:
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme != "http" or parts.hostname not in LOOPBACK:
                raise problem(
                    f"`url` must be http:// and an address of this machine, such as http://127.0.0.1:8000, not {self.url!r}", "url"
                )
            for name in ("python", "arguments"):
                if getattr(self, name):
                    raise problem(f"`{name}` has no effect with `url`: that server runs already", name)
        for word in self.arguments:
            if (name := word.partition("=")[0].replace("_", "-")) in OURS:
                raise problem(f"`arguments` cannot have {name}: it is set by Preftune", "arguments")
        return self
