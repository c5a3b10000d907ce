"""Every backend computes the same attention under every mask, bias, causality and dropout that it accepts."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hunyuan3d_export.attention import BACKENDS, Call, attention, estimate_bytes, function

# The backends that run on a CPU. `sage` needs CUDA and its package, so only its choice and its refusals are tested.
ON_CPU = ("sdpa", "flash", "chunked", "standard")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
MASKS = ("none", "padding", "pairs bool", "pairs additive", "batch bool", "batch additive", "heads bool", "heads additive")


@pytest.fixture(autouse=True)
def forget_logged_reasons() -> None:
    function.log_once.cache_clear()


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn call: the sizes (B, H, Lq, Lk, D), and the mask, bias and causality that change the scores."""

    sizes: tuple[int, int, int, int, int]
    mask: str
    bias_axes: tuple[bool, bool, bool, bool] | None  # True for an axis of full size, False for size 1
    causal: bool
    chunk_size: int
    seed: int
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        batch, heads, queries, keys, size = self.sizes
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        found = {"q": normal(batch, heads, queries, size)}
        found |= {name: normal(batch, heads, keys, size) for name in "kv"}
        if self.bias_axes is not None:
            full = (batch, heads, queries, keys)
            found["bias"] = normal(*(n if axis else 1 for n, axis in zip(full, self.bias_axes, strict=True)))
        return found

    def keep(self) -> Tensor | None:
        """The mask in its bool form, or None. With probability 1/2 the first row sees no key at all."""
        batch, heads, queries, keys, _ = self.sizes
        generator = torch.Generator().manual_seed(self.seed + 1)
        kind = self.mask.split()[0]
        if kind == "none":
            return None
        shape = {
            "padding": (batch, keys),
            "pairs": (queries, keys),
            "batch": (batch, queries, keys),
            "heads": (batch, heads, queries, keys),
        }[kind]
        keep = torch.rand(shape, generator=generator) < 0.6
        if torch.rand((), generator=generator) < 0.5:
            keep[..., 0, :] = False
        return keep

    def mask_argument(self) -> Tensor | None:
        keep = self.keep()
        if keep is None or not self.mask.endswith("additive"):
            return keep
        slopes = torch.linspace(-1, 1, keep.shape[-1], dtype=self.dtype)
        return torch.where(keep, slopes, torch.full((), -torch.inf, dtype=self.dtype))


def reference(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """Attention by its definition, one query at a time, in float64."""
    batch, heads, queries, keys, size = case.sizes
    q, k, v = (tensors[name].double() for name in "qkv")
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    added = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    keep, mask = case.keep(), case.mask_argument()
    if keep is not None and mask is not None:
        axes: Callable[[Tensor], Tensor] = {
            "padding": lambda x: x[:, None, None],
            "pairs": lambda x: x,
            "batch": lambda x: x[:, None],
            "heads": lambda x: x,
        }[case.mask.split()[0]]
        seen = seen & axes(keep)
        if mask.is_floating_point():
            added = added + torch.where(axes(keep), axes(mask).double(), 0.0)
    if "bias" in tensors:
        added = added + tensors["bias"].double()
    if case.causal:
        seen = seen & (torch.arange(keys) <= torch.arange(queries)[:, None])
    rows = []
    for i in range(queries):
        scores = (q[:, :, i, None, :] * k).sum(-1) / size**0.5 + added[:, :, i]
        weights = torch.where(seen[:, :, i], torch.exp(scores - scores.max()), 0.0)
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0)
        rows.append((weights[..., None] * v).sum(-2))  # [B, H, D]
    return torch.stack(rows, dim=1).flatten(2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    mask = draw(st.sampled_from(MASKS))
    # With B = Lq a bool mask of two axes could be [B, Lk] or [Lq, Lk], so attention refuses it.
    if mask == "padding" and batch > 1 and batch == queries:
        queries += 1
    if mask == "pairs bool" and batch > 1 and batch == queries:
        queries += 1
    return Case(
        sizes=(batch, heads, queries, keys, draw(st.sampled_from([1, 3, 8, 16, 40, 64]))),
        mask=mask,
        bias_axes=draw(st.none() | st.tuples(*[st.booleans()] * 4)),
        causal=draw(st.booleans()),
        chunk_size=draw(st.integers(1, 24)),
        seed=draw(st.integers(0, 2**20)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
    )


def distance(found: Tensor, expected: Tensor, terms: float = 0.0) -> float:
    """terms: the size of what cancels in the expected tensor, where something does."""
    return float((found.double() - expected.double()).norm() / (1 + terms + expected.double().norm()))


def run(case: Case, backend: str, tensors: dict[str, Tensor]) -> Tensor:
    return attention(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        tensors.get("bias"),
        mask=case.mask_argument(),
        causal=case.causal,
        backend=backend,
        chunk_size=case.chunk_size,
    )


def gradients(case: Case, backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # The flash kernel refuses a bias that needs a gradient.
    tracked = {name: x.clone().requires_grad_(not (name == "bias" and backend == "flash")) for name, x in tensors.items()}
    out = run(case, backend, tracked)
    (out * incoming(out)).sum().backward()
    return {name: x.grad for name, x in tracked.items() if x.grad is not None}


def incoming(out: Tensor) -> Tensor:
    """The gradient of the loss with respect to the output."""
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=60, deadline=None)
# One key is left, so the gradient of q is 0: the difference of two equal terms, each of which is rounded.
@example(case=Case((2, 2, 15, 3, 64), "padding", None, False, 1, 1, torch.float32))
@given(case=cases())
def test_backends_compute_the_definition_and_its_gradients(backend: str, case: Case) -> None:
    tensors, tolerance = case.tensors(), TOLERANCE[case.dtype]
    found = run(case, backend, tensors)
    assert found.dtype == case.dtype and not found.isnan().any()
    assert distance(found, reference(case, tensors)) <= tolerance
    assert distance(found, run(case, "standard", tensors)) <= tolerance
    expected = gradients(case, "standard", tensors)
    for name, gradient in gradients(case, backend, tensors).items():
        assert not gradient.isnan().any(), name
        terms = 0.0 if name == "v" else float(incoming(found).norm())  # those of q, k and the bias pass the softmax
        assert distance(gradient, expected[name], terms) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ON_CPU)
def test_half_precision_stays_near_float64(backend: str, dtype: torch.dtype) -> None:
    case = Case((2, 2, 30, 20, 16), "pairs bool", (False, True, True, True), False, 7, 3, torch.float64)
    tensors = {name: x.to(dtype) for name, x in case.tensors().items()}
    found = run(case, backend, tensors)
    assert found.dtype == dtype
    assert distance(found, reference(case, tensors)) < (2e-3 if dtype == torch.float16 else 2e-2)


@pytest.mark.parametrize("backend", ON_CPU)
def test_large_scores_do_not_overflow_in_half_precision(backend: str) -> None:
    q = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)  # q k^T is 102400, over float16's 65504; divided by 8 it fits
    v = torch.randn(1, 1, 3, 64, generator=torch.Generator().manual_seed(0)).half()
    out = attention(q, q, v, backend=backend)
    torch.testing.assert_close(out[0, 0], v.mean(2)[0, 0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_float32_bias_of_a_half_precision_call(backend: str, learned: bool, dropout: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(2, 6, 6, generator=generator).requires_grad_(learned)
    call = {"dropout": dropout, "backend": backend, "fall_back": True}  # flash takes neither dropout nor a learned bias
    torch.manual_seed(0)
    found = attention(q, k, v, bias, **call)
    torch.manual_seed(0)
    assert torch.equal(found, attention(q, k, v, bias.to(dtype), **call))
    assert found.dtype == dtype
    found.float().sum().backward()
    assert q.grad is not None and (not learned or (bias.grad is not None and bias.grad.dtype == torch.float32))


def test_bias_that_is_no_number_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="bias must be floating-point, got torch.bool\nhint: mask= takes bool"):
        attention(q, q, q, torch.ones(4, 4, dtype=torch.bool))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("additive", [False, True])
def test_query_that_sees_no_key_gets_zeros_and_gives_no_gradient(backend: str, additive: bool) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    given = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~mask, -torch.inf) if additive else mask
    out = attention(q, k, v, mask=given, backend=backend)
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2])) and bool((out[:, 1] != 0).all())
    out.sum().backward()
    assert q.grad is not None and torch.equal(q.grad[:, :, 2], torch.zeros_like(q.grad[:, :, 2]))
    assert all(x.grad is not None and not x.grad.isnan().any() for x in (q, k, v))


@pytest.mark.parametrize("backend", ON_CPU)
def test_wholly_padded_sample_gets_zeros(backend: str) -> None:
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    out = attention(q, k, v, mask=torch.tensor([[True] * 5, [False] * 5]), backend=backend)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1], v[:1], backend=backend))


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "standard"])
def test_dropout_is_statistically_right(backend: str) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 600, 8), torch.randn(1, 4, 50, 8)
    v = torch.ones(1, 4, 50, 8)  # so the output is the sum of the kept weights, divided by 1 - p
    kept = attention(q, k, v, dropout=0.3, backend=backend, chunk_size=64)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)
    weights = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1)
    spread = weights.square().sum(-1) * 0.3 / 0.7  # the variance of that sum for each query
    assert float((kept[..., ::8] - 1).square().mean()) == pytest.approx(float(spread.mean()), rel=0.1)


def test_dropout_of_the_backward_pass_is_that_of_the_forward_pass() -> None:
    q, k = (torch.randn(1, 1, 40, 8, dtype=torch.float64) for _ in range(2))
    v = torch.randn(1, 1, 40, 8, dtype=torch.float64, requires_grad=True)
    out = attention(q, k, v, dropout=0.5, backend="chunked", chunk_size=7)
    out.sum().backward()
    assert v.grad is not None
    # The output is linear in v, so its sum is the gradient times v, if both passes drop the same weights.
    assert float((v.grad * v.detach()).sum()) == pytest.approx(float(out.detach().sum()), rel=1e-12)


@pytest.mark.parametrize("length", [4096])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's high-water mark")
def test_chunked_needs_a_seventh_of_standards_memory(length: int) -> None:
    chunked, standard = measure("chunked", length), measure("standard", length)
    scores = 16 * length * length * 4
    assert standard > 1.9 * scores  # holds scores and weights at once, so a smaller number would be a wrong measurement
    assert chunked <= standard / 7


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is Linux's high-water mark")
def test_chunked_runs_where_standard_does_not_fit() -> None:
    length = 16384
    q = torch.empty(1, 16, length, 64, device="meta")
    call = Call(None, None, False, 0.0, 512)
    if estimate_bytes("standard", q, q, q, call) < psutil.virtual_memory().total:
        pytest.skip("this machine has memory for the whole score matrices of 16384 tokens: 32 GiB")
    assert measure("chunked", length) < 1.3 * estimate_bytes("chunked", q, q, q, call)


MEASURE = """
import json, sys, torch
from hunyuan3d_export.attention import PeakMemory, attention

backend, length = sys.argv[1], int(sys.argv[2])
with torch.no_grad():
    attention(*(torch.randn(1, 16, 64, 64) for _ in range(3)), backend=backend)  # kernels and their buffers are loaded
    q, k, v = (torch.randn(1, 16, length, 64) for _ in range(3))
    with PeakMemory(q.device) as peak:
        out = attention(q, k, v, backend=backend)
print(json.dumps({"bytes": peak.bytes, "finite": bool(out.isfinite().all())}))
"""


def measure(backend: str, length: int) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE, backend, str(length)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["finite"]
    return int(found["bytes"])


class TestMaskForms:
    q = torch.randn(3, 2, 3, 8)

    @pytest.mark.parametrize("shape", [(1, 3, 3), (3, 1, 3), (3, 3, 1), (3, 2, 3, 3), (1, 2, 1, 3), (1, 1, 3, 3)])
    def test_axes_of_one_broadcast(self, shape: tuple[int, ...]) -> None:
        mask = torch.rand(shape) < 0.7
        full = (mask if mask.dim() == 4 else mask[:, None]).expand(3, 2, 3, 3)
        torch.testing.assert_close(attention(self.q, self.q, self.q, mask=mask), attention(self.q, self.q, self.q, mask=full))

    def test_ambiguous_mask_is_refused(self) -> None:
        mask = torch.ones(3, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"mask must be clear, got \[3, 3\] where B = Lq.*\nhint: mask\[:, None, :\]"):
            attention(self.q, self.q, self.q, mask=mask)
        attention(self.q, self.q, self.q, mask=mask.float())  # an additive mask can only be [Lq, Lk]

    @pytest.mark.parametrize("shape", [(4, 3), (3,), (2, 3, 3), (3, 3, 3, 3), (3, 2, 3, 4), (1, 1, 1, 3, 3)])
    def test_mask_that_does_not_fit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"mask must be \[Lq, Lk\].* for B, H, Lq, Lk = \[3, 2, 3, 3\], got torch.bool"):
            attention(self.q, self.q, self.q, mask=torch.ones(shape, dtype=torch.bool))

    def test_integer_mask(self) -> None:
        with pytest.raises(ValueError, match=r"mask must be bool or floating-point, got torch.int64\nhint: mask.bool"):
            attention(self.q, self.q, self.q, mask=torch.ones(3, 3, dtype=torch.int64))


class TestRefusals:
    q = torch.randn(1, 2, 4, 64)

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of sdpa, flash, chunked, standard, sage, got 'fast'"):
            attention(self.q, self.q, self.q, backend="fast")

    @pytest.mark.parametrize(("dropout", "chunk_size"), [(1.0, 8), (-0.1, 8), (float("nan"), 8), (0.0, 0)])
    def test_values_out_of_range(self, dropout: float, chunk_size: int) -> None:
        with pytest.raises(ValueError, match="dropout must be at least 0|chunk_size must be at least 1"):
            attention(self.q, self.q, self.q, dropout=dropout, chunk_size=chunk_size)

    def test_flash_has_no_dropout_on_the_cpu(self, caplog: pytest.LogCaptureFixture) -> None:
        with pytest.raises(ValueError, match="backend flash must get no dropout on the CPU, got 0.5\nhint: backend='sdpa'"):
            attention(self.q, self.q, self.q, dropout=0.5, backend="flash")
        for _ in range(2):
            attention(self.q, self.q, self.q, dropout=0.5, backend="flash", fall_back=True)
        assert [record.getMessage() for record in caplog.records] == [
            "attention falls back from flash to sdpa: it must get no dropout on the CPU, got 0.5"
        ]

    def test_flash_has_no_gradient_of_a_bias(self) -> None:
        bias = torch.zeros(4, 4, requires_grad=True)
        with pytest.raises(ValueError, match="flash must get a bias and mask that need no gradient"):
            attention(self.q, self.q, self.q, bias, backend="flash")
        with torch.no_grad():
            attention(self.q, self.q, self.q, bias, backend="flash")

    @pytest.mark.parametrize(
        ("backend", "q", "call", "reason"),
        [
            ("flash", torch.empty(1, 1, 2, 64, device="meta"), {}, "tensors on cpu or cuda, got meta"),
            ("flash", torch.empty(1, 1, 2, 64), {"v": torch.empty(1, 1, 2, 32)}, "head size 64, got 32"),
            ("flash", "cuda float32", {}, "float16 or bfloat16 on CUDA, got torch.float32"),
            ("flash", "cuda float16", {"bias": torch.zeros(1)}, "neither bias nor mask on CUDA"),
            ("flash", "cuda float16 wide", {}, "heads of at most 256 on CUDA, got 512"),
            ("flash", "cuda float16", {}, None),
            ("sage", "cuda float16", {}, None),
            ("sage", "cuda float32", {}, "float16 or bfloat16 on CUDA, got torch.float32 on cuda"),
            ("sage", "cuda float16", {"dropout": 0.1}, "no bias, mask or dropout"),
            ("sage", "cuda float16 wide", {}, "heads of 64, 96 or 128, got 512"),
            ("sage", "cuda float16 trained", {}, "tensors that need no gradient"),
        ],
    )
    @pytest.mark.usefixtures("sage")
    def test_what_kernels_of_a_gpu_state(self, backend: str, q: Any, call: dict[str, Any], reason: str | None) -> None:
        if isinstance(q, str):  # becomes a stand-in with the attributes of a CUDA tensor that a refusal reads
            words = q.split()
            q = types.SimpleNamespace(
                device=types.SimpleNamespace(type=words[0]),
                dtype=getattr(torch, words[1]),
                shape=(1, 1, 2, 512 if "wide" in words else 64),
                requires_grad="trained" in words,
            )
        terms = Call(call.get("bias"), None, False, call.get("dropout", 0.0), 8)
        found = BACKENDS[backend].refusal(q, q, call.get("v", q), terms)
        assert found is None if reason is None else found is not None and reason in found


class TestSage:
    @pytest.mark.usefixtures("no_sage")
    def test_missing_package_is_named(self) -> None:
        q = torch.randn(1, 2, 4, 64)
        with pytest.raises(ImportError, match='Please install "sageattention"\nhint: pip install sageattention'):
            attention(q, q, q, backend="sage")

    @pytest.mark.usefixtures("no_sage")
    def test_falls_back_without_the_package(self, caplog: pytest.LogCaptureFixture) -> None:
        q = torch.randn(1, 2, 4, 64)
        assert torch.equal(attention(q, q, q, backend="sage", fall_back=True), attention(q, q, q))
        assert 'from sage to sdpa: it must get its package: Please install "sageattention"' in caplog.text

    def test_refuses_the_cpu(self, sage: list[dict[str, Any]]) -> None:
        q = torch.randn(1, 2, 4, 64)
        with pytest.raises(ValueError, match="sage must get float16 or bfloat16 on CUDA, got torch.float32 on cpu"):
            attention(q, q, q, backend="sage")
        assert sage == []

    def test_calls_the_package(self, sage: list[dict[str, Any]]) -> None:
        q = torch.randn(1, 2, 4, 64)
        found = BACKENDS["sage"].run(q, q, q, Call(None, None, True, 0.0, 8))
        assert sage == [{"tensor_layout": "HND", "is_causal": True}]
        torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_fallbacks_are_logged_as_warnings_of_this_module(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.randn(1, 1, 2, 8)
    attention(q, q, q, dropout=0.1, backend="flash", fall_back=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "hunyuan3d_export.attention.function"
