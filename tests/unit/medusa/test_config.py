"""Settings are checked where they are made, and stay as they were made."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from medusa.config import LogitBias, SamplingParams
from medusa.sampling import SamplingRows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"presence_penalty": 2.1}, r"presence_penalty must lie in \[-2, 2\], got 2.1"),
        ({"frequency_penalty": -3}, r"frequency_penalty must lie in \[-2, 2\], got -3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must lie"),
        ({"presence_penalty": "1"}, "presence_penalty must be a number"),
        ({"logit_bias": {5: 101}}, r"logit_bias of token 5 must lie in \[-100, 100\], got 101"),
        ({"logit_bias": {-1: 1}}, "token id of logit_bias must be 0 or more, got -1"),
        ({"logit_bias": {"5": 1}}, "token id of logit_bias must be a whole number, got '5'"),
        ({"logit_bias": {5: None}}, "logit_bias of token 5 must be a number, got None"),
        ({"logit_bias": [5]}, "logit_bias must be a mapping"),
        ({"logprobs": 21}, r"logprobs must lie in \[0, 20\], got 21"),
        ({"logprobs": -1}, "logprobs must lie"),
        ({"logprobs": True}, "logprobs must be a whole number or None, got True"),
        ({"top_k": 2**31}, r"top_k must lie in \[0, 2\*\*31\), 0 being off, got 2147483648"),
        ({"top_k": -1}, "top_k must lie"),
        ({"tree_nodes": 10**20}, r"tree_nodes must lie in \[1, 2\*\*31\), 1 being plain decoding, got 1000"),
        ({"tree_nodes": 0}, "tree_nodes must lie"),
        ({"temperature": 1e39}, r"temperature must lie in \[0, 100000\], got 1e\+39"),
        ({"temperature": float("nan")}, "temperature must lie"),
    ],
)
def test_a_setting_outside_its_limits_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**settings)


def test_limits_themselves_are_allowed() -> None:
    params = SamplingParams(presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 7: 100}, logprobs=20)
    assert dict(params.logit_bias) == {0: -100.0, 7: 100.0}
    assert SamplingParams(logprobs=0).logprobs == 0
    wide = SamplingParams(top_k=2**31 - 1, tree_nodes=2**31 - 1, temperature=1e5)
    rows = SamplingRows.of([wide], torch.device("cpu"))
    assert (rows.top_k.item(), rows.max_nodes.item(), rows.temperature.item()) == (2**31 - 1, 2**31 - 1, 1e5)


def test_a_bias_does_not_change_with_the_mapping_it_came_from_and_can_be_shared() -> None:
    source = {3: 1.5}
    params = SamplingParams(logit_bias=source)
    source[3] = 9.0
    assert params.logit_bias == {3: 1.5} == LogitBias({3: 1.5})
    same = SamplingParams(logit_bias={3: 1.5})
    assert params == same and hash(params) == hash(same) and params != SamplingParams()
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == replace(params) == params
    assert SamplingParams(**asdict(params)) == params
