"""Keys: made, hashed, read from files, asked for; and kept out of every log line and message."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from deploy.api_keys import KeyFileError, KeyRing, hash_key, new_key, read_hashes
from medusa import Model
from tests.unit.deploy.conftest import ScriptedLoop

KEYS = [new_key(), new_key()]


@pytest.fixture
def guarded(model: Model, serve_app: Callable) -> Iterator[str]:
    loop = ScriptedLoop(model.backbone.tokenizer, [5, 6])
    with serve_app(loop, api_keys=[hash_key(key) for key in KEYS], cors_origins=["https://app.example"]) as url:
        yield url


def test_keys_are_random_and_hashes_are_not() -> None:
    assert KEYS[0] != KEYS[1]
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_ring_opens_to_its_keys_alone() -> None:
    ring = KeyRing(hash_key(key) for key in KEYS)
    assert all(ring.opens(key) for key in KEYS)
    assert not any(ring.opens(key) for key in ("", KEYS[0][:-1], KEYS[0] + " ", hash_key(KEYS[0]), new_key()))
    assert not KeyRing(()).opens("")


@pytest.mark.parametrize("key", KEYS, ids=["first", "second"])
def test_each_key_opens(guarded: str, key: str) -> None:
    with openai.OpenAI(base_url=f"{guarded}/v1", api_key=key, max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.completions.create(model="tiny", prompt="Hi").choices


@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Bearer wrong", "Basic dGlueTo=", pytest.param(KEYS[0], id="alone"), "Bearer \xff"]
)
def test_without_a_key_of_ours_nothing_opens(guarded: str, sent: str | None) -> None:
    headers = {} if sent is None else {"Authorization": sent.encode("latin-1")}
    for method, path in [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("GET", "/x"),
    ]:
        response = httpx.request(method, f"{guarded}{path}", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"]


def test_what_is_open_stays_open(guarded: str) -> None:
    for path in ("/health", "/", "/metrics", "/playground/playground.js"):
        assert httpx.get(f"{guarded}{path}").status_code == 200
    assert httpx.get(f"{guarded}/health/../v1/models").status_code == 401
    assert httpx.get(f"{guarded}/playground").status_code == 401


def test_a_preflight_needs_no_key(guarded: str) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = httpx.options(
        f"{guarded}/v1/completions", headers=headers | {"Access-Control-Request-Headers": "authorization"}
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    refused = httpx.get(f"{guarded}/v1/models", headers={"Origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "the page must see why"


def test_other_origins_are_told_nothing(guarded: str, url: str) -> None:
    for base, origin in [(guarded, "https://evil.example"), (url, "https://app.example")]:
        response = httpx.get(f"{base}/health", headers={"Origin": origin})
        assert "access-control-allow-origin" not in response.headers


def test_no_key_is_logged(guarded: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (*KEYS, "sk-medusa-wrong"):
            httpx.get(f"{guarded}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert len([record for record in caplog.records if record.name == "deploy.access"]) == 3
    assert "sk-medusa" not in caplog.text
    assert not any(hash_key(key) in caplog.text for key in KEYS)


def test_a_file_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may\n{hash_key('a')}  # Ann\n\n{hash_key('b')}\n")
    assert read_hashes(file) == (hash_key("a"), hash_key("b"))


@pytest.mark.parametrize(
    ("text", "words"), [("sk-medusa-secret\n", "line 1"), ("# nobody\n", "no hash"), (None, "cannot read")]
)
def test_a_bad_file_is_refused_without_being_quoted(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(KeyFileError, match=words) as caught:
        read_hashes(file)
    assert "secret" not in str(caught.value)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text(hash_key("old"))
    ring = KeyRing([hash_key("fixed")], file=file, clock=lambda: now[0])
    (tmp_path / "new").write_text(f"{hash_key('new')}\n{hash_key('newer')}")
    os.replace(tmp_path / "new", file)  # as a mounted secret changes
    assert ring.opens("old"), "it is looked at once a second"
    now[0] = 1.0
    assert [ring.opens(key) for key in ("fixed", "old", "new", "newer")] == [True, False, True, True]


def test_a_file_that_was_damaged_leaves_the_keys_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, now = tmp_path / "keys", [0.0]
    file.write_text(hash_key("old"))
    ring = KeyRing((), file=file, clock=lambda: now[0])
    for damage in (lambda: file.write_text("sk-medusa-secret"), file.unlink):
        damage()
        caplog.clear()
        for _ in range(3):
            now[0] += 1
            assert ring.opens("old") and not ring.opens("sk-medusa-secret")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "secret" not in caplog.text
    file.write_text(hash_key("new"))
    now[0] += 1
    assert ring.opens("new") and not ring.opens("old")
