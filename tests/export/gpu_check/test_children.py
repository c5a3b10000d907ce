"""Each group of rows has a process of its own, and a crash, a hang or a broken GPU costs only the rows that it must."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hunyuan3d_export.gpu_check import children
from hunyuan3d_export.gpu_check.children import rows_of
from hunyuan3d_export.gpu_check.groups import Group
from hunyuan3d_export.gpu_check.rows import Job, Row, Skip
from hunyuan3d_export.gpu_check.setting import Setting

LIMIT = "the limit has passed"


def passes(note: Callable[[], str]) -> Callable[[], Row]:
    return lambda: Row(part="part", name="a row", note=note())


def crash() -> Row:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def leave() -> Row:
    os._exit(3)


def hang() -> Row:
    time.sleep(600)
    raise AssertionError


def fail() -> Row:
    raise RuntimeError("CUDA error: an illegal memory access")


def skip() -> Row:
    raise Skip("no such package")


RUNS: dict[str, Callable[[], Row]] = {
    "first": passes(lambda: str(os.getpid())),
    "crashes": crash,
    "second": passes(lambda: str(os.getpid())),
    "leaves": leave,
    "fails": fail,
    "skips": skip,
    "third": passes(lambda: str(os.getpid())),
    "hangs": hang,
    "late": passes(lambda: "never"),
}


@pytest.fixture
def group_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Group]]:
    """group_of(*names): a group of these jobs, which a process forked from this one finds too."""
    found: list[Group] = []
    fork = children.multiprocessing.get_context("fork")
    monkeypatch.setattr(children.multiprocessing, "get_context", lambda _kind: fork)
    monkeypatch.setattr(children, "groups", lambda _setting: found)

    def make(*names: str) -> Group:
        found.append(Group("group", [Job("part", name, RUNS[name]) for name in names]))
        return found[-1]

    yield make


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    places = {name: tmp_path for name in ("build", "graphs", "work")}
    return Setting(device=torch.device("cpu"), presets=("tiny",), steps=2, attention_length=8, row_s=0.01, **places)


def notes(group: Group, setting: Setting, seconds: float = 60) -> list[str]:
    return [row.note for row in rows_of(group, setting, deadline=time.monotonic() + seconds, limit=LIMIT)]


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def test_a_crash_costs_one_row_and_the_rest_gets_a_new_process(group_of: Callable[..., Group], setting: Setting) -> None:
    first, crashed, second, left, third = notes(group_of("first", "crashes", "second", "leaves", "third"), setting)
    assert crashed == "failed: its process ended with signal SIGKILL"
    assert left == "failed: its process ended with exit code 3"
    assert len({first, second, third, str(os.getpid())}) == 4


def test_failures_and_skips_keep_the_process(group_of: Callable[..., Group], setting: Setting) -> None:
    first, failed, skipped, third = notes(group_of("first", "fails", "skips", "third"), setting)
    assert (failed, skipped) == ("failed: CUDA error: an illegal memory access", "skipped: no such package")
    assert first == third


def test_after_a_broken_gpu_the_rest_gets_a_new_process(
    group_of: Callable[..., Group], setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "_works", lambda _device: False)
    first, failed, third = notes(group_of("first", "fails", "third"), setting)
    assert failed == "failed: CUDA error: an illegal memory access" and first != third


def test_a_hang_is_ended_at_the_deadline(group_of: Callable[..., Group], setting: Setting) -> None:
    start = time.monotonic()
    found = notes(group_of("first", "hangs", "late"), setting, seconds=2)
    assert found[1:] == [f"skipped: {LIMIT}"] * 2 and found[0].isdigit()
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0]), 0)
