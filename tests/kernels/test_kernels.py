"""Compiled kernels against plain PyTorch: the same numbers, to the last bit where that can be."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from preftune import kernels
from preftune.models.attention import NAME, TreePlan
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Layout, collate
from preftune.rollout.sampling import Sampling, draw
from tests import tiny

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
pytestmark = pytest.mark.skipif(kernels.find("tiles") is None, reason="no compiled kernels on this machine")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scalar(function):
    """A function of kernels as one of arrays."""
    from numba import njit

    @njit
    def over(x, out):
        for i in range(len(x)):
            out[i] = function(x[i])

    return over


def test_exp_is_exact_to_one_unit_in_the_last_place_and_keeps_nan():
    from preftune.kernels import tiles

    x = torch.linspace(-87, 88, 200_001)
    found = torch.empty_like(x)
    scalar(tiles.exp)(x.numpy(), found.numpy())
    true = x.double().exp()
    assert float(((found - true) / true).abs().max()) < 2**-23
    edges = torch.tensor([float("nan"), -1e30, float("-inf"), 200.0])
    out = torch.empty_like(edges)
    scalar(tiles.exp)(edges.numpy(), out.numpy())
    assert out[0].isnan() and (out[1:3] == 0).all() and 1e38 < out[3] < float("inf")


def test_bf16_is_rounded_as_pytorch_rounds_it():
    from preftune.kernels import tiles

    odd = [0.0, -0.0, 1.00390625, 1.01171875, 3.3895e38, float("inf"), float("-inf"), float("nan"), 1e-40]
    x = torch.cat([torch.tensor(odd), normal(10_000) * 10 ** normal(10_000, seed=1)])
    found = torch.empty(len(x), dtype=torch.int16)
    scalar(tiles.narrow)(x.numpy(), found.numpy())
    halves = found.view(torch.bfloat16)
    assert torch.equal(halves.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(found[kept], x.to(torch.bfloat16).view(torch.int16)[kept])
    back = torch.empty_like(x)
    scalar(tiles.widen)(found.numpy(), back.numpy())
    assert torch.equal(back[kept], halves.float()[kept])


@BOTH
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("with_added", [False, True])
def test_norm(dtype, rows, with_added):
    pointwise = kernels.find("pointwise")
    states, weight = normal(rows, 72, seed=1) * 3, normal(72, seed=2)
    added = normal(rows, 80, seed=3, dtype=dtype)[:, :72] if with_added else None
    whole = states if added is None else states + added
    true = F.rms_norm(whole.double(), (72,), weight.double(), 1e-5)
    given = states.clone()
    found = pointwise.add_norm(given, added, weight, 1e-5, dtype)
    assert found.dtype == dtype and torch.equal(given, whole)
    torch.testing.assert_close(found.double(), true.to(dtype).double(), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@BOTH
def test_rotary_embedding(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, kv, width, rows = 6, 2, 32, 11
    both = normal(rows, (heads + kv) * width + 5, seed=1, dtype=dtype)[:, : (heads + kv) * width]
    angles = torch.cat([normal(rows, width // 2, seed=2)] * 2, -1)
    cos, sin = angles.cos(), angles.sin()
    q, k = kernels.find("pointwise").turn(both, heads, kv, cos, sin)
    apart = both.float().view(1, rows, heads + kv, width).transpose(1, 2)
    true_q, true_k = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(apart[:, :heads], apart[:, heads:], cos[None], sin[None]))
    assert q.dtype == torch.float32 and k.dtype == dtype
    torch.testing.assert_close(q, true_q, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(k, true_k.to(dtype), atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)


@BOTH
def test_rotation_of_heads_and_its_gradient(dtype):
    """Against the usual formula in float64, with halves of the angles that differ, read from where a joined product left them."""
    heads, width, rows = 5, 48, 13
    pointwise = kernels.find("pointwise")
    x, grad = (normal(rows, heads * width + 7, seed=seed, dtype=dtype)[:, :-7].view(rows, heads, width).transpose(0, 1) for seed in (1, 2))
    cos, sin = normal(rows, width, seed=3), normal(rows, width, seed=4)
    leaf = x.double().requires_grad_()
    true = leaf * cos.double() + torch.cat([-leaf[..., width // 2 :], leaf[..., : width // 2]], -1) * sin.double()
    true.backward(grad.double())
    for mine, exact in ((pointwise.rotate(x, cos, sin), true.detach()), (pointwise.rotate_back(grad, cos, sin), leaf.grad)):
        assert mine.dtype == dtype and mine.shape == exact.shape
        torch.testing.assert_close(
            mine.double(), exact, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2 if dtype != torch.float32 else 1e-5
        )


@BOTH
def test_gated_activation(dtype):
    both = normal(50, 2 * 96, seed=1, dtype=dtype) * 5
    gate, up = both.split(96, 1)
    found = kernels.find("pointwise").silu_gated(gate, up)
    true = (F.silu(gate.double()) * up.double()).to(dtype)
    torch.testing.assert_close(found, true, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


@BOTH
def test_gradient_of_the_gated_activation(dtype):
    gate, up = (normal(50, 2 * 96, seed=1, dtype=dtype) * 4).split(96, 1)
    pull = normal(50, 100, seed=2, dtype=dtype)[:, :96]
    inner, d_both = kernels.find("pointwise").silu_gated_back(gate, up, pull)
    exact = [t.double().requires_grad_() for t in (gate, up)]
    true = F.silu(exact[0]) * exact[1]
    grads = torch.cat(torch.autograd.grad(true, exact, pull.double()), 1)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(inner.double(), true.detach(), **close)
    torch.testing.assert_close(d_both.double(), grads, **close)


@BOTH
@pytest.mark.parametrize("window", [None, 3])
def test_softmax_of_a_tree(dtype, window):
    mask = TreePlan(Layout(((9, (5, 1, 8)),))).dense_mask(0, window, torch.empty(0, dtype=dtype))
    scores = normal(3, 4 * len(mask), len(mask), seed=1, dtype=dtype) * 5
    exact = (scores.view(-1, *mask.shape).double() + mask.double()).softmax(-1).view(scores.shape)
    found = kernels.find("pointwise").tree_softmax(scores, mask)
    assert found is scores
    torch.testing.assert_close(found.double(), exact, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-30)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_a_model_has_the_same_gradients_with_and_without(kind, monkeypatch):
    def step(switch):
        monkeypatch.setenv(kernels.SWITCH, switch)
        inner = tiny.model(kind)
        inner.set_attn_implementation(NAME)
        logp = LanguageModel(inner)(collate([tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2)]))
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        return logp.detach(), {name: p.grad for name, p in inner.named_parameters() if p.grad is not None}

    (ours, our_grads), (theirs, their_grads) = step("on"), step("off")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert our_grads.keys() == their_grads.keys()
    for name, grad in their_grads.items():
        torch.testing.assert_close(our_grads[name], grad, atol=1e-5, rtol=1e-4, msg=name)


@BOTH
@pytest.mark.parametrize("width", [1, 512, 700, 49152])
def test_sums_of_exponentials(dtype, width):
    logits = normal(5, width, seed=1, dtype=dtype) * 4
    logits[2, width // 2] = float("-inf") if width > 1 else 1.0
    top, sums = kernels.find("pointwise").exp_sums(logits, 512)
    true = (logits.double() - logits.double().amax(1, keepdim=True)).exp()
    true = F.pad(true, (0, -width % 512)).view(5, -1, 512).sum(2)
    assert torch.equal(top, logits.float().amax(1)) and sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), true, rtol=2e-6, atol=0)


@BOTH
@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize(("width", "scale"), [(1, 1.0), (700, 0.7), (49152, 1.0)])
def test_log_probabilities_and_entropies_and_their_gradients(dtype, width, scale, entropies):
    logits, ours = normal(5, width, seed=1, dtype=dtype) * 4, kernels.find("logprobs")
    targets, (g, e) = torch.arange(5) * 7919 % width, normal(2, 5, seed=2)
    exact = logits.double().requires_grad_()
    logp = (exact * float(torch.tensor(scale))).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    lse, told = ours.log_sums(logits, scale)
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logits.double().gather(1, targets[:, None]).squeeze(1) * scale - lse, chosen, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(told.double(), entropy, atol=4e-6, rtol=1e-6)
    (chosen @ g.double() + (entropy @ e.double() if entropies else 0)).backward()
    made = ours.log_sums_back(logits, lse, told if entropies else None, targets, g, e if entropies else None, scale)
    assert made.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(made.double(), exact.grad, atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_a_token_that_is_ruled_out_has_no_part_in_log_probabilities():
    logits = normal(2, 70, seed=3)
    logits[:, 5] = float("-inf")
    lse, entropy = kernels.find("logprobs").log_sums(logits, 1.0)
    without = torch.cat([logits[:, :5], logits[:, 6:]], 1).double()
    torch.testing.assert_close(lse.double(), without.logsumexp(1), atol=1e-6, rtol=1e-6)
    made = kernels.find("logprobs").log_sums_back(logits, lse, entropy, torch.tensor([1, 2]), torch.ones(2), torch.ones(2), 1.0)
    assert made.isfinite().all() and not made[:, 5].any()


@pytest.mark.parametrize("shape", [(1, 5), (64, 16), (150, 576)])
def test_the_norm_s_gradients(shape):
    x, g, weight = normal(*shape, seed=1) * 5, normal(*shape, seed=2), normal(1, shape[1], seed=3)[0]
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    out = leaves[1] * leaves[0] * torch.rsqrt(leaves[0].pow(2).mean(-1, keepdim=True) + 1e-5)
    for made, true in zip(
        kernels.find("pointwise").norm_back(x, g, weight, 1e-5), torch.autograd.grad(out, leaves, g.double()), strict=True
    ):
        assert (made.double() - true).norm() <= 1e-6 * true.norm()


def test_the_last_number_below_one_draws_a_token_that_exists():
    """The sums of blocks and the block drawn from are rounded apart, and the vocabulary ends inside a block."""
    logits, uniform = normal(500, 70, seed=3), torch.full((500,), 1 - 2**-53, dtype=torch.float64)
    tokens, _, drawn = draw(logits, uniform, Sampling(max_new_tokens=1))
    assert int(tokens.max()) == 69 and bool(drawn.isfinite().all())


def test_nan_in_states_stays_nan():
    pointwise = kernels.find("pointwise")
    x = torch.tensor([[1.0, float("nan")]] * 3)
    assert pointwise.add_norm(x.clone(), None, torch.ones(2), 1e-5, torch.float32).isnan().all()
    assert pointwise.silu_gated(x, torch.ones_like(x))[:, 1].isnan().all()
    assert pointwise.exp_sums(x, 512)[1].isnan().all()


def test_switched_off_there_are_none(monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert kernels.find("pointwise") is None


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
from preftune import kernels
assert kernels.find("pointwise") is None and kernels.find("blocks") is None
"""


def test_without_numba_there_are_none():
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], check=True, timeout=120)


COMPILED = """
import os, stat, sys, torch
from pathlib import Path
from preftune import kernels
x = torch.randn(4, 32)
kernels.find("pointwise").silu_gated(x, x)
home = Path(os.environ["PREFTUNE_CACHE"]) / "kernels"
(folder,) = home.iterdir()
assert stat.S_IMODE(folder.stat().st_mode) == 0o700
print(sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*.nbc")))
"""


def test_compiled_code_is_kept_for_the_next_run_and_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    run = lambda: subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120, capture_output=True, text=True)
    first, second = run(), run()
    assert "_gated32" in first.stdout and second.stdout == first.stdout
    assert "Compiling" in first.stderr and second.stderr == ""


def test_what_older_versions_compiled_is_removed_in_the_end(tmp_path, monkeypatch):
    from preftune.kernels import launch

    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    kept, old, new = tmp_path / "elsewhere", tmp_path / "cache/kernels/old", tmp_path / "cache/kernels/new"
    for folder in (kept, old, new):
        folder.mkdir(parents=True)
        (folder / "code.nbc").touch()
    (tmp_path / "cache/kernels/link").symlink_to(kept)
    for folder in (kept, old):
        os.utime(folder, (0, 0))
    launch._folder.__wrapped__()
    assert not old.exists() and (new / "code.nbc").exists() and (kept / "code.nbc").exists()


SAME_BYTES = """
import hashlib, torch
from preftune.kernels import find
p, b, m, t, l, n = (find(name) for name in ("pointwise", "blocks", "products", "trees", "logprobs", "linear"))
torch.set_num_threads(1)
x, u = (torch.randn(50, 96, generator=torch.Generator().manual_seed(n)) * 3 for n in (0, 1))
mask = torch.zeros(20, 20).masked_fill_(torch.ones(20, 20).triu(1).bool(), -1e30)
one = lambda *n: torch.tensor(n)
found = [
    p.silu_gated(x, u), *p.silu_gated_back(x, u, u), p.add_norm(x.clone(), u, u[0], 1e-5, torch.float32), *p.exp_sums(x, 64),
    p.norm_back(x, u, u[0], 1e-5)[0], p.norm_back(x, u, u[0], 1e-5)[1], *l.log_sums(x, 1.0),
    l.log_sums_back(x.clone(), *l.log_sums(x, 1.0), one(*range(50)), u[:, 0].contiguous(), u[:, 1].contiguous(), 1.0),
    p.tree_softmax(x[:, :80].contiguous().view(10, 20, 20), mask), *p.turn(x, 4, 2, u[:, :16].contiguous(), u[:, 16:32].contiguous()),
    *(turn(x.view(50, 6, 16).transpose(0, 1), u[:, :16].contiguous(), u[:, 16:32].contiguous()) for turn in (p.rotate, p.rotate_back)),
    m.multiply(x, m.lay_out(u[:32].contiguous()), u[0, :32].contiguous()),
]


def step(parts):
    memory = torch.zeros(4, b.size(2, 16, parts[0].dtype), dtype=torch.int32)
    where = one(*(row.data_ptr() for row in memory))
    b.store(parts[0][:2], parts[1][:2], where, one(1, 0, 50).view(1, 3))
    told = one(0, 0, 2), one(1, 0), one(50), one(0, 0), one(1).view(1, 1), one(2, 3).view(2, 1)
    new = [part.transpose(0, 1)[:2, :2] for part in parts]
    angles = u[:2, :32].contiguous().view(2, 2, 16)
    return b.step(*new, angles, where, told, (1, 1, 1, 2, 128), None, 0.25).float(), memory


found += step([x[:, c : c + 32].view(50, -1, 16).transpose(0, 1) for c in (0, 32, 64)])
if t.multiplies_pairs():
    parts = [x[:, c : c + 32].bfloat16().view(50, -1, 16).transpose(0, 1) for c in (0, 32, 64)]
    how = [(10, (20, 15)), (12, (1,))], 8, None, 0.25
    made, stats = t.forward(*parts, *how)
    found += [made.float(), stats, *(g.float() for g in t.backward(*parts, parts[1], stats, *how))]
    halves = x.bfloat16()
    found += [*step(parts), m.multiply(halves, m.lay_out(halves[:32].contiguous())).float()]
    for weight in (x[:32].contiguous(), halves[:32].contiguous()):
        found += [n.times(halves, [weight]).float(), n.times_back(halves[:, :32].contiguous(), [weight]).float()]
    found.append(n.pulled(halves, halves))
print([hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x in found])
"""


ONE_NUMBER = "import itertools; from numba.core.bytecode import FunctionIdentity as F; F._unique_ids = itertools.repeat(7)\n"


def outcome(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, timeout=240, capture_output=True, text=True, env={**os.environ, **environment}).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Where code is kept that was compiled with one number for all functions, and what it did as it was compiled."""
    folder = str(tmp_path_factory.mktemp("kept"))
    return folder, outcome(ONE_NUMBER + SAME_BYTES, PREFTUNE_CACHE=folder)


def test_code_as_compiled_and_code_as_kept_give_the_same_bytes(compiled):
    """Else a run that is killed in its first minute would not go on as it began."""
    folder, found = compiled
    assert outcome(SAME_BYTES, PREFTUNE_CACHE=folder) == found


def test_functions_are_told_apart_by_their_names(compiled):
    """Compiled functions are linked by name, with a number that counts from one in each process; code that was kept brings its numbers.

    Of two different functions by one name and number, one would run for both: so the names alone must do.
    """
    assert outcome(SAME_BYTES) == compiled[1]


def test_without_a_place_to_keep_code_it_is_compiled_for_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "file"))
    code = "import torch; from preftune.kernels import find; x = torch.ones(2, 32); print(find('pointwise').silu_gated(x, x)[1, 5].item())"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(0.7310586)


def test_threads_that_compile_at_once_keep_code_in_the_users_folder_alone(monkeypatch):
    """Code of one landed in the current folder when the other had ended and set numba's setting back."""
    from preftune.kernels import launch

    numba, before = launch.numba, launch.numba.config.CACHE_DIR
    where = {}

    def cfunc(*given, **options):
        def compile_slowly(seconds):
            time.sleep(seconds)
            where[seconds] = numba.config.CACHE_DIR

        return compile_slowly

    monkeypatch.setattr(numba, "cfunc", cfunc)
    monkeypatch.setattr(launch, "_folder", lambda: "the user's")
    threads = [threading.Thread(target=launch._compiled, args=(seconds,)) for seconds in (0.05, 0.3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert where == {0.05: "the user's", 0.3: "the user's"} and before == numba.config.CACHE_DIR


OPEN_TO_ALL = """
import sys
from pathlib import Path
from preftune.kernels import launch
real = Path.mkdir
Path.mkdir = lambda self, *args, **options: (real(self, *args, **options), self.chmod(0o777))
import torch
from preftune import kernels
x = torch.ones(2, 32)
kernels.find("pointwise").silu_gated(x, x)
print(len(list(Path(sys.argv[1]).rglob("*.nb?"))))
"""


def test_code_is_not_kept_nor_read_where_others_may_write(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", OPEN_TO_ALL, str(tmp_path)], check=True, timeout=120, capture_output=True, text=True)
    assert int(done.stdout) == 0


def test_damaged_code_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    run = lambda: subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=120, capture_output=True, text=True).stdout
    run()
    for path in tmp_path.rglob("*.nb[ci]"):
        path.write_bytes(path.read_bytes()[:100])
    assert "_gated32" in run()


def test_parts_and_rows_are_each_taken_once_by_several_threads():
    from numba import njit

    from preftune.kernels import launch, tiles

    @njit
    def mark(address):
        ask = launch.given(address)
        while True:
            part = launch.next_part(address)
            if part >= ask[2]:
                break
            tiles.at64(ask[0])[part] += 1
        first, last = launch.my_share(address, ask[2])
        for row in range(first, last):
            tiles.at64(ask[1])[row] += 1

    def marked(address):
        mark(address)

    parts, rows = torch.zeros(2, 5001, dtype=torch.int64)
    kernel = launch.Kernel(marked)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            kernel(parts.data_ptr(), rows.data_ptr(), len(rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(parts, torch.full_like(parts, 20)) and torch.equal(rows, parts)


def test_kernels_use_the_widest_vectors_of_the_cpu():
    import numba

    from preftune.kernels import launch, pointwise
    from preftune.kernels.cpu import has

    library = numba.cfunc(launch._SIGNATURE, **launch._OPTIONS)(pointwise._gated32)._library
    assert '"prefer-vector-width"="512"' in library.get_llvm_str()
    assert ("zmm" in library.get_asm_str()) == has("avx512f")  # LLVM's own choice on many CPUs that have them is half of that
