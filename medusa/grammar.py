"""What an answer can be told to be: JSON, or JSON of a schema. Knows grammars and tokenizers; knows no logits.

llguidance compiles grammars and keeps their state. It is imported when the first one is made: nobody else pays for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa.errors import MedusaError, PromptError

# Between the parts of a document a model may write this much white space and no more: some never stop.
WHITESPACE = r"[ \n\r\t]{1,20}"


@dataclass(frozen=True)
class Grammar:
    """What a whole answer must be. Make one with `json_object` or `json_schema`; `source` is in llguidance's words."""

    source: str

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """A JSON document of this schema. ValueError for what is no schema, or asks for what cannot be kept to."""
        if not isinstance(schema, Mapping):
            raise ValueError(f"a JSON schema must be an object, got {str(schema)[:80]!r}")  # noqa: TRY004  as all bad settings
        matcher = _llguidance().LLMatcher
        source = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": WHITESPACE})
        refused = matcher.validate_grammar(source)
        if refused:
            raise ValueError(f"the JSON schema cannot be used: {first_line(refused)}")
        return cls(source)


@dataclass(frozen=True, kw_only=True)
class GrammarVocabulary:
    """A backbone's tokens as grammars read them, slow to make; `eos` are those that end an answer."""

    tokenizer: Any
    eos: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, *, vocab_size: int, eos: frozenset[int]) -> GrammarVocabulary:
        """PromptError where this tokenizer cannot serve grammars."""
        ends = sorted(token for token in eos if token < vocab_size)
        if not ends:
            raise PromptError(
                "the backbone has no end-of-sequence token, so no answer could end where its grammar does"
            )
        _llguidance()
        from llguidance.hf import from_tokenizer

        try:
            return cls(tokenizer=from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends), eos=frozenset(ends))
        except ValueError as error:
            raise PromptError(f"grammars cannot read this backbone's tokenizer: {first_line(str(error))}") from error

    def matcher(self, grammar: Grammar) -> Any:
        """llguidance's state of one answer, at its beginning. It does not raise: what is wrong shows as its error."""
        return _llguidance().LLMatcher(self.tokenizer, grammar.source, log_level=0)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MedusaError("grammars need the package llguidance; install it with `pip install llguidance`") from error
    return llguidance


def first_line(message: str) -> str:
    """What llguidance says, without the dump of its state that may follow."""
    return message.strip().splitlines()[0] if message.strip() else "unknown reason"
