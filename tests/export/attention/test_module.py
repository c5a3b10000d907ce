"""The attention module: the effect of every option, the choice of a backend, fallbacks and their log."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hunyuan3d_export.attention import BACKENDS, Backend, Call, EfficientAttention, PeakMemory, function, module

ON_CPU = ("auto", "sdpa", "flash", "chunked", "standard")
Ran = list[tuple[str, int]]


@pytest.fixture(autouse=True)
def forget_logged_reasons() -> None:
    function.log_once.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Which backends ran, with their chunk sizes."""
    found: Ran = []

    def recorded(name: str, backend: Backend) -> Backend:
        def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
            found.append((name, call.chunk_size))
            return backend.run(q, k, v, call)

        return dataclasses.replace(backend, run=run)

    monkeypatch.setattr(module, "BACKENDS", {name: recorded(name, backend) for name, backend in BACKENDS.items()})
    return found


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, Call], bool], error: Exception) -> Ran:
    """Every backend whose call `fails` raises `error` instead; returns the attempts."""
    attempts: Ran = []

    def broken(name: str, backend: Backend) -> Backend:
        def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
            attempts.append((name, call.chunk_size))
            if fails(name, call):
                raise error
            return backend.run(q, k, v, call)

        return dataclasses.replace(backend, run=run)

    monkeypatch.setattr(module, "BACKENDS", {name: broken(name, backend) for name, backend in BACKENDS.items()})
    return attempts


def build(seed: int = 0, **options: Any) -> EfficientAttention:
    torch.manual_seed(seed)
    return EfficientAttention(**{"d_model": 24, "num_heads": 3, "d_head": 8, **options}).eval()


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / (1 + expected.norm()))


def expected_output(
    layer: EfficientAttention, query: Tensor, key: Tensor, value: Tensor, added: Tensor | float = 0.0
) -> Tensor:
    """The module by its definition, in the inputs' precision, without dropout."""
    heads = []
    size = layer.to_q.out_features // layer.num_heads
    for h in range(layer.num_heads):
        rows = slice(h * size, (h + 1) * size)
        q, k, v = query @ layer.to_q.weight[rows].T, key @ layer.to_k.weight[rows].T, value @ layer.to_v.weight[rows].T
        heads.append(torch.softmax(q @ k.transpose(1, 2) / size**0.5 + added, dim=-1) @ v)
    return torch.cat(heads, dim=-1) @ layer.to_out[0].weight.T + layer.to_out[0].bias


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
    heads=st.integers(1, 4),
    d_head=st.sampled_from([2, 8, 24]),
    cross=st.booleans(),
    biased=st.booleans(),
    chunk_size=st.integers(1, 32),
)
def test_equals_its_definition(
    backend: str, sizes: tuple[int, int, int], heads: int, d_head: int, cross: bool, biased: bool, chunk_size: int
) -> None:
    batch, queries, keys = sizes
    layer = build(
        num_heads=heads, d_head=d_head, backend=backend, chunk_size=chunk_size, d_context=10 if cross else None
    ).double()
    query = torch.randn(batch, queries, 24, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(batch, keys, 10, dtype=torch.float64) for _ in range(2)) if cross else (query, query)
    bias = torch.randn(queries, key.shape[1], dtype=torch.float64) if biased else None
    found = layer(query, *((key, value) if cross else ()), bias=bias)
    expected = expected_output(layer, query, key, value, 0.0 if bias is None else bias)
    assert distance(found, expected) <= 1e-12
    parameters = [query, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        assert distance(one, other) <= 1e-12


def test_value_defaults_to_key() -> None:
    layer, query, key = build(), torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    assert torch.equal(layer(query, key), layer(query, key, key))
    assert not torch.equal(layer(query, key), layer(query, key, key + 1))
    assert torch.equal(layer(query), layer(query, query, query))


@pytest.mark.parametrize("backend", ON_CPU)
def test_masks_and_causality_reach_the_kernel(backend: str) -> None:
    layer, query = build(backend=backend, chunk_size=2), torch.randn(2, 5, 24)
    padding = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = layer(query, mask=padding)
    torch.testing.assert_close(found[:1], layer(query[:1], query[:1, :3]))
    torch.testing.assert_close(found[1:], layer(query[1:]))
    causal = layer(query, causal=True)
    torch.testing.assert_close(causal[:, 0], layer(query[:, :1])[:, 0])
    torch.testing.assert_close(causal, layer(query, mask=torch.ones(1, 5, 5, dtype=torch.bool).tril()))
    blind = layer(query, mask=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(blind, layer.to_out[0].bias.expand_as(blind))  # the heads give zeros


class TestEveryOptionDoesSomething:
    def test_sizes(self) -> None:
        layer = EfficientAttention(d_model=24, num_heads=3, d_head=5, d_context=10)
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        assert shapes == {
            "to_q.weight": (15, 24),
            "to_k.weight": (15, 10),
            "to_v.weight": (15, 10),
            "to_out.0.weight": (24, 15),
            "to_out.0.bias": (24,),
        }
        assert EfficientAttention(24, 3, 5).to_k.in_features == 24

    def test_num_heads_splits_the_width(self) -> None:
        query = torch.randn(1, 6, 24)
        assert not torch.allclose(build(num_heads=3, d_head=8)(query), build(num_heads=4, d_head=6)(query))

    def test_dropout_is_off_in_eval(self) -> None:
        query = torch.randn(2, 6, 24)
        assert torch.equal(build(dropout=0.5)(query), build(dropout=0.0)(query))

    @torch.no_grad()
    def test_dropout_falls_on_weights_and_on_outputs(self) -> None:
        layer, query = build(dropout=0.4), torch.randn(1, 50, 24)
        exact = layer(query)
        layer.train()
        found = torch.stack([layer(query) for _ in range(300)])
        dropped = found == 0  # the output's own dropout
        assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.01)
        assert float((found.mean(0) - exact).norm() / exact.norm()) < 0.15  # the mean is right
        kept = found[:, 0, 0, 0][~dropped[:, 0, 0, 0]]
        assert float(kept.std()) > 1e-3  # kept outputs vary, because weights are dropped too
        layer.to_out[1].p = 0.0
        weights_only = layer(query)
        assert not bool((weights_only == 0).any()) and not torch.allclose(weights_only, exact)

    def test_chunk_size(self, ran: Ran) -> None:
        query = torch.randn(1, 40, 24)
        for chunk_size in (7, 64):
            build(chunk_size=chunk_size, backend="chunked")(query)
        assert ran == [("chunked", 7), ("chunked", 64)]

    @pytest.mark.parametrize("backend", ["sdpa", "flash", "chunked", "standard"])
    def test_backend(self, ran: Ran, backend: str) -> None:
        build(backend=backend)(torch.randn(1, 4, 24))
        assert [name for name, _ in ran] == [backend]

    def test_fall_back(self) -> None:
        query = torch.randn(1, 4, 24)
        build(backend="flash", dropout=0.5).train()(query)
        with pytest.raises(ValueError, match="backend flash must get no dropout on the CPU, got 0.5\nhint: fall_back=True"):
            build(backend="flash", dropout=0.5, fall_back=False).train()(query)

    def test_monitor_memory(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        query = torch.randn(1, 40, 24)
        build(backend="chunked", chunk_size=16)(query)
        assert caplog.records == []
        build(backend="chunked", chunk_size=16, monitor_memory=True)(query, torch.randn(1, 30, 24))
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert "attention chunked(16), 40 queries, 30 keys: estimated 0.0 MiB, peak" in record.getMessage()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_model": 0}, "d_model must be at least 1, got 0"),
            ({"num_heads": -1}, "num_heads must be at least 1"),
            ({"d_head": 0}, "d_head must be at least 1"),
            ({"d_context": 0}, "d_context must be at least 1, got 0"),
            ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
            ({"chunk_size": 0}, "chunk_size must be at least 1"),
            ({"backend": "fast"}, "backend must be one of auto, sdpa, flash, chunked, standard, sage, got 'fast'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build(**options)

    def test_bias_of_the_constructor_is_told_where_it_belongs(self) -> None:
        for bias in (True, torch.zeros(5, 5)):
            with pytest.raises(ValueError, match=r"(?s)attention_bias must be given to a call, got .*hint: layer\(query, bias"):
                build(attention_bias=bias)

    def test_inputs(self) -> None:
        layer, query = build(), torch.randn(2, 5, 24)
        with pytest.raises(ValueError, match="key must be given with value"):
            layer(query, value=query)
        with pytest.raises(ValueError, match=r"query, key and value must be .* got \[2, 5, 24\], \[3, 5, 24\], \[3, 5, 24\]"):
            layer(query, torch.randn(3, 5, 24))
        with pytest.raises(ValueError, match="query, key and value must be"):
            layer(query, query, torch.randn(2, 4, 24))
        with pytest.raises(ValueError, match=r"mask must be \[Lq, Lk\]"):
            layer(query, mask=torch.ones(2, 4, dtype=torch.bool))
        for shape in ((4,), (2, 5, 5), (1, 2, 3, 5, 5)):
            with pytest.raises(ValueError, match=r"bias must broadcast to \[B, H, Lq, Lk\] = \[2, 3, 5, 5\], got"):
                layer(query, bias=torch.zeros(shape))
        for fits in ((5,), (5, 1), (3, 5, 5), (2, 1, 1, 5)):
            layer(query, bias=torch.zeros(fits))


def tensor_on(device: str, dtype: torch.dtype, queries: int = 4, size: int = 64) -> Any:
    """A stand-in with the attributes of a tensor that the choice reads, for devices that this machine lacks."""
    place = types.SimpleNamespace(type=device)
    return types.SimpleNamespace(device=place, dtype=dtype, shape=torch.Size((1, 16, queries, size)), requires_grad=False)


class TestChoice:
    @pytest.mark.parametrize(
        ("device", "dtype", "queries", "masked", "dropout", "expected"),
        [
            ("cuda", torch.float16, 4096, False, 0.0, "flash"),
            ("cuda", torch.bfloat16, 4, False, 0.1, "flash"),
            ("cuda", torch.float16, 4096, True, 0.0, "sdpa"),
            ("cuda", torch.float32, 4096, False, 0.0, "sdpa"),
            ("cuda", torch.float64, 4096, False, 0.0, "chunked"),
            ("cuda", torch.float64, 100, False, 0.0, "standard"),
            ("cpu", torch.float32, 4096, True, 0.0, "sdpa"),
            ("cpu", torch.float32, 100, False, 0.0, "sdpa"),
            ("cpu", torch.float32, 4096, False, 0.1, "chunked"),
            ("cpu", torch.float32, 100, True, 0.1, "standard"),
            ("xpu", torch.float16, 4096, False, 0.0, "chunked"),
        ],
    )
    def test_by_device_type_length_mask_and_dropout(
        self, device: str, dtype: torch.dtype, queries: int, masked: bool, dropout: float, expected: str
    ) -> None:
        q = tensor_on(device, dtype, queries)
        call = Call(None, torch.ones(1, 1, 1, 1) if masked else None, False, dropout, 512)
        assert build().choose(q, q, q, call) == expected

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize(
        ("mask", "length", "expected"),
        [
            ((1, 16, 4096, 4096), 4096, "chunked"),
            ((1, 16, 256, 256), 256, "sdpa"),
            ((1, 1, 4096, 4096), 4096, "sdpa"),
            ((1, 1, 2**17, 2**17), 2**17, "chunked"),
        ],
    )
    def test_mask_that_makes_sdpa_quadratic(self, device: str, mask: tuple[int, ...], length: int, expected: str) -> None:
        q = tensor_on(device, torch.float32, length)
        call = Call(None, torch.empty(mask, dtype=torch.bool, device="meta"), False, 0.0, 512)
        assert build().choose(q, q, q, call) == expected

    @pytest.mark.parametrize(
        ("queries", "keys", "expected"),
        [
            (512, 512, ("standard", 512)),
            (512, 513, ("chunked", 512)),
            (2000, 20, ("standard", 512)),
            (512, 60_000, ("chunked", 64)),
            (4096, 4096, ("chunked", 512)),
            (8192, 8192, ("chunked", 512)),
            (16384, 16384, ("chunked", 256)),
        ],
    )
    def test_queries_times_keys_decide_without_a_fused_kernel(self, queries: int, keys: int, expected: tuple[str, int]) -> None:
        layer, call = build(), Call(None, None, False, 0.1, 512)
        q, k = tensor_on("cpu", torch.float32, queries), tensor_on("cpu", torch.float32, keys)
        assert (layer.choose(q, k, k, call), layer._first_chunk(k)) == expected
        assert build(backend="chunked")._first_chunk(k) == 512  # the caller's own choice stands

    def test_learned_bias_in_training(self, ran: Ran) -> None:
        layer, query = build(chunk_size=16), torch.randn(1, 40, 24)
        bias = torch.zeros(40, 40, requires_grad=True)
        layer(query, bias=bias).sum().backward()
        with torch.no_grad():
            layer(query, bias=bias)
        assert bias.grad is not None and [name for name, _ in ran] == ["chunked", "sdpa"]

    def test_sage_where_the_environment_wants_it_and_it_can(self, monkeypatch: pytest.MonkeyPatch) -> None:
        package = types.ModuleType("sageattention")
        package.sageattn = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "sageattention", package)
        q = tensor_on("cuda", torch.float16)
        call, dropped = Call(None, None, False, 0.0, 512), Call(None, None, False, 0.1, 512)
        monkeypatch.setenv("USE_SAGEATTN", "1")
        layer = build()
        monkeypatch.delenv("USE_SAGEATTN")
        assert layer.choose(q, q, q, call) == "sage"  # the layer read the variable when it was built
        assert layer.choose(q, q, q, dropped) == "flash"
        assert build().choose(q, q, q, call) == "flash"
        monkeypatch.setitem(sys.modules, "sageattention", None)
        assert layer.choose(q, q, q, call) == "flash"


class TestFallbacks:
    def test_chain_in_order_with_halved_chunks(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        attempts = failing(monkeypatch, lambda name, _: name != "standard", torch.OutOfMemoryError("CUDA out of memory.\nmore"))
        layer, query = build(backend="flash", chunk_size=200), torch.randn(1, 40, 24)
        found = layer(query)
        assert attempts == [("flash", 200), ("sdpa", 200), *(("chunked", n) for n in (200, 100, 50)), ("standard", 200)]
        messages = [record.getMessage() for record in caplog.records]
        assert messages == [
            f"attention falls back from {one} to {other}: OutOfMemoryError: CUDA out of memory."
            for one, other in zip(
                ["flash", "sdpa", "chunked(200)", "chunked(100)", "chunked(50)"],
                ["sdpa", "chunked(200)", "chunked(100)", "chunked(50)", "standard"],
                strict=True,
            )
        ]
        layer(query)
        assert len(caplog.records) == len(messages)  # each fallback is logged only once
        monkeypatch.setattr(module, "BACKENDS", BACKENDS)
        torch.testing.assert_close(found, layer(query))

    @pytest.mark.parametrize("error", [RuntimeError("No available kernel."), MemoryError()])
    def test_missing_kernel_and_memory(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        attempts = failing(monkeypatch, lambda name, _: name == "sdpa", error)
        build(chunk_size=16)(torch.randn(1, 40, 24))
        assert attempts == [("sdpa", 16), ("chunked", 16)]

    def test_halved_chunk_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fails = lambda name, call: name == "chunked" and call.chunk_size > 40  # noqa: E731
        attempts = failing(monkeypatch, fails, torch.OutOfMemoryError("out of memory"))
        build(backend="chunked", chunk_size=128)(torch.randn(1, 40, 24))
        assert attempts == [("chunked", 128), ("chunked", 64), ("chunked", 32)]

    def test_last_error_is_the_callers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        failing(monkeypatch, lambda *_: True, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            build()(torch.randn(1, 4, 24))

    def test_none_when_not_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attempts = failing(monkeypatch, lambda *_: True, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            build(fall_back=False)(torch.randn(1, 4, 24))
        assert len(attempts) == 1

    def test_sage_without_its_package(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setitem(sys.modules, "sageattention", None)
        query = torch.randn(1, 4, 24)
        assert torch.equal(build(backend="sage")(query), build(backend="flash")(query))
        assert [record.getMessage() for record in caplog.records] == [
            'attention falls back from sage to flash: it must get its package: Please install "sageattention"'
        ]
        with pytest.raises(ImportError, match='Please install "sageattention"'):
            build(backend="sage", fall_back=False)

    def test_environment_that_has_no_effect_is_logged_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "sageattention", None)
        monkeypatch.setenv("USE_SAGEATTN", "1")
        build(), build()
        assert [record.getMessage() for record in caplog.records] == [
            'attention does without sage, although USE_SAGEATTN is 1: Please install "sageattention"'
        ]

    def test_standard_goes_on_with_chunked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fails = lambda name, call: name == "standard" or call.chunk_size > 64  # noqa: E731
        attempts = failing(monkeypatch, fails, torch.OutOfMemoryError("out of memory"))
        build(backend="standard", chunk_size=256)(torch.randn(1, 40, 24))
        assert attempts == [("standard", 256), ("chunked", 256), ("chunked", 128), ("chunked", 64)]

    @pytest.mark.parametrize(
        ("options", "queries", "keys", "room_mib"),
        [('backend="standard"', 4096, 4096, 300), ("dropout=0.1", 512, 60_000, 400)],
        ids=["standard", "auto with dropout"],
    )
    def test_under_a_real_limit_of_memory(self, options: str, queries: int, keys: int, room_mib: int) -> None:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED.format(options=options, queries=queries, keys=keys, room_mib=room_mib)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"[1, {queries}, 16] True"


# The scores take 4 heads x Lq x Lk x 4 bytes, 256 or 469 MiB, and the weights as much again: neither fits the limit.
LIMITED = """
import resource, torch
from pathlib import Path
from hunyuan3d_export.attention import EfficientAttention
torch.set_num_threads(1)
layer = EfficientAttention(16, 4, 16, {options})
query, key = torch.randn(1, {queries}, 16), torch.randn(1, {keys}, 16)
layer(query[:, :40], key[:, :40])
used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + {room_mib} * 2**20,) * 2)
out = layer(query, key)
print(list(out.shape), bool(out.isfinite().all()))
"""


class TestMemory:
    def test_peak_of_this_process(self) -> None:
        script = """
import torch
from hunyuan3d_export.attention.memory import PeakMemory
kept = torch.ones(40 * 2**18)  # 40 MiB from before do not count
with PeakMemory(torch.device("cpu")) as peak:
    x = torch.ones(100 * 2**18)  # 100 MiB, freed before the end
    del x
    y = torch.ones(30 * 2**18)
print(peak.bytes is None or 95 < peak.bytes / 2**20 < 120, peak.bytes)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("True"), done.stdout

    def test_unknown_where_nothing_tells(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr("hunyuan3d_export.attention.memory._CLEAR_REFS", types.SimpleNamespace(write_text=forbidden))
        with PeakMemory(torch.device("cpu")) as peak:
            pass
        assert peak.bytes is None
        caplog.set_level(logging.INFO)
        build(monitor_memory=True)(torch.randn(1, 4, 24))
        assert caplog.records[-1].getMessage().endswith("peak unknown")


def forbidden(_: str) -> None:
    raise PermissionError
