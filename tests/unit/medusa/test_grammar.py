"""An answer with a grammar is a document of it, by every scheme, and the same with any tree as with none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa
from medusa.config import SamplingParams
from medusa.engine import Completion, Engine, Request
from medusa.errors import MedusaError, PromptError
from medusa.grammar import Grammar, GrammarVocabulary
from medusa.grammar_masks import GrammarMasks, Guide
from medusa.tree import Tree
from tests.tiny_models import EOS_ID, VOCAB_SIZE, make_tiny_tokenizer
from tests.unit.medusa.tiny import random_heads, tiny_backbone, trees

# Documents of a bounded length, so that even a random model comes to their end.
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", "car"]},
        "ok": {"type": "boolean"},
        "n": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["kind", "ok"],
    "additionalProperties": False,
}
GRAMMAR = Grammar.json_schema(SCHEMA)
BACKBONE = tiny_backbone(seed=3, dtype=torch.float64, vocab_size=VOCAB_SIZE, max_position_embeddings=512)
HEADS = random_heads(BACKBONE)
TOKENIZER = make_tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def ask(i: int, **settings: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 300, "grammar": GRAMMAR, "seed": i, **settings})
    return Request(prompt_ids=ids_of("Tell me of a cat"[: 4 + i]), params=params, request_id=str(i))


def answers(requests: list[Request], tree: Tree, batch: int = 2) -> dict[str, Completion]:
    made = Engine(BACKBONE, HEADS, tree=tree, max_batch_size=batch, context_length=400)
    return {done.request_id: done for done in made.run(requests)}


def text_of(done: Completion) -> str:
    assert done.token_ids[-1] == EOS_ID and EOS_ID not in done.token_ids[:-1]
    return TOKENIZER.decode(done.token_ids[:-1])


def allowed_after(text: str, grammar: Grammar = GRAMMAR) -> set[int]:
    """Token ids that the masks leave possible after an emitted text."""
    logits, emitted = torch.zeros(1, 1, VOCAB_SIZE), ids_of(text)
    masks = GrammarMasks.of([Guide(grammar, BACKBONE.grammar_vocabulary)], [emitted])
    assert masks is not None
    masks.apply(logits, torch.tensor([[0]]), Tree.root_only().on(torch.device("cpu")).rows(1))
    return set(logits[0, 0].isfinite().nonzero().flatten().tolist())


def test_the_end_is_allowed_exactly_where_the_document_is_whole() -> None:
    whole = '{"kind": "cat", "ok": true}'
    for cut in range(len(whole)):
        assert EOS_ID not in allowed_after(whole[:cut]), whole[:cut]
    assert allowed_after(whole) == {EOS_ID}


def test_a_token_is_allowed_exactly_where_some_document_goes_on_with_it() -> None:
    """The oracle is a list: after `"kind": "c` only cat and car go on."""
    after = allowed_after('{"kind": "c')
    assert {TOKENIZER.decode([token]) for token in after} == {"a", "at", "ar"} & {
        TOKENIZER.decode([token]) for token in range(VOCAB_SIZE)
    }


@settings(max_examples=25, deadline=None)
@given(tree=trees(max_nodes=10), data=st.data())
def test_each_node_is_masked_by_its_own_ancestors(tree: Tree, data: st.DataObject) -> None:
    """Every node that the grammar can reach has the mask of its path alone; every other node is left as it was."""
    whole = ids_of('{"kind": "cat", "ok": true}')
    cut = data.draw(st.integers(1, len(whole)))
    emitted = whole[:cut]
    right = (whole[cut:] + [EOS_ID] * 9)[: tree.depth]  # what the document goes on with, sprinkled over the tree
    tokens = [emitted[-1]] + [
        right[depth - 1] if data.draw(st.booleans()) else data.draw(st.integers(0, VOCAB_SIZE - 1))
        for depth in tree.depths[1:]
    ]
    logits = torch.zeros(2, tree.num_nodes, VOCAB_SIZE)
    masks = GrammarMasks.of([None, Guide(GRAMMAR, BACKBONE.grammar_vocabulary)], [[], emitted])
    assert masks is not None
    masks.apply(logits, torch.tensor([[0] * tree.num_nodes, tokens]), tree.on(torch.device("cpu")).rows(2))
    assert not logits[0].any(), "a row without a grammar is not touched"
    for node in range(tree.num_nodes):
        path = [tokens[n] for n in tree.node_paths[node].tolist() if n > 0]
        reached = all(
            token in allowed_after_ids(emitted + path[:i]) and token != EOS_ID for i, token in enumerate(path)
        )
        found = set(logits[1, node].isfinite().nonzero().flatten().tolist())
        assert found == (allowed_after_ids(emitted + path) if reached else set(range(VOCAB_SIZE)))


def allowed_after_ids(emitted: list[int]) -> set[int]:
    """The slow way: a fresh matcher reads the whole text. Of the tokens that could come next it may leave out some, where
    only one spelling of a forced word is the tokenizer's own."""
    matcher = BACKBONE.grammar_vocabulary.matcher(GRAMMAR)
    assert matcher.consume_tokens(emitted)
    packed = matcher.compute_bitmask()
    allowed = {token for token in range(VOCAB_SIZE) if packed[token // 8] & (1 << token % 8)}
    assert (EOS_ID in allowed) == matcher.is_accepting()
    assert allowed and all(matcher.validate_tokens([token]) for token in allowed - {EOS_ID})
    return allowed


@settings(max_examples=3, deadline=None)
@given(tree=trees(max_nodes=12), seed=st.integers(0, 1000))
def test_any_tree_in_any_batch_decodes_what_plain_decoding_does(tree: Tree, seed: int) -> None:
    requests = [
        ask(0),
        ask(1, temperature=0.9, acceptance="rejection", seed=seed, logit_bias={ids_of("t")[0]: 2.0}),
        ask(2, temperature=1.3, acceptance="rejection", seed=seed, top_p=0.9, frequency_penalty=0.5, max_tokens=25),
        ask(3, grammar=None, max_tokens=12, ignore_eos=True),
    ]
    together = answers(requests, tree, batch=3)
    for request in requests:
        alone = answers([request], Tree.root_only(), batch=1)[request.request_id]
        assert together[request.request_id].token_ids == alone.token_ids
        assert together[request.request_id].finish_reason == alone.finish_reason


def test_every_finished_answer_is_a_document_of_the_schema_by_every_scheme() -> None:
    schemes = [{"temperature": 0.0}] + [
        {"temperature": t, "acceptance": scheme, "epsilon": 0.01}
        for scheme in ("typical", "rejection")
        for t in (0.8, 1.5)
    ]
    requests = [ask(i, **schemes[i % len(schemes)]) for i in range(10)]
    done = answers(requests, Tree.full([8, 3]), batch=4)
    assert {one.finish_reason for one in done.values()} == {"stop"}
    for one in done.values():
        jsonschema.validate(json.loads(text_of(one)), SCHEMA)
    assert sum(one.stats.num_accepted_tokens for one in done.values()) > 0, "the tree was of use"


def test_any_object_is_an_object_and_length_may_cut_it() -> None:
    grammar = Grammar.json_object()
    assert {TOKENIZER.decode([token]) for token in allowed_after("", grammar)} <= {"{", '{"', "{ ", "{\n"}
    endless = {token: -100 for token in range(VOCAB_SIZE) if "}" in TOKENIZER.decode([token])}
    cut = answers([ask(0, grammar=grammar, max_tokens=4, logit_bias=endless)], Tree.full([4]), batch=1)["0"]
    assert cut.finish_reason == "length" and TOKENIZER.decode(cut.token_ids).startswith("{")


def test_logprobs_stay_the_models_own() -> None:
    request = ask(0, logprobs=0)
    done = answers([request], Tree.full([5, 2]), batch=1)["0"]
    text = torch.tensor([[*request.prompt_ids, *done.token_ids]])
    with torch.inference_mode():
        logits = BACKBONE.logits(BACKBONE.hidden_states(text)[0, len(request.prompt_ids) - 1 : -1])
    want = torch.log_softmax(logits, dim=-1)
    assert [one.logprob for one in done.logprobs] == pytest.approx(
        [float(own[token]) for own, token in zip(want, done.token_ids, strict=True)]
    )


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "cat"}, "Invalid type: cat"),
        ({"type": "object", "if": {}}, 'Unimplemented keys: ."if".'),
        ({"$ref": "http://elsewhere/schema"}, "elsewhere"),
        ({"type": "string", "pattern": "(?=a)"}, "regex parse error"),
        ([], "must be an object"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_name(schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Grammar.json_schema(schema)


def test_settings_refuse_what_is_no_grammar_and_an_answer_without_end() -> None:
    with pytest.raises(ValueError, match=r"Grammar\.json_schema makes one"):
        SamplingParams(grammar={"type": "object"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave out ignore_eos"):
        SamplingParams(grammar=GRAMMAR, ignore_eos=True)


def test_a_backbone_without_an_end_of_sequence_refuses_grammars() -> None:
    with pytest.raises(PromptError, match="no end-of-sequence token"):
        GrammarVocabulary.of(TOKENIZER, vocab_size=VOCAB_SIZE, eos=frozenset())


def test_a_request_whose_grammar_fails_fails_alone() -> None:
    made = Engine(BACKBONE, HEADS, tree=Tree.full([3]), max_batch_size=2, context_length=400)
    broken = Grammar('{"grammars": []}')
    done = {one.request_id: one for one in made.run([ask(0), ask(1, grammar=broken), ask(2)])}
    assert done["1"].finish_reason == "error" and "empty grammars array" in str(done["1"].error)
    assert done["0"].finish_reason == done["2"].finish_reason == "stop"


def test_a_grammar_that_fails_on_the_way_ends_its_own_request() -> None:
    """A grammar may prove too ambiguous only after some tokens: llguidance then stays in error."""
    made = Engine(BACKBONE, HEADS, tree=Tree.full([3]), max_batch_size=2, context_length=400)
    for i in range(2):
        made.submit(ask(i))
    made.step()
    guide = made._schedule.running[0].guide
    assert guide is not None and guide._matcher.consume_token(ids_of("?")[0]) is False
    done = {}
    while made.has_work:
        done |= {delta.request_id: delta.completion for delta in made.step() if delta.completion}
    assert done["0"].finish_reason == "error" and "the grammar failed" in str(done["0"].error)
    assert done["1"].finish_reason == "stop" and done["1"].error is None


def test_without_the_package_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MedusaError, match="pip install llguidance"):
        Grammar.json_object()


def test_generate_takes_a_grammar(tiny_folder: Path) -> None:
    model = medusa.load(tiny_folder, heads=None)
    answer = model.generate("A cat", grammar=GRAMMAR, max_tokens=200)
    jsonschema.validate(json.loads(answer.text), SCHEMA)
