"""Who is let in: by how many are in flight, and by how long the first answer of a request would wait for others."""

from __future__ import annotations

import pytest

from deploy.admission import Admission
from deploy.errors import EngineOverloaded


def test_what_is_ahead_of_a_request_is_waited_for_not_its_own_answers() -> None:
    admission = Admission(max_waiting=64, max_wait_s=120.0)
    admission.learn(10.0)
    admission.check(ahead=0, count=16, slots=1)
    admission.check(ahead=12, count=16, slots=1)
    with pytest.raises(EngineOverloaded, match=r"13 requests .* about 130 s") as refused:
        admission.check(ahead=13, count=1, slots=1)
    assert refused.value.retry_after_s == 130.0


def test_more_than_the_queue_holds_are_refused_with_what_was_asked_for() -> None:
    admission = Admission(max_waiting=2)
    admission.check(ahead=2, count=4, slots=4)
    with pytest.raises(EngineOverloaded, match="2 requests are in flight and this one asks for 5 more, 6 are the most"):
        admission.check(ahead=2, count=5, slots=4)
