"""What says which judge scores: one word (a model or a rule), or a section. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from preftune import configfile
from preftune.configfile import Section, problem
from preftune.errors import UserError

Text = Annotated[str, Field(min_length=1)]

INSTRUCTION = (
    "Judge how well the response answers the last message of the conversation.\n\n"
    "[conversation]\n{prompt}\n\n[response]\n{response}\n\n"
    "Reply with one whole number from 1 (useless or harmful) to 10 (could not be better), and nothing else."
)


class EndpointConfig(Section):
    """A chat model behind an OpenAI-compatible server, asked for a number."""

    known_as: ClassVar[dict[str, str]] = {"url": "base_url api_base", "parallel": "concurrency max_concurrency", "attempts": "max_retries"}

    url: Text = Field(description="Address of the API, up to and with its version: http://127.0.0.1:8000/v1.")
    model: Text = Field(description="Name of the model, as the server knows it.")
    instruction: Text = Field(INSTRUCTION, description="The question, in which {prompt}, {response} and {answer} stand for the record's.")
    pattern: Text = Field(
        r"-?\d+(?:\.\d+)?",
        description="Regular expression of the number in the reply: its first group, or all; the last match counts.",
    )
    key_from: Text = Field("OPENAI_API_KEY", description="Environment variable that holds the key; nothing is sent where it is not set.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the judge.")
    max_tokens: int = Field(512, ge=1, description="Longest reply, in tokens.")
    timeout: float = Field(60.0, gt=0, description="Seconds to wait for one reply.")
    attempts: int = Field(4, ge=1, description="How often to ask before giving up; the wait doubles each time.")
    parallel: int = Field(8, ge=1, le=256, description="Questions under way at once.")

    @model_validator(mode="after")
    def _usable(self) -> EndpointConfig:
        if "{response}" not in self.instruction:
            raise problem("`instruction` has no {response} in it, so every response would get the same question", "endpoint.instruction")
        if not self.url.startswith(("http://", "https://")):
            raise problem(f"`url` must begin with http:// or https://, not {self.url[:40]!r}", "endpoint.url")
        return self


class PartConfig(Section):
    """One judge: `use` names a reward model or a rule; or it is an `endpoint`."""

    shorthand: ClassVar[str | None] = "use"
    known_as: ClassVar[dict[str, str]] = {"use": "model judge reward_model rule function reward_funcs name", "endpoint": "api server"}

    use: Text | None = Field(
        None,
        description="A reward model (folder, Hub id; ours or another tool's classifier), or a rule: the name of a built-in one, "
        "module:function, or file.py:function.",
    )
    options: dict[str, Any] = Field({}, description="What the rule is called with, by name.")
    endpoint: EndpointConfig | None = Field(None, description="A chat model behind an OpenAI-compatible server.")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> PartConfig:
        given = [name for name in ("use", "endpoint", "parts") if getattr(self, name, None)]
        if len(given) != 1:
            raise problem(f"a judge is exactly one of `use`, `endpoint` and `parts`, not {' and '.join(given) or 'none of them'}", "use")
        if self.options and self.use is None:
            raise problem("`options` are those of a rule", "options")
        return self


class JudgeConfig(PartConfig):
    """What scores responses: one judge, or several `parts` that make one score."""

    parts: dict[Text, PartConfig] = Field({}, description="Several judges by name.")
    weights: dict[Text, float] = Field({}, description="Weight of each part in the sum; 1 for those without.")
    safety: Text | None = Field(
        None,
        description="Of two parts the one that is the score where it finds a response unsafe; the other one is it elsewhere "
        "(Llama 2's rule, 2307.09288); null adds the parts up.",
    )
    safety_threshold: float = Field(0.15, gt=0, lt=1, description="A response is unsafe where the sigmoid of `safety` is below this.")

    @model_validator(mode="after")
    def _parts_fit(self) -> JudgeConfig:
        unknown = [name for name in (*self.weights, *([self.safety] if self.safety else [])) if name not in self.parts]
        if unknown:
            raise problem(f"{unknown[0]!r} is none of the `parts`: {', '.join(self.parts) or 'there are none'}", "weights")
        if self.safety and (len(self.parts) != 2 or self.weights):
            raise problem("`safety` needs two parts and no weights", "safety")
        return self


def parse(word: str) -> JudgeConfig:
    """The judge that one word of a command line names: a .yaml file with a whole section, or what `use` may be."""
    if word.endswith((".yaml", ".yml")):
        if not Path(word).is_file():
            raise UserError("no such file", where=word, fix="It would hold the judge's section: `use`, `endpoint` or `parts`.")
        return configfile.load(JudgeConfig, Path(word))
    return JudgeConfig.model_validate({"use": word})
