"""Run directories as the toolkit leaves them, with the numbers of a small run that learns, for the report's tests."""

import json
import math
from pathlib import Path

import numpy as np

from preftune.training.durable import replace_file
from preftune.training.manifest import RUN_FILE, RunManifest, Session
from preftune.training.metrics import METRICS_FILE, MetricsLog

GIB = 2**30


def run(folder: Path, method: str, steps: int = 75, seed: int = 0, status: str = "finished") -> Path:
    """A run directory with `run.json` and `metrics.jsonl`; the loss is noise about a falling exponential."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = {"sft": (2.9, 1.9), "reward": (0.72, 0.61), "dpo": (math.log(2), 0.63)}[method]
    config = {"model": "smollm2", "lr": 5e-6, "prompts_per_step": 8, "data": {"path": "hh_pairs.jsonl"}, "method": {"beta": 0.1}}
    manifest = RunManifest.begin(
        method, config, data={"hh_pairs.jsonl": "ab" * 32}, session=Session.begin(["preftune", "train", method], threads=2)
    )
    replace_file(folder / RUN_FILE, manifest.ended(status).model_dump_json().encode())
    rng, log = np.random.default_rng(seed), MetricsLog(folder / METRICS_FILE)
    for step in range(1, steps + 1):
        gone = step / steps
        mean = end + (start - end) * math.exp(-3 * gone)
        loss = mean + 0.04 * start * float(rng.standard_normal())
        row = {
            "loss": loss, "lr": 5e-6 * min(1, step / 8) * (1 - 0.9 * gone), "grad_norm": float(np.exp(rng.normal(0.5, 0.3))),
            "seconds": 2 + float(rng.random()), "tokens": int(rng.integers(1800, 3200)), "peak_memory": int(3.4 * GIB),
        }  # fmt: skip
        if method != "sft":
            row |= {"accuracy": float(rng.binomial(8, 0.5 + 0.12 * gone)) / 8, "margin": 0.3 * gone + 0.1 * float(rng.standard_normal())}
        if method == "dpo":
            row |= {"chosen_reward": -0.1 * gone, "rejected_reward": -0.4 * gone, "kl": 1.8 * gone, "response_length": 90 + 20 * gone}
        log.append(step, "train", row)
        if step % 25 == 0:
            log.append(step, "eval", {"loss": mean + 0.02, **({"accuracy": 0.5 + 0.13 * gone} if method != "sft" else {})})
    log.close()
    return folder


def evaluation() -> dict:
    """The figures of a quickstart, in the shape of `evaluation.json`."""
    ask = "Write a short note to a colleague who has just lost a pet."
    talk = [
        {"role": "user", "content": "What's a good way to learn the guitar?"},
        {"role": "assistant", "content": "It depends on what you want to play. Do you have a style of music in mind?"},
        {"role": "user", "content": "Mostly folk songs, and I have about twenty minutes a day."},
    ]
    before = "Folk songs are a good place to begin. Folk songs are a good place to begin because folk songs are folk songs."
    after = (
        "Twenty minutes a day is plenty. Spend five on changing between G, C and D, ten on one song with those three chords, "
        "and five playing along with a recording.\n\nAfter two weeks, add Em and A minor: most folk songs need no more."
    )
    rng = np.random.default_rng(4)
    generations = [
        {
            "prompt": talk
            if i % 3 == 0
            else [{"role": "user", "content": ask if i % 3 == 1 else "Why is the sky blue at noon and red at dusk?"}],
            "before": before,
            "after": after,
            "reference_answer": "Pick three chords and one song." if i == 0 else None,
            "scores": {"before": float(rng.normal(-0.4, 0.5)), "after": float(rng.normal(0.3, 0.5))},
        }
        for i in range(16)
    ]
    dpo = "dpo/evaluation.json#"
    return {
        "sections": [
            {
                "title": "Did it learn what people prefer?",
                "text": "For a pair of responses that people compared, does the model rate the one they chose higher?",
                "metrics": [
                    {
                        "name": "Reward-model accuracy", "value": 0.664, "low": 0.601, "high": 0.724, "n": 214, "unit": "accuracy",
                        "explain": "The reward model's score of the chosen response is above that of the rejected one.",
                        "source": "reward/evaluation.json#/accuracy",
                    },
                    {
                        "name": "Implicit-reward accuracy", "value": 0.586, "low": 0.523, "high": 0.651, "n": 214, "unit": "accuracy",
                        "explain": "The policy moved towards the chosen response more than towards the rejected one.",
                        "source": f"{dpo}/accuracy",
                    },
                ],
            },
            {
                "title": "What did it cost?",
                "text": "Alignment is a trade: the policy should change its manner, not forget its language.",
                "metrics": [
                    {
                        "name": "Perplexity before", "value": 12.43, "low": 11.2, "high": 13.9, "n": 120, "unit": "",
                        "explain": "On the chosen responses, by the model as it came.", "source": f"{dpo}/perplexity_before",
                    },
                    {"name": "Perplexity after", "value": 9.871, "low": 8.9, "high": 11.0, "n": 120, "source": f"{dpo}/perplexity"},
                    {
                        "name": "KL to the reference", "value": 1.83, "low": 1.41, "high": 2.3, "n": 16, "unit": "nats",
                        "explain": "How far the policy's own responses are from what the reference would say, per response.",
                        "source": f"{dpo}/kl",
                    },
                    {
                        "name": "Response length", "value": 87.2, "low": 71.0, "high": 103.4, "n": 16, "unit": "tokens",
                        "source": f"{dpo}/length",
                    },
                ],
            },
        ],
        "generations": generations,
        "stages": [
            {
                "name": "SFT", "run": "sft", "what": "Showed the model good responses and let it imitate them, token by token.",
                "why": "A model must first speak in the right manner before it can be taught which of two responses is better.",
                "seconds": 141.2, "peak_memory": 3.1 * GIB, "records": {"kept": 412, "dropped": {"empty response": 3}},
            },
            {
                "name": "Reward model", "run": "reward", "what": "Trained a second model to tell which of two responses people chose.",
                "why": "It stands in for people when there are more responses than anybody can read.",
                "seconds": 118.0, "peak_memory": 3.3 * GIB,
                "records": {"kept": 380, "dropped": {"prompt fills the window": 7, "the two responses are equal": 5}},
            },
            {
                "name": "DPO", "run": "dpo", "what": "Moved the model towards chosen responses and away from rejected ones.",
                "why": "It learns from comparisons directly, held back by a penalty for straying from where it began.",
                "seconds": 204.9, "peak_memory": 4.9 * GIB, "records": {"kept": 380, "dropped": {}},
            },
            {
                "name": "Evaluation", "run": None, "what": "Compared the models on prompts none of them had seen.",
                "why": "What counts is how it does on new prompts.", "seconds": 32.5, "peak_memory": 2.2 * GIB, "records": None,
            },
        ],
        "next": [
            "preftune chat runs/quickstart/dpo/final",
            "preftune data show my_pairs.jsonl",
            "preftune train dpo model=HuggingFaceTB/SmolLM2-360M-Instruct data.path=my_pairs.jsonl output=runs/mine",
        ],
        "meta": {
            "model": "SmolLM2-135M-Instruct", "data": "806 comparisons, split by prompt", "seconds": 497.3, "peak_memory_bytes": 4.9 * GIB,
            "versions": {"preftune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.4"},
        },
    }  # fmt: skip


def quickstart(root: Path) -> Path:
    """`runs/quickstart` as the quickstart leaves it."""
    for seed, method in enumerate(("sft", "reward", "dpo")):
        run(root / method, method, seed=seed)
    (root / "dpo" / "evaluation.json").write_text(json.dumps({"accuracy": 0.586}))
    (root / "evaluation.json").write_text(json.dumps(evaluation()))
    return root


def online(folder: Path, rollouts: int = 24, steps_each: int = 2, *, gold: bool = True, alarm: bool = False, seed: int = 0) -> Path:
    """An online run whose score rises while its gold score falls in the end, with the responses of two rollouts."""
    run(folder, "sft", steps=0)
    manifest = RunManifest.begin("ppo", {"model": "smollm2"}, data={}, session=Session.begin(["preftune"], threads=2))
    replace_file(folder / RUN_FILE, manifest.ended("finished").model_dump_json().encode())
    rng, log = np.random.default_rng(seed), MetricsLog(folder / METRICS_FILE)
    noise = lambda scale: scale * float(rng.standard_normal())
    for rollout in range(rollouts):
        gone = rollout / max(1, rollouts - 1)
        said = {
            "score": 2 * gone + noise(0.1), "score_std": 1.0, "score_min": -1 + gone, "score_max": 2 + 2 * gone, "prompts_drawn": 16.0,
            "response_tokens": 40 + 30 * gone + noise(2), "response_tokens_p10": 20.0, "response_tokens_p50": 40 + 28 * gone,
            "response_tokens_p90": 64.0, "finished": 0.8 - 0.3 * gone, "kl_token": 0.2 * gone, "kl_response": 12 * gone + noise(0.2),
            "kl_response_k3": 13 * gone, "policy_perplexity": 9 - 6 * gone, "reference_perplexity": 9 - 4 * gone + noise(0.2),
            "repetition": 0.05 + 0.2 * gone, "explained_variance": 0.7 * gone - 0.1, "seconds_sampling": 6.0, "seconds_judging": 0.5,
            "seconds_looking": 1.5, "sampled_tokens_per_second": 300.0, "sampler_gap": 0.01,
        }  # fmt: skip
        if gold:
            said["gold"] = 3 * gone * (1 - gone) + noise(0.05)
        for step in range(steps_each):
            row = {
                "loss": noise(0.02), "entropy": 3 - 2 * gone, "clip_fraction": 0.02 * step + 0.05 * gone, "step_kl": 0.001, "ratio": 1.0,
                "kl": 0.2 * gone, "policy_loss": noise(0.02), "value_loss": 0.5, "lr": 1e-6, "grad_norm": 1.0, "seconds": 9.0,
                "tokens": 2000, "peak_memory": int(5 * GIB), **(said if step == 0 else {}),
            }  # fmt: skip
            if step + 1 == steps_each and alarm and gone > 0.8:
                row["alarm"] = 1.0
            log.append(rollout * steps_each + step + 1, "train", row)
        if rollout % 6 == 5:
            held = {"score": 1.8 * gone, "score_low": 1.8 * gone - 0.3, "score_high": 1.8 * gone + 0.3}
            gold_held = {name.replace("score", "gold"): value / 2 for name, value in held.items()} if gold else {}
            log.append(
                (rollout + 1) * steps_each, "eval", held | gold_held | {"response_tokens": 60.0, "kl_response": 11 * gone, "records": 30}
            )
    log.close()
    for number in (1, 11):
        shown = [{"which": w, "prompt": "Why?", "response": f"Because {number}.", "score": s, "tokens": 5, "finish": "stop"}
                 for w, s in (("worst", -1.0), ("best", 2.0), ("random", None))]  # fmt: skip
        (folder / "rollouts" / str(number)).mkdir(parents=True)
        (folder / "rollouts" / str(number) / "shown.json").write_text(json.dumps(shown))
    if alarm:
        (folder / "alarm.json").write_text(json.dumps({"rollout": 20, "step": 40, "said": "the gold score fell from 0.7 to 0.1"}))
    return folder
