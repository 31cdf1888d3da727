"""A vLLM server, asked over a real socket: what it draws arrives as drawn, its stumbles cost nothing, its nonsense is one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune import configfile
from preftune.errors import UserError
from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer
from preftune.rollout import service
from preftune.rollout.agreement import Agreement, Arrivals, agreement, said, token_logps
from preftune.rollout.config import VllmConfig
from preftune.rollout.samples import Sample
from preftune.rollout.sampling import Sampling
from preftune.rollout.vllm import VllmServer, request_seed
from tests import tiny
from tests.rollout import fake_vllm
from tests.rollout.fake_vllm import Fake, hashed, log_softmax, processed

ENDS = frozenset({0, 1, 2})
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4]]
PLAIN, SHAPED = Sampling(12), Sampling(12, 0.7, 0.9, 9, 0.02, 1.3)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


def client(fake: Fake, **changes: Any) -> VllmServer:
    return VllmServer(VllmConfig(url=fake.url, **changes), "m", ENDS, fake_vllm.text, compute=torch.float32)


def drawn(server: VllmServer, sampling: Sampling = PLAIN, n: int = 3, **options: Any) -> dict[tuple[int, int], Sample]:
    found = list(server.generate(PROMPTS, n, sampling, 5, **options))
    assert len(found) == len({(s.prompt, s.number) for s in found}), "none twice"
    return {(s.prompt, s.number): s for s in found}


def same(a: dict[tuple[int, int], Sample], b: dict[tuple[int, int], Sample]) -> bool:
    return a.keys() == b.keys() and all(
        (a[k].ids, a[k].finish) == (b[k].ids, b[k].finish) and np.array_equal(a[k].logp, b[k].logp) for k in a
    )


@pytest.mark.parametrize("sampling", [Sampling(12), SHAPED, Sampling(12, 0.0), Sampling(12, 0.0, repetition_penalty=1.5)])
def test_a_sample_is_what_the_server_drew_with_both_log_probabilities(fake: Fake, sampling: Sampling) -> None:
    found = drawn(client(fake), sampling)
    assert found.keys() == {(i, k) for i in range(4) for k in range(3)}
    shape = {"temperature": sampling.temperature, "repetition_penalty": sampling.repetition_penalty}
    shape |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p} if sampling.temperature else {}
    for (i, _), one in found.items():
        assert one.finish == ("stop" if one.ids[-1] in ENDS else "length") and (one.finish == "stop" or len(one.ids) == 12)
        assert not ENDS & set(one.ids[:-1])
        for k, token in enumerate(one.ids):
            before = [*PROMPTS[i], *one.ids[:k]]
            assert one.logp[k] == pytest.approx(log_softmax(hashed(before))[token])
            assert one.drawn_logp[k] == pytest.approx(processed(hashed(before), shape, before)[token] if sampling.temperature else 0.0)
    ids = {one.ids for one in found.values()}
    assert len(ids) > 9 if sampling.temperature else len(ids) == 4, "each response has its own draws; greedy ones have none"


def test_what_is_asked_for(fake: Fake) -> None:
    drawn(client(fake), SHAPED, 2)
    asked = [body for body in fake.seen[1:] if "seed" in body]
    assert len({body["seed"] for body in asked}) == len(asked) == 8
    for body in asked:
        assert body["n"] == 1 and body["ignore_eos"] and body["return_token_ids"] and body["stop_token_ids"] == [0, 1, 2]
        assert [body[k] for k in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")] == [
            0.7,
            0.9,
            9,
            0.02,
            1.3,
            12,
        ]


def test_a_response_depends_on_seed_prompt_and_number_alone(fake: Fake) -> None:
    whole = drawn(client(fake), n=4)
    part = drawn(client(fake, parallel=1), numbers=[[2], [], [0, 3], [1]])
    assert same(part, {key: whole[key] for key in ((0, 2), (2, 0), (2, 3), (3, 1))})
    seeds = {request_seed(s, p, k) for s in (0, 1) for p in PROMPTS for k in range(4)}
    assert len(seeds) == 32 and all(0 <= s < 2**63 for s in seeds)


def test_a_stop_text_ends_the_text_before_it(fake: Fake) -> None:
    found = drawn(client(fake), Sampling(30, stop=("q", "hi")), 4)
    stopped = [one for one in found.values() if one.text_end is not None]
    assert stopped
    for one in stopped:
        text = fake_vllm.text(one.ids)
        assert text[one.text_end :].startswith(("q", "hi")) and one.finish == "stop" and "q" not in text[: one.text_end]


def test_the_window_cuts_what_may_be_asked_for(fake: Fake) -> None:
    fake.window = 9
    found = drawn(client(fake), Sampling(30), 2)
    assert max(len(one.ids) for (i, _), one in found.items() if i == 2) == 3, "five tokens of prompt, one place left for reading it again"
    fake.window = 6
    with pytest.raises(UserError, match="prompt 3: a prompt of 5 tokens fills the server's window of 6"):
        drawn(client(fake))


def test_stumbles_cost_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(client(fake), SHAPED)
    fake.seen.clear()
    stumbles: list[Any] = [(503, {"error": {"message": "later"}}), "hang up", (429, b"slow down"), (500, b""), "abort"]

    def reply(body: dict[str, Any], count: int) -> Any:
        if count % 3:
            return None
        one = stumbles[(count // 3) % len(stumbles)]
        return (200, {"choices": [fake_vllm.complete(body, hashed) | {"finish_reason": "abort"}]}) if one == "abort" else one

    fake.reply = reply
    assert same(drawn(client(fake), SHAPED), whole)


def test_a_server_that_falls_silent_is_waited_for(fake: Fake) -> None:
    whole = drawn(client(fake))
    fake.seen.clear()

    def reply(body: dict[str, Any], count: int) -> Any:
        if count == 6:
            fake.well = False
            threading.Timer(0.6, lambda: setattr(fake, "well", True)).start()
        return None if fake.well else (503, b"")

    fake.reply = reply
    start = time.monotonic()
    assert same(drawn(client(fake, parallel=2)), whole) and time.monotonic() - start > 0.5
    fake.well = False
    with pytest.raises(UserError, match=r"no vLLM server answers within 0.3 s. What was drawn is kept"):
        drawn(client(fake, patience=0.3))


def broken(**changes: Any) -> Any:
    return lambda body, count: None if count == 1 else (200, {"choices": [fake_vllm.complete(body, hashed) | changes]})


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda body, count: (count > 1 and (400, {"error": {"message": "too long"}})) or None, "refuses with status 400: too long"),
        (lambda body, count: (count > 1 and (401, {"error": "Unauthorized"})) or None, "refuses with status 401: Unauthorized"),
        (lambda body, count: (count > 1 and (200, {"choices": []})) or None, "no completion of vLLM"),
        (lambda body, count: (count > 1 and (200, b"<html>")) or None, "no completion of vLLM"),
        (lambda body, count: (count > 1 and (200, {"choices": [fake_vllm.complete(body, hashed)] * 2})) or None, "no completion of vLLM"),
        (broken(token_ids=[3, 4]), "do not fit"),
        (broken(token_ids=None), "no completion of vLLM"),
        (broken(token_ids=[], logprobs={"token_logprobs": []}), "do not fit"),
        (broken(token_ids=[3] * 40, logprobs={"token_logprobs": [0.0] * 40}), "do not fit"),
        (broken(token_ids=[3], logprobs={"token_logprobs": [float("nan")]}), "do not fit"),
        (broken(token_ids=[3], logprobs={"token_logprobs": [None]}), "do not fit|no completion"),
        (broken(prompt_token_ids=[1, 2]), "read another prompt"),
        (lambda body, count: (count > 1 and (500, b"oh")) or None, "gave no response in 3 tries: status 500"),
        (lambda body, count: (count > 1 and "hang up") or None, "gave no response in 3 tries: RemoteDisconnected"),
    ],
)
def test_nonsense_is_one_line(fake: Fake, monkeypatch: pytest.MonkeyPatch, reply: Any, said: str) -> None:
    monkeypatch.setattr(service, "ATTEMPTS", 3)
    fake.reply = reply
    with pytest.raises(UserError, match=said) as caught:
        drawn(client(fake))
    assert "\n" not in str(caught.value)


def test_no_vllm_at_the_address(fake: Fake) -> None:
    fake.RequestHandlerClass = type("Other", (fake_vllm.Handler,), {"do_GET": lambda self: self.answer(200, {"hello": 1})})
    with pytest.raises(UserError, match="this is no vLLM server"):
        drawn(client(fake))


def test_a_hang_is_given_up_after_the_second_time(fake: Fake) -> None:
    fake.reply = lambda body, count: time.sleep(1.5) if count > 1 else None
    start = time.monotonic()
    with pytest.raises(UserError, match=r"gave, twice, no answer within 0.2 s. Raise vllm.timeout"):
        drawn(client(fake, timeout=0.2))
    assert time.monotonic() - start < 1.4


def test_giving_up_does_not_wait_for_answers(fake: Fake) -> None:
    fake.reply = lambda body, count: time.sleep(20) if count > 6 else None
    got: list[Sample] = []
    start = time.monotonic()
    for one in client(fake).generate(PROMPTS, 3, Sampling(12), 5, give_up=lambda: len(got) == 5):
        got.append(one)
    assert len(got) == 5 and time.monotonic() - start < 5
    assert not [t for t in threading.enumerate() if t.name.startswith("vllm")]
    fake.reply = lambda body, count: time.sleep(20) if count > 30 else None
    generator = client(fake).generate(PROMPTS, 9, Sampling(12), 5)
    next(generator)
    generator.close()
    assert time.monotonic() - start < 8 and not [t for t in threading.enumerate() if t.name.startswith("vllm")]


def test_a_server_with_raw_log_probabilities_is_refused_where_that_is_wrong(fake: Fake) -> None:
    fake.mode = "raw"
    assert same(drawn(client(fake)), drawn(client(fake)))
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        drawn(client(fake), SHAPED)


def test_a_temperature_that_vllm_would_change_is_refused(fake: Fake) -> None:
    with pytest.raises(UserError, match=r"from 0.01 on. Use 0"):
        drawn(client(fake), Sampling(12, 0.001))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "https://127.0.0.1:1"}, "an address of this machine"),
        ({"url": "http://example.org:8000"}, "an address of this machine"),
        ({"url": "http://127.0.0.1:1", "python": "py"}, "`python` has no effect with `url`"),
        ({"arguments": ["--trust-remote-code"]}, "cannot have --trust-remote-code"),
        ({"arguments": ["--trust_remote_code"]}, "cannot have --trust-remote-code"),
        ({"arguments": ["--host=0.0.0.0"]}, "cannot have --host"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        configfile.load(VllmConfig, None, base=given)


# --- the same weights on both sides -------------------------------------------------------------------------------------------


def test_agreement_in_numbers() -> None:
    """By hand: d = (ln 2, -ln 2): mean |d| = ln 2; k3 = ((2 - 1 - ln 2) + (1/2 - 1 + ln 2)) / 2 = 1/4."""
    found = Agreement.of([-1.0, -2.0], [-1 + np.log(2), -2 - np.log(2)])
    assert (found.tokens, found.mean, found.most, found.k3) == (2, pytest.approx(np.log(2)), pytest.approx(np.log(2)), pytest.approx(0.25))
    rng = np.random.default_rng(0)
    assert all(Agreement.of(rng.normal(size=9), rng.normal(size=9)).k3 >= 0 for _ in range(100))
    assert "same model" in said(found, torch.bfloat16) and "same model" not in said(Agreement.of([0.0], [0.1]), torch.bfloat16)


def test_k3_estimates_the_divergence() -> None:
    p, q = (log_softmax(hashed([k])) for k in (1, 2))
    tokens = np.random.default_rng(0).choice(len(p), 400_000, p=np.exp(p))
    assert Agreement.of(p[tokens], q[tokens]).k3 == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=0.05)


@pytest.fixture(scope="module")
def trained() -> tuple[LanguageModel, ChatTokenizer]:
    from preftune.models.attention import NAME

    inner = tiny.model(scale=1.5)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner), ChatTokenizer(tiny.tokenizer())


class Served:
    """A fake server of a real small model, which reads its weights from a folder when it is told to, or does as if."""

    def __init__(self, fake: Fake, model: LanguageModel) -> None:
        self.deaf = False
        self.weights = {k: v.clone() for k, v in model.hf.state_dict().items()}
        self.inner = tiny.model(scale=1.5)
        self.inner.load_state_dict(self.weights)
        fake.window, fake.logits, fake.rows, fake.reload = 512, lambda ids: self.rows(ids)[-1], self.rows, self.reload
        self.folders: list[str] = []

    @torch.no_grad()
    def rows(self, ids: Any) -> np.ndarray:
        found: np.ndarray = self.inner(torch.tensor([list(ids)])).logits[0].double().numpy()
        return found

    def reload(self, body: dict[str, Any]) -> tuple[int, Any]:
        from safetensors.torch import load_file

        assert body["method"] == "reload_weights"
        self.folders.append(body["kwargs"]["weights_path"])
        if not self.deaf:
            self.inner.load_state_dict(load_file(Path(self.folders[-1]) / "model.safetensors"), strict=False)
        return 200, {"results": [None]}


def stepped(model: LanguageModel, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)


def test_new_weights_arrive_and_a_large_step_shows(fake: Fake, trained: Any, tmp_path: Path) -> None:
    model, tokenizer = trained
    model = LanguageModel(tiny.model(scale=1.5), packed=False)
    served, server = Served(fake, model), client(fake)
    assert server.push(model, tokenizer, tmp_path).most < 1e-4
    for seed, size in enumerate((0.3, 1e-3, 0.3)):
        server.prove(model, tokenizer)
        stepped(model, size, seed)
        if size > 0.1:
            with pytest.raises(UserError, match="does not serve the new weights"):
                server.prove(model, tokenizer)
        assert server.push(model, tokenizer, tmp_path).most < 1e-4
    assert len(set(served.folders)) == 2 and len(list(tmp_path.iterdir())) == 1, (
        "the folder before is removed, the one served never written"
    )


@pytest.mark.parametrize(("size", "said"), [(0.3, "differ by .* tokens\\)$"), (2e-4, "they moved by -?0%")])
def test_weights_that_did_not_arrive_are_noticed_even_after_a_step_below_the_tolerance(
    fake: Fake, trained: Any, tmp_path: Path, size: float, said: str
) -> None:
    _, tokenizer = trained
    model = LanguageModel(tiny.model(scale=1.5), packed=False)
    server = client(fake)
    served = Served(fake, model)
    server.push(model, tokenizer, tmp_path)
    served.deaf = True
    stepped(model, size, 1)
    with pytest.raises(UserError, match=said):
        server.push(model, tokenizer, tmp_path)


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapter"])
def test_the_proof_is_read_in_fp32_whatever_the_training_rounds_to(lora: bool, fake: Fake, trained: Any, tmp_path: Path) -> None:
    """A server without rounding agrees to 1e-4 with a policy that trains in bf16, and whose own numbers there are far off."""
    from preftune.models.lora import Adapter

    _, tokenizer = trained
    model = LanguageModel(tiny.model(scale=1.5), packed=False, compute=torch.bfloat16)
    Served(fake, model)
    server = client(fake)
    if lora:
        Adapter(model.hf, rank=2, alpha=4, dropout=0.0, targets="all-linear")
    for seed in range(3):
        stepped(model, 0.05, seed)
        if lora:
            with torch.no_grad():
                for name, parameter in model.hf.named_parameters():
                    if "lora_B" in name:
                        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        assert server.push(model, tokenizer, tmp_path).most < 1e-4
    first, *rest = tokenizer.encode_prompt("The same text again")
    (rounded,) = token_logps(model, [[first]], [rest])
    model.backbone.compute = torch.float32
    (exact,) = token_logps(model, [[first]], [rest])
    assert np.abs(rounded - exact).max() > 1e-3, "and it goes on in bf16 afterwards"


@pytest.mark.parametrize(("compute", "noise"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 1.0])
def test_noise_raises_no_alarm_and_weights_that_came_in_part_do(compute: torch.dtype, noise: float, size: float) -> None:
    alarms = missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        draw = lambda scale: scale * rng.normal(size=53)  # noqa: B023
        arrivals, old = Arrivals(compute), draw(1.0) - 3
        arrivals.check(old + draw(noise), old)
        new = old + draw(size)
        try:
            arrivals.check(new + draw(1.5 * noise), new)  # it may rise a little
        except UserError:
            alarms += 1
        arrivals.before = [old]
        part = new - draw(size)  # what does not come is no fixed share of the step
        for wrong in (old + draw(noise), part + draw(noise), old + 0.5 * (new - old) + draw(noise)):
            try:
                arrivals.check(wrong, new)
                missed += 1
            except UserError:
                pass
            arrivals.before = [old]
    assert alarms <= 4
    assert missed == 0 or size < 8 * noise, "what stands out from the noise is seen"


def test_a_server_that_takes_no_weights_is_told_of(fake: Fake, trained: Any, tmp_path: Path) -> None:
    model, tokenizer = trained
    Served(fake, model)
    fake.reload = lambda body: (404, {"detail": "Not Found"})
    with pytest.raises(UserError, match=r"does not take new weights.*VLLM_SERVER_DEV_MODE=1"):
        client(fake).push(model, tokenizer, tmp_path)


def test_a_server_started_again_elsewhere_is_given_the_weights_again(fake: Fake, trained: Any, tmp_path: Path) -> None:
    _, tokenizer = trained
    model = LanguageModel(tiny.model(scale=1.5), packed=False)
    served, server = Served(fake, model), client(fake)
    stepped(model, 0.3, 3)
    server.push(model, tokenizer, tmp_path)
    told = len(served.folders)

    def reply(body: dict[str, Any], count: int) -> Any:
        if fake.well and not reply.fell:  # type: ignore[attr-defined]
            reply.fell = True  # type: ignore[attr-defined]
            fake.well = False
            served.inner.load_state_dict(served.weights)  # what it was first started with
            threading.Timer(0.3, lambda: setattr(fake, "well", True)).start()
        return None if fake.well else (503, b"")

    reply.fell = False  # type: ignore[attr-defined]
    fake.reply = reply
    found = list(server.generate([tokenizer.encode_prompt("Hello")], 4, Sampling(6), 1))
    assert len(served.folders) > told
    assert agreement(model, [(tokenizer.encode_prompt("Hello"), one) for one in found]).most < 1e-4


def test_token_logps_are_those_of_a_plain_pass(trained: Any) -> None:
    model, _ = trained
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(7, 320, size).tolist() for size in sizes] for sizes in ((5, 1, 30), (3, 9, 1)))
    found = token_logps(model, prompts, responses)
    plain = tiny.model(scale=1.5)
    for prompt, response, mine in zip(prompts, responses, found, strict=True):
        with torch.no_grad():
            logp = plain(torch.tensor([prompt + response])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(mine, logp.gather(1, torch.tensor(response)[:, None])[:, 0], atol=2e-5)
