"""Every metric is good for the right cloud and bad for a wrong one."""

import numpy as np
import pytest

from hunyuan3d_export.shapes import PROMPTS, encode_points, frame, solid
from hunyuan3d_export.shapes.metrics import coverage_distance, nearest_prompt, surface_distance
from hunyuan3d_export.shapes.quality import PROBE_SCALES, failures, initial_noise, load_thresholds, measure


def cloud(prompt, count=256, noise=0.0, seed=7):
    random = np.random.default_rng(seed)
    return solid(prompt).sample(count, random) + noise * random.standard_normal((count, 3))


def latents(prompt, **options):
    return encode_points(cloud(prompt, **options))[None].astype(np.float32)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_noisy_cloud_is_recognised_among_all_prompts(prompt):
    assert nearest_prompt(cloud(prompt, noise=0.03), PROMPTS) == prompt


def test_measure_of_a_true_cloud():
    found = measure(latents("torus"), "torus")
    assert found["mean"] < 1e-5 and found["p95"] < 1e-5 and found["accuracy"] == 1.0 and found["energy"] < 1e-9
    assert found["coverage"] < 0.1


def test_measure_of_a_wrong_cloud():
    found = measure(latents("cube"), "torus")
    assert found["mean"] > 0.1 and found["p95"] > found["mean"] and found["accuracy"] == 0.0


def test_coverage_sees_a_missing_half_that_the_mean_cannot():
    points = cloud("sphere", count=512)
    half = points[points[:, 0] > 0]
    assert surface_distance(half, "sphere").max() < 1e-6
    assert coverage_distance(half, "sphere").mean() > 2 * coverage_distance(points, "sphere").mean()


def test_leftover_noise_shows_in_the_energy_alone():
    clean = latents("cone")
    noise = 0.3 * initial_noise([0], 256)
    found = measure((clean + noise - noise @ frame().T @ frame()).astype(np.float32), "cone")
    assert found["mean"] < 1e-5
    assert found["energy"] == pytest.approx(0.09, rel=0.05)


def test_samples_that_are_not_finite_fail():
    broken = latents("cone")
    broken[0, 0, 0] = np.nan
    found = measure(broken, "cone")
    assert found["accuracy"] == 0.0 and found["mean"] == np.inf


def test_noise_belongs_to_its_seed():
    np.testing.assert_array_equal(initial_noise([3, 4], 8)[1], initial_noise([4], 8)[0])
    assert initial_noise([3], 8).dtype == np.float32


def test_failures_names_the_bound_missed_and_nan_fails():
    thresholds = {"overall": {"mean": {"max": 0.05}, "accuracy": {"min": 0.9}}, "probes": {"0": {"mean": {"min": 0.1}}}}
    good = {"overall": {"mean": 0.02, "accuracy": 1.0}, "probes": {"0": {"mean": 0.3}}}
    assert failures(good, thresholds) == []
    for bad in (
        good | {"overall": {"mean": 0.06, "accuracy": 1.0}},
        good | {"overall": {"mean": float("nan"), "accuracy": 1.0}},
        good | {"overall": {"mean": 0.02, "accuracy": 0.8}},
        good | {"probes": {"0": {"mean": 0.02}}},
    ):
        assert len(failures(bad, thresholds)) == 1


@pytest.mark.parametrize("level", ["full", "quick"])
def test_the_thresholds_file_names_known_metrics(level):
    bounds = load_thresholds(level)
    names = {name for rows in (bounds["overall"], *bounds["probes"].values()) for name in rows}
    assert names <= {"mean", "worst", "p95", "coverage", "accuracy", "energy", "deviation"}
    assert set(bounds["probes"]) <= {f"{scale:g}" for scale in PROBE_SCALES}
