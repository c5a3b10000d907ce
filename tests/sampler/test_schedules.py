"""Both implementations of the schedules against upstream's numbers and each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import schedules
from hypothesis import given
from hypothesis import strategies as st

from hunyuan3d_client import contract
from hunyuan3d_export.dit import reference_sampler
from hunyuan3d_export.dit.config import SCHEDULES

UPSTREAM = {
    ("flow_match", 5): [0, 0.25, 0.5, 0.75, 1, 1],
    ("flow_match", 1): [0, 1],
    ("flow_match", 2): [0, 1, 1],
    ("consistency", 5): [0, 0.1991992, 0.3993994, 0.5995996, 0.7997998, 1],
    ("consistency", 8): [0, 0.1191191, 0.2492492, 0.3693694, 0.4994995, 0.6196196, 0.7497497, 0.8698699, 1],
    ("consistency", 1): [0, 1],
}
SIGMAS = [schedules.sigmas, reference_sampler.sigmas]


@pytest.mark.parametrize("sigmas", SIGMAS, ids=["served", "reference"])
@pytest.mark.parametrize(("schedule", "steps"), UPSTREAM)
def test_upstreams_numbers(sigmas: Callable[..., list[float]], schedule: str, steps: int) -> None:
    np.testing.assert_allclose(sigmas(schedule, steps), UPSTREAM[schedule, steps], rtol=0, atol=1e-6 / 2)


def test_consistency_takes_points_of_the_distilled_grid() -> None:
    """Upstream takes linspace(0, 1, 1000) at 0, 9, 19, ..., 989 and of these floor(linspace(0, 100, n, endpoint=False))."""
    grid = np.linspace(0, 1, 1000)[np.maximum(np.arange(100) * 10 - 1, 0)]
    for steps in range(1, 101):
        expected = np.append(grid[np.floor(np.linspace(0, 100, steps, endpoint=False)).astype(int)], 1)
        np.testing.assert_allclose(schedules.sigmas("consistency", steps), expected, rtol=0, atol=1e-12)


@given(st.sampled_from(["flow_match", "consistency"]), st.integers(1, 1000))
def test_from_noise_to_data(schedule: str, steps: int) -> None:
    steps = min(steps, contract.SCHEDULES[schedule])
    found = schedules.sigmas(schedule, steps)
    assert found.dtype == np.float64 and len(found) == steps + 1
    assert found[0] == 0 and found[-1] == 1
    sizes = np.diff(found)
    still = int(schedule == "flow_match" and steps > 1)
    assert (sizes[: len(sizes) - still] > 0).all(), "only flow_match's last step stands still"
    assert (sizes == 0).sum() == still
    np.testing.assert_allclose(found, reference_sampler.sigmas(schedule, steps), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        ("flow_match", 0, "steps must be in 1..1000 for flow_match, got 0"),
        ("flow_match", -3, "steps must be in 1..1000 for flow_match, got -3"),
        ("flow_match", 1001, "steps must be in 1..1000 for flow_match, got 1001"),
        ("consistency", 101, "steps must be in 1..100 for consistency, got 101"),
        ("euler", 5, "schedule must be one of flow_match, consistency, got 'euler'"),
    ],
)
def test_refusals(schedule: str, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        schedules.sigmas(schedule, steps)


def test_reference_refuses_an_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="schedule must be flow_match or consistency, got 'euler'"):
        reference_sampler.sigmas("euler", 5)


def test_names_and_limits_are_the_same_everywhere() -> None:
    assert schedules.NAMES == SCHEDULES == tuple(contract.SCHEDULES)
    assert {name: most for name, (_, most) in schedules._SCHEDULES.items()} == dict(contract.SCHEDULES)
