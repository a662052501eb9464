from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.credentials import without_credentials


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("at postgresql+psycopg2://me:p:w/d@db:5432/mlflow fails", "at postgresql+psycopg2://***@db:5432/mlflow fails"),
        ("https://token@host, ftp://me:x@files/y", "https://***@host, ftp://***@files/y"),
        ("s3://bucket/a@b, http://host:5000 and me@host", "s3://bucket/a@b, http://host:5000 and me@host"),
        ("http://user:p@ss/word@h:1", "http://***@h:1"),
        ("http://me@my.org:pass@h:1/x", "http://***@h:1/x"),
        ("http://u:a://b@host at http://h", "http://***@host at http://h"),
        ("postgresql://db/x?user=me&sslPassword=SECRET&a=b", "postgresql://db/x?user=me&sslPassword=***&a=b"),
        ("http://a:b@c,http://d:e@f,http://g@h,http://i", "http://***@c,http://***@f,http://***@h,http://i"),
    ],
)
def test_credentials_of_a_uri_are_left_out(text: str, told: str) -> None:
    assert without_credentials(text) == told


@given(st.text(st.characters(codec="ascii", exclude_categories=["Z", "C"])).filter(lambda text: "//" not in text))
def test_no_password_is_too_odd_to_be_left_out(password: str) -> None:
    assert without_credentials(f"at http://me:{password}@host/x: down") == "at http://***@host/x: down"
