"""The playground in a headless Chromium before a real server: asked by keyboard, compared, stopped, refused, narrow."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import medusa
from deploy.api_keys import hash_key
from deploy.app import create_app
from deploy.engine_loop import EngineLoop
from deploy.service import Service
from medusa import Model
from medusa.engine import Engine
from pipelines.config import ServeSection
from tests.browser import Page, browser_page, needs_chromium
from tests.unit.deploy.conftest import PacedEngine, http_server, wait_until
from tests.unit.medusa.tiny import random_heads

pytestmark = [needs_chromium, pytest.mark.slow]

QUESTION = "Why is <img src=x onerror=alert(1)> the sky blue?"
IDLE = "!document.getElementById('send').hidden"
# The random model says for this seed all it may; for others it may end by itself before anyone could stop it.
LONG: dict[str, Any] = dict(scheme="rejection", max_tokens=180, temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    plain = medusa.load(tiny_folder, heads=None, dtype="float32")
    return Model(plain.backbone, random_heads(plain.backbone))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def serve(model: Model) -> Callable[..., contextlib.AbstractContextManager[tuple[str, EngineLoop]]]:
    @contextlib.contextmanager
    def start(engine_class: type[Engine] = PacedEngine, **settings: Any) -> Iterator[tuple[str, EngineLoop]]:
        def make_engine() -> Engine:
            return engine_class(model.backbone, model.heads, tree=model.tree, max_batch_size=4, context_length=256)

        loop = EngineLoop(make_engine, model.backbone.tokenizer).start()
        service = Service(name="tiny", model=model, loop=loop, fingerprint="fp")
        try:
            with http_server(create_app(service, ServeSection(**settings))) as url:
                yield url, loop
        finally:
            loop.stop()

    return start


def choose(page: Page, *, scheme: str = "greedy", **values: Any) -> None:
    """Set fields of the page as a person would: with their events."""
    page.run(f"document.querySelector('[name=scheme][value={scheme}]').click()")
    for name, value in values.items():
        field = f"document.getElementById('{name.replace('_', '-')}')"
        page.run(f"{field}.value = '{value}'; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def ask(page: Page, text: str = QUESTION) -> None:
    page.run("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.run(f"Array.from(document.querySelectorAll({selector!r}), (each) => each.textContent)")
    return found


def open_page(page: Page, url: str) -> None:
    page.problems.clear()
    page.open(f"{url}/")
    page.wait("document.getElementById('model').textContent === 'tiny'")


def test_an_answer_streams_in_steps_and_is_the_models(page: Page, serve: Callable, model: Model) -> None:
    with serve() as (url, _):
        open_page(page, url)
        choose(page, max_tokens=24)
        ask(page)
        page.wait("document.querySelectorAll('.busy .step').length > 1")  # it is seen while it comes
        page.wait(IDLE)
    expected = model.generate([{"role": "user", "content": QUESTION}], max_tokens=24)
    assert texts(page, ".text") == [expected.text]
    assert 1 < len(texts(page, ".text .step")) <= len(expected.stats.tokens_per_step)
    assert (
        f"{len(expected.token_ids)} tokens in {len(expected.stats.tokens_per_step)} steps" in texts(page, ".footer")[0]
    )
    assert texts(page, ".figure b")[0] == f"{expected.stats.acceleration_rate:.2f}"
    assert texts(page, ".question") == [QUESTION]
    assert page.run("document.querySelectorAll('#conversation img').length") == 0, "text became HTML"
    assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") == "false"
    assert texts(page, "#status")[0].startswith("Done.")
    assert page.problems == []


def test_plain_decoding_beside_it_gives_the_same_text_one_token_a_step(page: Page, serve: Callable) -> None:
    with serve() as (url, _):
        open_page(page, url)
        choose(page, max_tokens=40)
        page.run("document.getElementById('compare').click()")
        ask(page, "Hello")
        page.wait(IDLE)
    medusa_text, plain_text = texts(page, ".text")
    assert medusa_text == plain_text
    assert float(texts(page, ".figure b")[0]) > float(texts(page, ".figure b")[2]) == 1.0
    # The server's own account: a token inside a character shows no text, so its step shares the next one's tint.
    told = re.match(r"\D*(\d+) tokens in (\d+) steps", texts(page, ".answer:nth-child(2) .footer > span")[0])
    assert told is not None and told[1] == told[2]
    assert "Both answers are the same text." in texts(page, ".verdict")[0]
    assert page.problems == []


def test_escape_stops_and_frees_the_slot_and_the_chat_goes_on(page: Page, serve: Callable) -> None:
    with serve() as (url, loop):
        open_page(page, url)
        choose(page, **LONG)
        ask(page)
        page.wait("document.querySelectorAll('.text .step').length > 2")
        page.press("Escape")
        page.wait(IDLE)
        assert "Stopped" in texts(page, ".footer")[0]
        wait_until(lambda: loop.num_in_flight == 0)
        choose(page, max_tokens=8)
        ask(page, "Go on")
        page.wait(f"{IDLE} && document.querySelectorAll('.footer').length === 2")
        assert texts(page, ".failure") == []
        page.run("document.getElementById('new-chat').click()")
        assert texts(page, ".turn") == []
        assert page.run("document.getElementById('welcome').hidden") is False


def test_a_new_chat_during_an_answer_knows_nothing_of_it(page: Page, serve: Callable, model: Model) -> None:
    with serve() as (url, _):
        open_page(page, url)
        choose(page, **LONG)
        ask(page)
        page.wait("document.querySelectorAll('.text .step').length > 2")
        page.run("document.getElementById('new-chat').click()")
        page.wait(IDLE)
        choose(page, max_tokens=24)
        ask(page, "Hello")
        page.wait(f"{IDLE} && document.querySelector('.footer').textContent")
    assert texts(page, ".text") == [model.generate([{"role": "user", "content": "Hello"}], max_tokens=24).text]
    assert page.problems == []


def test_a_refusal_is_told_and_can_be_tried_again(page: Page, serve: Callable) -> None:
    with serve() as (url, _):
        open_page(page, url)
        choose(page, max_tokens=100_000)
        ask(page)
        page.wait("document.querySelector('[role=alert]')")
        assert "max_tokens" in texts(page, "[role=alert]")[0]
        choose(page, max_tokens=8)
        page.run("document.querySelector('[role=alert] button').click()")
        page.wait(f"{IDLE} && document.querySelector('.footer').textContent")
        assert texts(page, ".failure") == []
        assert texts(page, ".question") == [QUESTION]
    ask(page)
    page.wait("document.querySelector('[role=alert]')")
    assert "cannot be reached" in texts(page, "[role=alert]")[0]


def test_a_server_with_keys_asks_for_one(page: Page, serve: Callable) -> None:
    with serve(api_keys=[hash_key("sesame")]) as (url, _):
        page.problems.clear()
        page.open(f"{url}/")
        page.wait("document.activeElement.id === 'key'")
        assert "API key" in texts(page, "#model")[0]
        page.type("sesame")
        page.press("Tab")
        page.wait("document.getElementById('model').textContent === 'tiny'")
        choose(page, max_tokens=4)
        ask(page)
        page.wait(f"{IDLE} && document.querySelector('.footer')?.textContent")
        page.open(f"{url}/")
        page.wait("document.getElementById('model').textContent === 'tiny'")  # the tab remembers it
        assert page.run("Object.keys(localStorage).length") == 0
        assert "sesame" not in page.run("document.documentElement.textContent")


def test_a_narrow_screen_has_everything_and_nothing_beside_it(page: Page, serve: Callable) -> None:
    with serve() as (url, _):
        page.resize(360, 700)
        open_page(page, url)
        visible = "document.getElementById('settings').offsetHeight > 0"
        assert page.run(visible) is False
        page.run("document.getElementById('settings-toggle').click()")
        assert page.run(visible) is True
        choose(page, max_tokens=24)
        page.run("document.getElementById('compare').click()")
        ask(page)
        page.wait(IDLE)
        assert page.run(visible) is False, "the answer is what is wanted now"
        assert page.run("document.documentElement.scrollWidth") <= 360
        lefts = page.run(
            "Array.from(document.querySelectorAll('.answer'), (each) => each.getBoundingClientRect().left)"
        )
        assert len(lefts) == 2 and lefts[0] == lefts[1], "one answer below the other"
        page.resize(1280, 800)
