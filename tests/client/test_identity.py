"""Which weights a server serves, as its sampler tells it and as health() shows it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hunyuan3d_client import Client, MockTransport, ServedWeights, contract, identity

TRAINED = ServedWeights("v2-mini", "fp16", "0123456789abcdef" * 4)
RANDOM = ServedWeights("tiny", "fp32", seed=7)


def test_weights_are_shown_with_their_digest_and_random_ones_in_capitals() -> None:
    assert str(TRAINED) == "v2-mini fp16, weights 0123456789ab" and not TRAINED.random
    assert str(RANDOM) == "tiny fp32, RANDOM WEIGHTS from seed 7" and RANDOM.random
    assert str(ServedWeights("", "fp16", "ab" * 32)) == "fp16, weights abababababab"


@pytest.mark.parametrize("restricted", [False, True])
def test_health_tells_the_weights_also_without_the_servers_key(kserve: Any, restricted: bool) -> None:
    kserve.restricted = restricted
    kserve.served = json.dumps({contract.DIT: dataclasses.asdict(TRAINED), contract.VAE: dataclasses.asdict(RANDOM)})
    with Client(kserve.url) as client:
        found = client.health()
    assert found.weights == {contract.DIT: TRAINED, contract.VAE: RANDOM} and found.preset == "v2-mini"
    assert {model.name: model.weights for model in found.models if model.weights} == found.weights
    assert not kserve.requests, "no sample was made"


@pytest.mark.parametrize("served", [None, "no JSON", '{"hunyuan3d_dit": {"colour": 1}}', "[]"])
def test_health_works_where_the_sampler_does_not_tell(kserve: Any, served: str | None) -> None:
    kserve.served = served
    with Client(kserve.url) as client:
        found = client.health()
    assert found.ready and found.weights == {} and found.preset == ""


def test_parse_refuses_what_is_no_table_of_weights() -> None:
    assert identity.parse("{}") == {}
    for text in ("[1]", '{"a": 1}', "nothing"):
        with pytest.raises(ValueError):
            identity.parse(text)


def test_a_mock_reports_the_weights_that_a_test_gives_it() -> None:
    with Client(transport=MockTransport(weights={contract.DIT_GUIDED: RANDOM})) as client:
        assert client.health().preset == "tiny"
