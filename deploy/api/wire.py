"""The base of everything on the wire. Pure data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Wire(BaseModel):
    """A frozen JSON object that refuses fields it does not know and values of another JSON type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
