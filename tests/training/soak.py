"""Kill runs at random moments and compare every byte with an uninterrupted one: `python -m tests.training.soak [SEED [PRECISION]]`.

For each method twenty SIGKILLs: one half after a random time, the other half at a random failpoint, so that steps, evaluations, checkpoint
writes, metrics and the final save are all hit; of online methods sampling and judging too. A table says where each life ended.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests import tiny
from tests.online import small
from tests.training import runs

KILLS = 20
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
"""What the kernels for attention and products take, so that they are part of it."""
WORDS = ("data.limit=200", "epochs=4", "save_every=1", "eval_every=5", "best_metric=loss")
CASES = {
    "sft": (),
    "sft, LoRA with dropout 0.3": (*runs.LORA, "lora.dropout=0.3"),
    "reward": (),
    "dpo": (),
    "dpo, LoRA, checkpointing": (*runs.LORA, "gradient_checkpointing=true"),
}
ONLINE = {
    "ppo": ("rollout.n=1", "rollout.prompts=4", "method.passes=2", "method.kl_target=0.5", "epochs=60", "eval_every=5"),
    "grpo": ("rollout.prompts=3", "method.kl=0.1", "reference_sync.every=2", "epochs=60", "eval_every=5"),
}
SELDOM = ("alarms=null", "keep_responses=null")
"""What passes a failpoint once in many rollouts: a kill there would use up the run."""
PLACES = {
    "rollout": "in a rollout",
    "step": "in a step",
    "evaluation": "in an evaluation",
    "checkpoint": "in a checkpoint write",
    "metrics": "in the metrics",
    "final": "in the final save",
    "none": "before the first failpoint",
}


def killed_once(words: list[str], log: Path, chance: random.Random, names: Counter[str]) -> str | None:
    """Start the run and kill it; where its last sign of life was, or None when it came to its end first."""
    trace = log.with_name("trace")
    trace.unlink(missing_ok=True)
    if chance.random() < 0.5:
        name = chance.choice(sorted(names))
        nth = chance.randint(1, 4) if names[name] > KILLS else 1  # what a life passes once only
        code = runs.run(words, log, trace, failpoint=f"{name}:kill:{nth}")
    else:
        process = runs.start(words, log, trace)
        deadline = time.monotonic() + 30
        while not any("microbatch" in name for name in runs.passed(trace)) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.join(chance.random() * 0.25)
        process.kill()
        process.join()
        code = process.exitcode
    if code == 0:
        return None
    assert code == -signal.SIGKILL, log.read_text()
    return (runs.passed(trace) or ["none"])[-1]


def command(name: str, root: Path, output: Path, precision: str) -> list[str]:
    """The words of a case's run."""
    if name in ONLINE:
        return small.words(root, output, name, *ONLINE[name], *SELDOM, f"precision={precision}")
    return runs.command(name.split(",")[0], root / "offline", output, *WORDS, *CASES[name], f"precision={precision}")


def soak(name: str, root: Path, folder: Path, chance: random.Random, precision: str) -> bool:
    """One case: an uninterrupted run, and one killed twenty times. True when they are the same."""
    log, trace = folder / "log", folder / "names"
    assert runs.run(command(name, root, folder / "whole", precision), log, trace) == 0, log.read_text()
    names = Counter(name for name in runs.passed(trace) if not name.startswith("final"))
    words = command(name, root, folder / "run", precision)
    ends: Counter[str] = Counter()
    while ends.total() < KILLS - 1:
        place = killed_once(words, log, chance, names)
        assert place is not None, "the run is too short for so many kills"
        ends[place] += 1
    assert runs.run(words, log, trace, failpoint="final.before:kill") == -signal.SIGKILL
    ends["final.before"] += 1
    assert runs.run(words, log) == 0, log.read_text()
    steps = sum(row["kind"] == "train" for row in runs.rows(folder / "whole"))
    try:
        runs.assert_same(folder / "run", folder / "whole", last_only=True)
        same = True
    except AssertionError:
        same = False
    by_place = Counter({place: sum(n for end, n in ends.items() if end.split(".")[0] == key) for key, place in PLACES.items()})
    by_place["while starting"] = ends.total() - by_place.total()
    places = ", ".join(f"{n} {place}" for place, n in by_place.items() if n)
    files = len(runs.digests(folder / "whole", last_only=True))
    verdict = f"{files} files and {len(runs.rows(folder / 'whole'))} rows equal" if same else "DIFFERENT"
    print(f"| {name} | {steps} | {ends.total()} | {places} | {verdict} |", flush=True)
    return same


def main() -> int:
    """Print the table; 1 when a case ended with other bytes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    precision = sys.argv[2] if len(sys.argv) > 2 else "fp32"
    print(
        f"seed {seed}, {precision}\n| run | steps | kills | where | against the uninterrupted run |\n| --- | --- | --- | --- | --- |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as root:
        tiny.save(Path(root) / "offline", **SHAPE)
        small.place(Path(root), **SHAPE)
        good = True
        for number, name in enumerate((*CASES, *ONLINE)):
            folder = Path(root) / str(number)
            folder.mkdir()
            good &= soak(name, Path(root), folder, random.Random(seed * 100 + number), precision)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
