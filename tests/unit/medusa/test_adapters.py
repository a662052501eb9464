"""A tuned backbone goes through a checkpoint folder whole, strictly, and decodes by tree as it decodes plainly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import medusa
from medusa.adapters import ADAPTERS, Adapters
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import CONFIG, load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.errors import CheckpointError
from medusa.heads import MedusaHeads

TUNED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head")
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def original(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, dtype="float32", fused=False)


def low_rank(model: torch.nn.Module, *, rank: int = 2) -> Adapters:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in TUNED:
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.3
    return Adapters(kind="lora", tensors=tensors, rank=rank, alpha=4.0)


def saved(folder: Path, backbone: Backbone, adapters: Adapters | None) -> Path:
    heads = MedusaHeads(
        HeadsConfig(num_heads=3), hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, dtype=torch.float32
    )
    with torch.no_grad():
        for weight in heads.parameters():
            weight.normal_(std=0.3)
    return save_checkpoint(
        folder / "heads", heads, paths=[(0,), (1,), (0, 0), (2,), (0, 0, 0)], backbone_name=backbone.name,
        backbone_fingerprint=backbone.fingerprint, adapters=adapters, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_tuned_backbone_decodes_by_tree_what_it_decodes_plainly(
    tiny_folder: Path, original: Backbone, tmp_path: Path, kind: str, fused: bool
) -> None:
    adapters = low_rank(original.model)
    oracle = load_backbone(tiny_folder, dtype="float32", fused=False)
    for name in TUNED:
        with torch.no_grad():
            down, up = adapters.tensors[f"{name}.lora_A.weight"], adapters.tensors[f"{name}.lora_B.weight"]
            oracle.model.get_parameter(f"{name}.weight").add_(2.0 * up @ down)
    if kind == "full":
        adapters = Adapters(kind="full", tensors={name: p.detach() for name, p in oracle.model.named_parameters()})
    model = medusa.load(tiny_folder, heads=saved(tmp_path, original, adapters), dtype="float32", fused=fused)
    plainly = medusa.Model(model.backbone, None)
    untuned = medusa.load(tiny_folder, heads=None, dtype="float32", fused=fused)
    assert model.backbone.fingerprint == untuned.backbone.fingerprint == original.fingerprint

    with torch.no_grad():
        want = int(oracle.logits(oracle.hidden_states(torch.tensor([PROMPT])))[0, -1].argmax())
    answer = model.generate(PROMPT, max_tokens=40, ignore_eos=True)
    assert answer.token_ids[0] == want
    assert answer.token_ids == plainly.generate(PROMPT, max_tokens=40, ignore_eos=True).token_ids
    assert answer.token_ids == medusa.Model(oracle, None).generate(PROMPT, max_tokens=40, ignore_eos=True).token_ids
    assert answer.token_ids != untuned.generate(PROMPT, max_tokens=40, ignore_eos=True).token_ids


def test_adapters_load_back_equal(original: Backbone, tmp_path: Path) -> None:
    adapters = low_rank(original.model)
    folder = saved(tmp_path, original, adapters)
    back = load_checkpoint(folder, backbone=original).adapters
    assert back is not None and (back.kind, back.rank, back.alpha) == ("lora", 2, 4.0)
    assert back.tensors.keys() == adapters.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in adapters.tensors.items())
    assert back.modules == sorted(TUNED)
    assert "MEDUSA-2" in (folder / "README.md").read_text()
    assert load_checkpoint(saved(tmp_path, original, None)).adapters is None


def damage(folder: Path, change: str) -> None:
    file, name = folder / ADAPTERS, f"{TUNED[0]}.lora_B.weight"
    tensors = load_file(file)
    config = json.loads((folder / CONFIG).read_text())
    if change == "no file":
        file.unlink()
        return
    if change == "no entry":
        config["adapters"] = None
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:50])
        return
    elif change == "other rank":
        config["adapters"]["rank"] = 3
    elif change == "no rank":
        del config["adapters"]["rank"]
    elif change == "unknown kind":
        config["adapters"]["kind"] = "ia3"
    elif change == "half":
        del tensors[name]
    elif change == "foreign":
        tensors["x"] = torch.zeros(1)
    elif change == "NaN":
        tensors[name][0, 0] = float("nan")
    elif change == "mis-shaped":
        tensors[name] = tensors[name][:-1].clone()
    elif change == "unknown layer":
        for end in ("lora_A.weight", "lora_B.weight"):
            tensors[f"model.layers.9.mlp.up_proj.{end}"] = tensors[f"{TUNED[0]}.{end}"].clone()
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no file", "adapters.safetensors is missing"),
        ("no entry", "names no adapters"),
        ("truncated", "truncated or not safetensors"),
        ("other rank", "must have rank 3"),
        ("no rank", "need a rank"),
        ("unknown kind", "unknown kind"),
        ("half", "missing: model.layers.0.self_attn.q_proj.lora_B.weight"),
        ("foreign", "unexpected tensors"),
        ("NaN", "NaN or infinite"),
        ("mis-shaped", r"have shape \(31, 32\), the backbone's \(32, 32\)"),
        ("unknown layer", "'model.layers.9.mlp.up_proj', which this backbone does not have"),
    ],
)
def test_damaged_adapters_are_refused_by_name(original: Backbone, tmp_path: Path, change: str, said: str) -> None:
    folder = saved(tmp_path, original, low_rank(original.model))
    damage(folder, change)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder, backbone=original)


def test_an_adapter_of_a_tied_lm_head_would_change_the_embeddings(tmp_path: Path) -> None:
    from tests.unit.medusa.tiny import tiny_backbone

    tied = tiny_backbone(tie_word_embeddings=True)
    one = {"lm_head.lora_A.weight": torch.ones(1, 32), "lm_head.lora_B.weight": torch.ones(12, 1)}
    with pytest.raises(CheckpointError, match="'lm_head', which is tied to the embeddings"):
        Adapters(kind="lora", tensors=one, rank=1, alpha=1.0).merge_into(tied.model)
