"""OpenAI's `response_format`: text, any JSON object, or JSON of a schema. Knows the protocol and grammars; does no I/O."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from deploy.api.errors import bad_request
from deploy.api.wire import Wire
from medusa.grammar import Grammar


class TextFormat(Wire):
    type: Literal["text"]


class JsonObjectFormat(Wire):
    type: Literal["json_object"]


class NamedSchema(Wire):
    """A JSON schema with the name that OpenAI wants for it. It is always kept to, `strict` or not."""

    model_config = ConfigDict(populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Wire):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def grammar_of(wanted: ResponseFormat | None) -> Grammar | None:
    """What the answer must be, None for text. Compiling a large schema takes a while. ApiError for a bad schema."""
    match wanted:
        case JsonObjectFormat():
            return Grammar.json_object()
        case JsonSchemaFormat(json_schema=named):
            try:
                return Grammar.json_schema(named.json_schema)
            except ValueError as error:
                raise bad_request(str(error), param="response_format") from None
    return None
