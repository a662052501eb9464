"""Heads go into each foreign layout and come back tensor for tensor; what is hostile, incomplete or not held is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import medusa
from medusa.adapters import Adapters
from medusa.backbone import Backbone
from medusa.checkpoint import Checkpoint, load_checkpoint
from medusa.errors import CheckpointError
from medusa.formats import export_heads, import_heads
from medusa.formats.choices import CHOICES, choices_from_paths, paths_from_choices
from medusa.formats.importing import holds_backbone
from medusa.heads import MedusaHeads
from medusa.tree import Path as TreePath
from tests.tiny_models import VOCAB_SIZE
from tests.unit.medusa.tiny import random_heads, tiny_backbone

BACKBONE = tiny_backbone()
PATHS: list[TreePath] = [(0,), (1,), (0, 0), (0, 0, 1), (2,)]
SOME = torch.tensor([0, 3, 4, 11])
LAYOUTS = ("vllm", "reference-pt", "reference-safetensors", "reference-full")


def checkpoint_of(heads: MedusaHeads, adapters: Adapters | None = None, paths: list[TreePath] = PATHS) -> Checkpoint:
    return Checkpoint(
        heads=heads, paths=paths, backbone_name="tiny", backbone_fingerprint=BACKBONE.fingerprint, adapters=adapters
    )


def same_blocks(heads: MedusaHeads) -> MedusaHeads:
    """All layers of a head equal: what the reference's repeated block makes of any."""
    for head in heads.heads:
        for block in head.blocks[1:]:  # type: ignore[union-attr,index]
            block.load_state_dict(head.blocks[0].state_dict())  # type: ignore[union-attr,index]
    return heads


def exported(folder: Path, layout: str, heads: MedusaHeads, **options: Any) -> Path:
    return export_heads(folder / layout, checkpoint_of(heads), BACKBONE, format=layout, **options).folder


def imported(source: Path, folder: Path, **options: Any) -> Checkpoint:
    given = {"backbone": BACKBONE} | options
    return load_checkpoint(import_heads(source, folder, **given).folder, backbone=given["backbone"])


def assert_same_heads(got: MedusaHeads, want: MedusaHeads) -> None:
    assert got.config == want.config
    assert dict(got.named_parameters()).keys() == dict(want.named_parameters()).keys()
    for name, weight in want.named_parameters():
        assert torch.equal(got.get_parameter(name), weight), name
    assert (got.vocabulary is None) == (want.vocabulary is None)
    if want.vocabulary is not None:
        assert torch.equal(got.vocabulary, want.vocabulary)  # type: ignore[arg-type]


def held(layout: str, lm_heads: str) -> bool:
    return (layout, lm_heads) != ("reference-safetensors", "own")


@pytest.mark.parametrize(
    ("layout", "lm_heads", "num_layers"),
    [(f, own, n) for f in LAYOUTS for own in ("shared", "own") for n in (1, 2) if held(f, own)],
)
def test_heads_come_back_equal_from_every_layout(tmp_path: Path, layout: str, lm_heads: str, num_layers: int) -> None:
    heads = random_heads(BACKBONE, lm_heads=lm_heads, num_layers=num_layers)
    if layout != "vllm":
        heads = same_blocks(heads)
    back = imported(exported(tmp_path, layout, heads), tmp_path / "back")
    assert_same_heads(back.heads, heads)
    assert back.backbone_fingerprint == BACKBONE.fingerprint and back.adapters is None
    assert back.paths == (PATHS if layout != "vllm" else [(0,), (0, 0), (0, 0, 0)])


def test_the_chosen_layout_of_the_reference_is_the_one_that_fits(tmp_path: Path) -> None:
    def chosen(name: str, checkpoint: Checkpoint) -> str:
        return export_heads(tmp_path / name, checkpoint, BACKBONE, format="reference").format

    assert chosen("a", checkpoint_of(random_heads(BACKBONE))) == "reference-safetensors"
    assert chosen("b", checkpoint_of(random_heads(BACKBONE, lm_heads="own"))) == "reference-pt"
    assert chosen("c", checkpoint_of(random_heads(BACKBONE), tuned_by(tiny_backbone(seed=3)))) == "reference-full"


def test_vllm_is_told_what_it_would_otherwise_leave_out(tmp_path: Path) -> None:
    folder = exported(tmp_path, "vllm-token-map", random_heads(BACKBONE, vocabulary=SOME))
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert config["medusa_fc_bias"] is True
    assert config["original_lm_head"] is True and config["truncated_vocab_size"] == 4
    # vLLM takes any key with "num" and "heads" (or "layers") for the number of them: there must be one of each.
    assert [key for key in config if "num" in key] == ["num_heads", "num_hidden_layers"]
    assert torch.equal(tensors["token_map"], SOME)
    assert torch.equal(tensors["lm_head.weight"], BACKBONE.lm_head_weight[SOME])
    expected = {f"blocks.{k}.layers.0.{part}" for k in range(3) for part in ("weight", "bias")}
    assert tensors.keys() == expected | {"lm_head.weight", "token_map"}


def test_the_tokens_that_heads_guess_among_come_back_from_vllm(tmp_path: Path) -> None:
    heads = random_heads(BACKBONE, vocabulary=SOME, num_layers=2)
    assert_same_heads(imported(exported(tmp_path, "vllm-token-map", heads), tmp_path / "back").heads, heads)
    told = export_heads(tmp_path / "all", checkpoint_of(heads), BACKBONE, format="vllm")
    assert "guess among all tokens instead of 4" in told.notes[0]
    assert imported(told.folder, tmp_path / "again").heads.vocabulary is None


def test_a_shared_lm_head_is_copied_for_each_head_where_the_layout_needs_it(tmp_path: Path) -> None:
    folder = exported(tmp_path, "reference-pt", random_heads(BACKBONE))
    tensors = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    assert [key for key in tensors if key.endswith(".1.weight")] == ["0.1.weight", "1.1.weight", "2.1.weight"]
    assert torch.equal(tensors["2.1.weight"], BACKBONE.lm_head_weight)
    own = imported(folder, tmp_path / "other", backbone=tiny_backbone(seed=5))
    assert own.heads.config.lm_heads == "own", "equal to no lm_head but that of its own backbone"


def test_lm_heads_are_told_from_the_backbones_by_their_last_bit(tmp_path: Path) -> None:
    folder = exported(tmp_path, "reference-pt", random_heads(BACKBONE))
    tensors = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    tensors["1.1.weight"][3, 5] = torch.nextafter(tensors["1.1.weight"][3, 5], torch.tensor(9.0))
    torch.save(tensors, folder / "medusa_lm_head.pt")
    assert imported(folder, tmp_path / "back").heads.config.lm_heads == "own"


def test_a_bfloat16_copy_of_the_lm_head_is_known_as_shared(tmp_path: Path) -> None:
    folder = exported(tmp_path, "reference-pt", random_heads(BACKBONE))
    tensors = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    torch.save({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "medusa_lm_head.pt")
    assert imported(folder, tmp_path / "back").heads.config.lm_heads == "shared"
    stored = load_file(tmp_path / "back" / "medusa_heads.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


# A whole model


def tuned_by(other: Backbone) -> Adapters:
    """Two weights of another backbone as what MEDUSA-2 changed."""
    names = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight")
    weights = dict(other.model.named_parameters())
    return Adapters(kind="full", tensors={name: weights[name].detach().clone() for name in names})


def tuned_folder(tmp_path: Path) -> tuple[Path, Backbone, MedusaHeads]:
    """Of the tokenizer's full vocabulary, so that `medusa.load` can try it on text."""
    backbone = tiny_backbone(vocab_size=VOCAB_SIZE)
    heads = random_heads(backbone)
    adapters = tuned_by(tiny_backbone(vocab_size=VOCAB_SIZE, seed=3))
    backbone.merge(adapters)
    folder = export_heads(tmp_path / "full", checkpoint_of(heads, adapters), backbone, format="reference").folder
    return folder, backbone, heads


def test_a_whole_model_is_a_backbone_and_its_heads(tmp_path: Path) -> None:
    folder, tuned, heads = tuned_folder(tmp_path)
    assert holds_backbone(folder)
    loaded = medusa.load(folder, heads=None, dtype="float32").backbone
    for name, weight in tuned.model.named_parameters():
        assert torch.equal(dict(loaded.model.named_parameters())[name], weight), name
    back = imported(folder, tmp_path / "back", backbone=loaded)
    assert_same_heads(back.heads, heads)
    assert back.adapters is None and back.backbone_fingerprint == loaded.fingerprint
    model = medusa.load(folder, heads=tmp_path / "back", dtype="float32")
    ids = [3, 4, 5]
    plain = medusa.load(folder, heads=None, dtype="float32").generate(ids, max_tokens=12, ignore_eos=True)
    assert model.generate(ids, max_tokens=12, ignore_eos=True).token_ids == plain.token_ids


def test_beside_the_original_a_whole_model_becomes_adapters(tmp_path: Path) -> None:
    folder, _, heads = tuned_folder(tmp_path)
    original = tiny_backbone(vocab_size=VOCAB_SIZE)
    back = imported(folder, tmp_path / "back", backbone=original)
    assert_same_heads(back.heads, heads)  # shared: with the tuned lm_head, not with the original's
    want = tuned_by(tiny_backbone(vocab_size=VOCAB_SIZE, seed=3)).tensors
    assert back.adapters is not None and back.adapters.tensors.keys() == want.keys()
    assert all(torch.equal(back.adapters.tensors[name], want[name]) for name in want)
    assert back.backbone_fingerprint == original.fingerprint


def test_a_sharded_model_in_pickles_reads_the_same(tmp_path: Path) -> None:
    folder, tuned, heads = tuned_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, Tensor]] = [{}, {}]
    for index, name in enumerate(sorted(tensors)):
        shards[index % 2][name] = tensors[name]
    for index, shard in enumerate(shards):
        torch.save(shard, folder / f"part-{index}.bin")
    where = {name: f"part-{index}.bin" for index, shard in enumerate(shards) for name in shard}
    index_file = folder / "pytorch_model.bin.index.json"
    index_file.write_text(json.dumps({"weight_map": where}))
    assert_same_heads(imported(folder, tmp_path / "back", backbone=tuned).heads, heads)
    index_file.write_text(json.dumps({"weight_map": where | {"medusa_head.0.0.linear.bias": "../secret.bin"}}))
    with pytest.raises(CheckpointError, match=r"outside its folder: \.\./secret\.bin"):
        import_heads(folder, tmp_path / "no", backbone=tuned)
    index_file.write_text(json.dumps({"weight_map": where | {"medusa_head.9.0.linear.bias": "part-0.bin"}}))
    with pytest.raises(CheckpointError, match=r"lacks tensors.*medusa_head\.9\.0\.linear\.bias"):
        import_heads(folder, tmp_path / "no", backbone=tuned)


def test_a_tied_backbone_goes_out_and_comes_back(tmp_path: Path) -> None:
    tied = tiny_backbone(tie_word_embeddings=True)
    heads = random_heads(tied)
    folder = export_heads(tmp_path / "full", checkpoint_of(heads), tied, format="reference-full").folder
    back = imported(folder, tmp_path / "back", backbone=tied)
    assert back.adapters is None
    assert_same_heads(back.heads, heads)


# What others wrote


def test_names_of_others_are_understood(tmp_path: Path) -> None:
    heads = random_heads(BACKBONE, lm_heads="own")
    vllm = exported(tmp_path, "vllm", heads)
    tensors = load_file(vllm / "model.safetensors")
    save_file({f"medusa_heads.{name}": tensor for name, tensor in tensors.items()}, vllm / "model.safetensors")
    assert_same_heads(imported(vllm, tmp_path / "a").heads, heads)

    pickled = exported(tmp_path, "reference-pt", heads) / "medusa_lm_head.pt"
    named = {f"medusa_head.{name}": t for name, t in torch.load(pickled, weights_only=True).items()}
    torch.save(named, tmp_path / "alone.pt")
    assert_same_heads(imported(tmp_path / "alone.pt", tmp_path / "b").heads, heads)
    save_file(named, tmp_path / "alone.safetensors")
    assert_same_heads(imported(tmp_path / "alone.safetensors", tmp_path / "c").heads, heads)


def test_vllm_heads_without_biases_have_none_and_ignored_biases_are_told(tmp_path: Path) -> None:
    folder = exported(tmp_path, "vllm", random_heads(BACKBONE))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "medusa_fc_bias": False}))
    result = import_heads(folder, tmp_path / "a", backbone=BACKBONE)
    assert any("vLLM ignored them" in note for note in result.notes)
    assert load_checkpoint(result.folder).heads.get_parameter("heads.0.blocks.0.bias").any()

    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith("bias")}, folder / "model.safetensors")
    heads = imported(folder, tmp_path / "b").heads
    assert not heads.get_parameter("heads.0.blocks.0.bias").any()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="medusa_fc_bias but no block has a bias"):
        import_heads(folder, tmp_path / "c", backbone=BACKBONE)


def test_the_tensors_count_heads_and_a_config_that_lies_is_told(tmp_path: Path) -> None:
    folder = exported(tmp_path, "reference-safetensors", random_heads(BACKBONE))
    (folder / "config.json").write_text('{"medusa_num_heads": 2, "medusa_num_layers": 1}')
    result = import_heads(folder, tmp_path / "back", backbone=BACKBONE)
    assert result.heads.num_heads == 3
    assert any("medusa_num_heads is 2, the tensors hold 3 heads" in note for note in result.notes)


# Refusals

Change = Callable[[dict[str, Tensor]], object]


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def with_(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("layout", "change", "said"),
    [
        ("reference-pt", without("1.0.linear.bias"), "missing: 1.0.linear.bias"),
        ("reference-pt", without("2.1.weight"), "missing: 2.1.weight"),
        ("reference-pt", with_("0.1.linear.weight", torch.zeros(32, 32)), "missing: 0.1.linear.bias.*unexpected: 0.1.weight"),
        ("reference-pt", with_("5.0.linear.bias", torch.zeros(32)), "missing: 3.0.linear.weight"),
        ("reference-pt", with_("0.0.norm.weight", torch.zeros(32)), "unexpected: 0.0.norm.weight"),
        ("reference-pt", with_("1.0.linear.weight", torch.zeros(32, 31)), r"1.0.linear.weight \[32, 31\] instead of \[32, 32\]"),
        ("reference-pt", with_("0.0.linear.weight", torch.tensor(1.0)), r"0.0.linear.weight \[\]"),
        ("reference-pt", with_("1.1.weight", torch.zeros(11, 32)), r"1.1.weight \[11, 32\]"),
        ("reference-pt", with_("1.0.linear.bias", torch.full((32,), float("nan"))), "NaN.*1.0.linear.bias"),
        ("reference-pt", with_("99999999.0.linear.bias", torch.zeros(32)), "100000000 heads"),
        ("vllm", without("blocks.1.layers.0.weight"), "missing: blocks.1.layers.0.weight"),
        ("vllm", with_("embed_tokens.weight", torch.zeros(2)), "unexpected: embed_tokens.weight"),
        ("vllm", with_("lm_heads.0.weight", torch.zeros(12, 32)), "missing: lm_heads.1.weight"),
        ("vllm", without("lm_head.weight"), "holds no lm_head"),
        ("vllm", with_("lm_head.weight", torch.zeros(12)), r"must have shape \[V, 32\]"),
        ("vllm", with_("token_map", SOME), "token_map has 4 tokens, config.json's truncated_vocab_size is 12"),
        ("reference-full", without("model.norm.weight"), "missing: model.norm.weight"),
        ("reference-full", with_("model.extra", torch.zeros(1)), "unexpected: model.extra"),
        ("reference-full", with_("model.norm.weight", torch.zeros(1)), "mis-shaped: model.norm.weight"),
        ("reference-full", without("medusa_head.0.0.linear.bias"), "missing: medusa_head.0.0.linear.bias"),
    ],
)  # fmt: skip
def test_every_tensor_at_fault_is_named(tmp_path: Path, layout: str, change: Change, said: str) -> None:
    folder = exported(tmp_path, layout, random_heads(BACKBONE))
    file = folder / ("medusa_lm_head.pt" if layout == "reference-pt" else "model.safetensors")
    tensors = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    change(tensors)
    if file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)
    with pytest.raises(CheckpointError, match=said):
        import_heads(folder, tmp_path / "back", backbone=BACKBONE)
    assert not (tmp_path / "back").exists()


class Trap:
    """What a hostile pickle holds: unpickled, it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_that_could_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    trapped = tmp_path / "medusa_lm_head.pt"
    torch.save({"0.0.linear.weight": Trap(tmp_path / "sprung")}, trapped)
    with pytest.raises(CheckpointError, match=r"could run code of its author.*refused"):
        import_heads(tmp_path, tmp_path / "back", backbone=BACKBONE)
    trapped.write_bytes(pickle.dumps({"a": Trap(tmp_path / "sprung")}, protocol=2))
    with pytest.raises(CheckpointError):
        import_heads(trapped, tmp_path / "back", backbone=BACKBONE)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"0.0.linear.weight": "text"}, {3: torch.zeros(1)}, {}])
def test_a_pickle_of_anything_but_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(CheckpointError, match=r"tensors by name|no residual block"):
        import_heads(tmp_path, tmp_path / "back", backbone=BACKBONE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_named(tmp_path: Path, layout: str) -> None:
    folder = exported(tmp_path, layout, random_heads(BACKBONE))
    file = next(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=file.name):
        import_heads(folder, tmp_path / "back", backbone=BACKBONE)


def test_what_is_no_heads_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file or folder at"):
        import_heads(tmp_path / "nowhere", tmp_path / "back", backbone=BACKBONE)
    with pytest.raises(CheckpointError, match="no Medusa heads of a known layout"):
        import_heads(tmp_path, tmp_path / "back", backbone=BACKBONE)
    ours = imported(exported(tmp_path, "vllm", random_heads(BACKBONE)), tmp_path / "ours").folder
    assert ours is not None
    with pytest.raises(CheckpointError, match="checkpoint of this project already"):
        import_heads(ours, tmp_path / "back", backbone=BACKBONE)
    with pytest.raises(ValueError, match="exists; give a new folder"):
        import_heads(tmp_path / "vllm", ours, backbone=BACKBONE)
    with pytest.raises(CheckpointError, match="hidden size 32 and vocabulary 12; the backbone has 32 and 20"):
        import_heads(tmp_path / "vllm", tmp_path / "back", backbone=tiny_backbone(vocab_size=20))


def test_a_token_map_that_is_none_and_own_lm_heads_over_one_are_refused(tmp_path: Path) -> None:
    folder = exported(tmp_path, "vllm-token-map", random_heads(BACKBONE, vocabulary=SOME))
    tensors = load_file(folder / "model.safetensors")

    def refused(said: str, **changed: Tensor) -> None:
        save_file(tensors | changed, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=said):
            import_heads(folder, tmp_path / "back", backbone=BACKBONE)

    refused("different tokens below 12", token_map=torch.tensor([0, 3, 3, 11]))
    refused("different tokens below 12", token_map=torch.tensor([0, 3, 4, 12]))
    refused("list of token ids", token_map=torch.zeros(4))
    refused("score 4 tokens alone", **{"lm_head.weight": torch.zeros(4, 32)})
    save_file({n: t for n, t in tensors.items() if n != "token_map"}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cuts the vocabulary to 4 tokens but token_map is missing"):
        import_heads(folder, tmp_path / "back", backbone=BACKBONE)


def test_what_a_format_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    def refused(said: str, heads: MedusaHeads, layout: str, **more: Any) -> None:
        checkpoint = replace(checkpoint_of(heads), **more)
        with pytest.raises(ValueError, match=said):
            export_heads(tmp_path / "out", checkpoint, BACKBONE, format=layout)
        assert not (tmp_path / "out").exists()

    two = random_heads(BACKBONE, num_layers=2)
    some = random_heads(BACKBONE, vocabulary=SOME)
    for layout in LAYOUTS[1:]:
        refused("2 layers differ.*one layer 2 times", two, layout)
        refused("guess among 4 tokens", some, layout)
    refused("lm_heads of their own; use reference-pt", random_heads(BACKBONE, lm_heads="own"), "reference-safetensors")
    refused("ten|10 ranks", random_heads(BACKBONE), "reference-pt", paths=[(0,), (10,)])
    refused("unknown format 'gguf'", two, "gguf")
    for layout in ("vllm", "reference-pt", "reference-safetensors"):
        refused("tuned backbone.*--backbone-to", random_heads(BACKBONE), layout, adapters=tuned_by(BACKBONE))


def test_forced_it_leaves_out_and_says_what(tmp_path: Path) -> None:
    heads = random_heads(BACKBONE, num_layers=2, vocabulary=SOME)
    result = export_heads(tmp_path / "out", checkpoint_of(heads), BACKBONE, format="reference", force=True)
    assert ["4 tokens" in result.notes[0], "2 layers differ" in result.notes[1]] == [True, True]
    back = imported(result.folder, tmp_path / "back").heads
    assert back.vocabulary is None and back.config.num_layers == 2
    assert torch.equal(back.get_parameter("heads.2.blocks.1.weight"), heads.get_parameter("heads.2.blocks.1.weight"))


# Trees


def test_choices_in_growth_order_stay_as_they_are() -> None:
    grown = [[0], [0, 0], [1], [0, 1], [1, 0]]
    assert [list(path) for path in paths_from_choices(grown, "x")] == grown
    assert choices_from_paths(paths_from_choices(grown, "x")) == grown


def test_choices_in_another_order_are_put_into_one_whose_every_beginning_is_a_tree() -> None:
    paths = paths_from_choices([[0, 0, 0], [1], [0, 0], [0], [1, 2]], "x")
    assert paths == [(1,), (0,), (0, 0), (1, 2), (0, 0, 0)]
    for length in range(len(paths) + 1):
        assert medusa.Tree.from_paths(paths[:length]).num_nodes == length + 1


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"0": 1}, "list of paths"),
        ([[]], "list of paths"),
        ([[0], [True]], "list of paths"),
        ([0], "list of paths"),
        ([[0, 1]], "no parent"),
        ([[-1]], "negative rank"),
        ([[0], [1], [0]], r"path \[0\] more than once"),
    ],
)
def test_what_is_no_tree_is_refused(choices: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        paths_from_choices(choices, "x")


def test_a_tree_given_with_the_heads_wins_and_must_fit(tmp_path: Path) -> None:
    folder = exported(tmp_path, "reference-pt", random_heads(BACKBONE), num_nodes=3)
    assert json.loads((folder / CHOICES).read_text()) == [[0], [1]]
    file = tmp_path / "mine.json"
    file.write_text("[[0], [0, 0]]")
    assert imported(folder, tmp_path / "a", choices=file).paths == [(0,), (0, 0)]
    file.write_text("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]")
    with pytest.raises(CheckpointError, match=r"mine\.json: the tree is 4 deep but there are 3"):
        import_heads(folder, tmp_path / "b", backbone=BACKBONE, choices=file)
    for text, said in (("[[0]", "not valid JSON"), (None, "no file of paths")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            import_heads(folder, tmp_path / "b", backbone=BACKBONE, choices=file)
