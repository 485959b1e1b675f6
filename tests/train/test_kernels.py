"""The passes over the vocabulary: torch's against their definition, Triton's against the readable loss.

Shapes: n rows, k largest, V vocabulary, D hidden.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from logitcache_train.atoms import build_support
from logitcache_train.head import Head
from logitcache_train.kernels import eager, tail
from logitcache_train.kernels.tail import DenseAtoms, TailFactors, choose_passes, largest

BETA, CAP, SCALE = 0.7, 4.0, 1.5


@pytest.fixture
def chunk():
    """Products of five rows over 37 tokens, the labels as the support."""
    g = torch.Generator().manual_seed(0)
    head = Head(torch.empty(37, 1), torch.randn(37, generator=g), SCALE, CAP)
    labels_n = torch.tensor([0, 36, 5, 5, 20])
    return 3 * torch.randn(5, 37, generator=g), head, build_support(labels_n, None, 37, torch.float32), labels_n


def tail_of(chunk):
    """By the definition, in float64: the logits outside S of each row and their derivative at the product."""
    products_nV, head, _, labels_n = chunk
    products_nV = products_nV.double().requires_grad_()
    z_nV = CAP * (SCALE * (products_nV + head.bias_V.double()) / CAP).tanh()
    (slope_nV,) = torch.autograd.grad(z_nV.sum(), products_nV)
    outside_nV = torch.arange(37) != labels_n[:, None]
    return z_nV.detach(), slope_nV, outside_nV


@pytest.mark.parametrize("rows_per_block", [1, 2, 5, 100])
def test_eager_passes_follow_their_definition(chunk, rows_per_block, monkeypatch):
    monkeypatch.setattr(eager, "BLOCK_BYTES", rows_per_block * 37 * 4)
    products_nV, head, support, _ = chunk
    z_nV, slope_nV, outside_nV = tail_of(chunk)
    passes = choose_passes(head, DenseAtoms(uniform=True, beta=BETA), max_rows=5)
    assert isinstance(passes, eager.EagerTail)
    assert passes.work_bytes == 3 * 4 * 37 * min(rows_per_block, 5)

    sums = passes.reduce(products_nV, support)
    max_n = z_nV.masked_fill(~outside_nV, -torch.inf).amax(-1)
    u_nV = z_nV - max_n[:, None]
    expected = {
        "max_n": max_n,
        "exp_n": (u_nV.exp() * outside_nV).sum(-1),
        "z_n": (u_nV * outside_nV).sum(-1),
        "sharp_n": ((u_nV / BETA).exp() * outside_nV).sum(-1),
        "sharp_z_n": ((u_nV / BETA).exp() * u_nV * outside_nV).sum(-1),
    }
    for name, value_n in expected.items():
        torch.testing.assert_close(getattr(sums, name).double(), value_n, rtol=1e-5, atol=1e-6)
    top_nk = z_nV.masked_fill(~outside_nV, -torch.inf).topk(4).values
    torch.testing.assert_close(passes.largest(products_nV, support, 4).double(), top_nk, rtol=1e-5, atol=1e-6)

    factors = TailFactors(*(torch.arange(5.0) + i for i in range(3)))
    passes.write_gradient(products_nV, support, sums, factors)
    exp_n1, uniform_n1, sharp_n1 = (f[:, None].double() for f in (factors.exp_n, factors.uniform_n, factors.sharp_n))
    g_nV = slope_nV * (exp_n1 * u_nV.exp() - uniform_n1 - sharp_n1 * (u_nV / BETA).exp())
    torch.testing.assert_close(products_nV.double()[outside_nV], g_nV[outside_nV], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 1003, 4 * 128, 30 * 128 + 5])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_largest_of_tiles_are_the_largest(num_tokens, k):
    g = torch.Generator().manual_seed(num_tokens)
    # Few distinct values, so that tiles tie, and one row whose largest all share a tile.
    z_nV = torch.randint(50, (6, num_tokens), generator=g).float()
    z_nV[0, : min(num_tokens, 25)] += 100
    z_nV[1, num_tokens // 2 :] = -torch.inf
    assert torch.equal(largest(z_nV, k), z_nV.sort(descending=True).values[:, :k])


def test_a_cuda_head_gets_the_triton_kernels():
    pytest.importorskip("triton")
    from logitcache_train.kernels.triton_tail import TritonTail

    head = Head(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16), None, 1.0, None)
    assert isinstance(choose_passes(head, DenseAtoms(uniform=False, beta=None), max_rows=1), TritonTail)


def test_cuda_without_triton_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(tail.importlib.util, "find_spec", lambda name: None)
    tail._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not tail._has_triton() and not tail._has_triton()
    tail._has_triton.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [tail.NO_TRITON]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_kernels_compile_for_cuda(dtype, everything, tmp_path, monkeypatch):
    """No GPU is needed to compile for one; a tile is read by whole vectors where rows are aligned."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from logitcache_train.kernels import triton_tail

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this triton has no backend for CUDA")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    constants = {"SCALE": 1.5, "UNIFORM": everything, "TILE": triton_tail.TILE}
    constants |= {"SOFTCAP": 30.0, "BETA": 0.7} if everything else {"SOFTCAP": None, "BETA": None}
    if not everything:
        constants |= dict.fromkeys(("bias_ptr", "uniform_ptr", "sharp_ptr"))
    for kernel in (triton_tail._reduce_kernel, triton_tail._gradient_kernel):
        names = kernel.arg_names
        types = {"z_ptr": f"*{dtype}", "num_rows": "i32", "num_tokens": "i32", "stride": "i32"}
        signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n != "num_rows" and n not in constants
        }
        values = {(names.index(n),): value for n, value in constants.items() if n in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
        options = {"num_warps": triton_tail.NUM_WARPS}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        assert "ld.global.v4" in compiled.asm["ptx"]


def test_triton_kernels_against_the_readable_loss():
    """In a process of its own, because Triton decides when it is first imported whether it interprets."""
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"
    checks = Path(__file__).with_name("kernels_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout
