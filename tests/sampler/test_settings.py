"""The sampler's parameters in config.pbtxt: every parameter is read and typed, and an unknown one is an error."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parameters import parse
from settings import Settings

VALUES = {
    "steps": ("12", 12),
    "guidance_scale": ("2.5", 2.5),
    "schedule": ("consistency", "consistency"),
    "guidance_embed": ("true", True),
    "max_batch": ("3", 3),
    "max_tokens_per_step": ("77", 77),
    "max_trajectories": ("9", 9),
    "max_queued": ("0", 0),
    "largest_request": ("3", 3),
    "preview_mib": ("0", 0),
    "lanes": ("2", 2),
    "queue_timeout_s": ("1.5", 1.5),
    "total_timeout_s": ("9", 9.0),
    "evaluation_timeout_s": ("0.5", 0.5),
    "arrays": ("auto", "auto"),
    "restart_denoiser": ("false", False),
}


@pytest.mark.parametrize("name", VALUES)
def test_each_parameter_is_read(name: str, parameters: dict[str, str], base: Settings) -> None:
    text, value = VALUES[name]
    found = parse(Settings, {**parameters, name: text})
    assert found == dataclasses.replace(base, **{name: value}) and found != base
    assert type(getattr(found, name)) is type(value)


def test_every_field_is_covered() -> None:
    assert set(VALUES) == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", VALUES)
def test_missing_parameter(name: str, parameters: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="parameters must be steps, .*, got "):
        parse(Settings, {key: value for key, value in parameters.items() if key != name})


def test_unknown_parameter(parameters: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="parameters must be .*, got .*step_count"):
        parse(Settings, {**parameters, "step_count": "5"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("guidance_embed", "False", "guidance_embed must be true or false, got 'False'"),
        ("guidance_embed", "0", "guidance_embed must be true or false, got '0'"),
        ("guidance_embed", "", "guidance_embed must be true or false, got ''"),
        ("steps", "5.0", "steps must be an integer, got '5.0'"),
        ("steps", "", "steps must be an integer, got ''"),
        ("steps", "0", "steps must be in 1..1000"),
        ("guidance_scale", "five", "guidance_scale must be a number, got 'five'"),
        ("guidance_scale", "nan", "guidance_scale must be finite, got nan"),
        ("schedule", "ddim", "schedule must be one of flow_match, consistency, got 'ddim'"),
        ("max_batch", "1", "max_batch must be at least 2, got 1"),
        ("max_queued", "-1", "max_queued must be at least 0, got -1"),
        ("largest_request", "0", "largest_request must be at least 1, got 0"),
        ("preview_mib", "-1", "preview_mib must be at least 0, got -1"),
        ("lanes", "0", "lanes must be at least 1, got 0"),
        ("max_tokens_per_step", "0", "max_tokens_per_step must be at least 1, got 0"),
        ("queue_timeout_s", "0", "queue_timeout_s must be above 0, got 0"),
        ("total_timeout_s", "-2", "total_timeout_s must be above 0, got -2"),
        ("evaluation_timeout_s", "inf", "evaluation_timeout_s must be finite, got inf"),
        ("arrays", "cupy", "arrays must be numpy or auto, got 'cupy'"),
        ("max_trajectories", "-1", "max_trajectories must be at least 1, got -1"),
    ],
)
def test_bad_value(name: str, text: str, message: str, parameters: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        parse(Settings, {**parameters, name: text})


def test_tritons_own_parameter_is_not_the_samplers(parameters: dict[str, str], base: Settings) -> None:
    assert parse(Settings, {**parameters, "FORCE_CPU_ONLY_INPUT_TENSORS": "no"}) == base


def test_the_parameter_of_the_servers_launcher_is_not_the_samplers(parameters: dict[str, str], base: Settings) -> None:
    assert parse(Settings, {**parameters, "needs": "hunyuan3d_dit|hunyuan3d_dit_guided"}) == base


def test_the_word_false_is_false(parameters: dict[str, str]) -> None:
    assert parse(Settings, {**parameters, "guidance_embed": "false"}).guidance_embed is False


@given(st.dictionaries(st.sampled_from(list(VALUES)), st.text(max_size=6), min_size=1))
def test_any_text_is_settings_or_a_value_error(changes: dict[str, str]) -> None:
    parameters = {name: text for name, (text, _) in VALUES.items()}
    try:
        found = parse(Settings, {**parameters, **changes})
    except ValueError:
        return
    assert found.steps >= 1 and found.max_batch >= 1 and found.guidance_scale == found.guidance_scale
