"""`python -m benchmarks.pretrain`: heads from distilled answers on one machine without Ray.

    P positions of a step, K heads, D hidden, V vocabulary

The life cycle's own way is `medusa train`, which computes the whole softmax. On two cores that softmax is nearly all of
the time, so this script samples it: every frequent token, every label of the step, and a random few of the rest, whose
weight in the normaliser is multiplied by how many they stand for (importance sampling; Jean et al., arXiv 1412.2007).
Held-out accuracy is measured over the whole vocabulary.

The plain heads in `medusa/pretrained` were made by it, the others by `benchmarks.gpu.train_default` and given their vocabulary
here; their cards name the commands.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor, nn

from benchmarks.command import console, run_command
from medusa.adapters import Adapters
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.losses import HEAD_DECAY, IGNORE, head_targets, true_path
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE
from medusa.tree_search import MAX_RANKS, HitTable, count_hits, expected_tokens, grow_paths

FREQUENT, RANDOM = 4096, 1024
CHUNK = 1280
HELD_OUT_PERCENT = 4
MAX_HELD_OUT = 3000
# Reasoning problems are many and alike; open-ended prompts are few and what people ask.
SOURCE_WEIGHT = {"gsm8k": 0.5, "self-prompted": 2.0, "arena-hard": 2.0, "ultrachat-eval": 2.0}


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Hidden states [P,D] with the heads' targets [P,K], the path before each [P,K] and how often each is drawn [P]."""

    hidden: Tensor
    targets: Tensor
    path: Tensor
    weight: Tensor


def weight_of(row: dict) -> float:
    return SOURCE_WEIGHT.get(row["source"], 1.0)


def is_held_out(row_id: str) -> bool:
    return int(hashlib.sha256(row_id.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


@torch.inference_mode()
def positions_of(rows: list[dict], backbone: Backbone, num_heads: int) -> Positions:
    """One forward a row; only the positions that predict answer tokens are kept, as bfloat16."""
    hidden, targets, path, weight = [], [], [], []
    for done, row in enumerate(rows):
        prompt, answer = row["prompt_ids"], row["response_ids"]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([IGNORE] * len(prompt) + answer)
        wanted = head_targets(labels, num_heads)
        own = slice(len(prompt) - 1, len(prompt) + len(answer) - 2)  # the last of them still has one target
        hidden.append(backbone.hidden_states(ids)[0, own].to(torch.bfloat16))
        targets.append(wanted[own])
        path.append(true_path(ids[0], num_heads)[own])
        weight.append(torch.full((len(wanted[own]),), weight_of(row)))
        if done % 100 == 0:
            console.print(f"hidden states of {done} of {len(rows)} rows")
    return Positions(
        hidden=torch.cat(hidden), targets=torch.cat(targets), path=torch.cat(path), weight=torch.cat(weight)
    )


def kept_positions(
    file: Path | None, rows: list[dict], backbone: Backbone, num_heads: int, adapters: Adapters | None = None
) -> Positions:
    """The rows' positions, from `file` where a run before wrote them there. ValueError where they are of other rows.

    `adapters` are those that the backbone was tuned by.
    """
    if file is None:
        return positions_of(rows, backbone, num_heads)
    made_by = [list(Positions.__annotations__), backbone.fingerprint, str(backbone.dtype), num_heads]
    if adapters is not None:
        made_by += [adapters.describe(), adapters_digest(adapters)]
    told = json.dumps([*made_by, digest_of(rows), [weight_of(row) for row in rows]])
    digest = hashlib.sha256(told.encode()).hexdigest()
    if not file.exists():
        made = positions_of(rows, backbone, num_heads)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        torch.save({"digest": digest, **vars(made)}, part)
        os.replace(part, file)
        return made
    kept = torch.load(file)
    if kept.pop("digest") != digest:
        raise ValueError(
            f"{file} holds the positions of other rows, backbone, dtype, version or number of heads; remove it"
        )
    return Positions(**kept)


class SampledSoftmax:
    """Loss and gradient of features against an lm_head [V,D] over a sampled vocabulary."""

    def __init__(self, lm_head: Tensor, targets: Tensor) -> None:
        """`targets` of the whole data set say which tokens are frequent. Products are in `lm_head`'s dtype."""
        counts = torch.bincount(targets[targets != IGNORE], minlength=len(lm_head))
        order = counts.argsort(descending=True)
        self.lm_head = lm_head
        self.frequent = order[:FREQUENT].sort().values
        self.rest = order[FREQUENT:]
        self.frequent_weight = lm_head[self.frequent].contiguous()
        self.place = torch.full((len(lm_head),), -1)
        self.place[self.frequent] = torch.arange(len(self.frequent))

    def gradient(
        self, features: Tensor, targets: Tensor, row_weight: Tensor, *, own: nn.Parameter | None = None
    ) -> tuple[Tensor, Tensor]:
        """features [P·K,D], targets [P·K], weights [P·K] → cross-entropy of each row [P·K], gradient [P·K,D].

        A head's `own` lm_head [V,D] takes the place of the shared one and gets its gradient too.
        """
        lm_head = self.lm_head if own is None else own.detach()
        frequent_weight = self.frequent_weight if own is None else lm_head[self.frequent].to(self.lm_head.dtype)
        if own is not None:
            own.grad = torch.zeros_like(own)
        real = targets != IGNORE
        labels = targets[real].unique()
        rare = labels[self.place[labels] < 0]
        drawn = self.rest[torch.randint(len(self.rest), (RANDOM,))].unique() if len(self.rest) else self.rest
        drawn = drawn[~torch.isin(drawn, rare)]
        side = torch.cat([rare, drawn])
        stands_for = math.log((len(self.rest) - len(rare)) / max(len(drawn), 1)) if len(drawn) else 0.0
        correction = torch.cat([torch.zeros(len(rare)), torch.full((len(drawn),), stands_for)])
        side_weight = lm_head[side].to(self.lm_head.dtype)
        self.place[side] = len(self.frequent) + torch.arange(len(side))
        column = self.place[targets.clamp_min(0)].clamp_min(0)
        self.place[side] = -1

        losses, gradient = torch.empty(len(features)), torch.empty_like(features)
        for start in range(0, len(features), CHUNK):
            rows = slice(start, start + CHUNK)
            x, index = features[rows].to(self.lm_head.dtype), column[rows, None]
            logits = torch.cat([x @ frequent_weight.t(), x @ side_weight.t()], dim=1).float()
            logits[:, len(self.frequent) :] += correction
            log_z = torch.logsumexp(logits, dim=1)
            losses[rows] = log_z - logits.gather(1, index)[:, 0]
            p = logits.sub_(log_z[:, None]).exp_()
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
            p = p.mul_((row_weight[rows] * real[rows])[:, None]).to(self.lm_head.dtype)
            frequent, side_share = p.tensor_split([len(self.frequent)], dim=1)
            gradient[rows] = (frequent @ frequent_weight).float() + side_share @ side_weight
            if own is not None:
                assert own.grad is not None
                for tokens, share in ((self.frequent, frequent), (side, side_share)):
                    own.grad.index_add_(0, tokens, (share.t() @ x).to(own.dtype))
        return losses * real, gradient


def gradient_of(
    softmax: SampledSoftmax, heads: MedusaHeads, features: Tensor, targets: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """features [P,K,D], targets [P,K], weights [K] → cross-entropy [P,K] and gradient [P,K,D], by the shared lm_head or, head
    by head, by their own, which get theirs."""
    count, num_heads, _ = features.shape
    if heads.config.lm_heads == "shared":
        found = softmax.gradient(features.flatten(0, 1), targets.flatten(), row_weight.repeat(count))
        return found[0].view(count, num_heads), found[1].view_as(features)
    by_head = [
        softmax.gradient(features[:, k], targets[:, k], row_weight[k].repeat(count), own=head.lm_head.weight)  # type: ignore[arg-type,union-attr]
        for k, head in enumerate(heads.heads)
    ]
    losses, gradients = zip(*by_head, strict=True)
    return torch.stack(losses, dim=1), torch.stack(gradients, dim=1)


@torch.inference_mode()
def held_out(heads: MedusaHeads, backbone: Backbone, positions: Positions) -> HitTable:
    """Hits by rank over the whole vocabulary, on a fixed sample of the held-out positions."""
    total = HitTable(hits=torch.zeros(heads.num_heads, MAX_RANKS).long(), counts=torch.zeros(heads.num_heads).long())
    chosen = torch.randperm(len(positions.hidden), generator=torch.Generator().manual_seed(1))[:MAX_HELD_OUT]
    for part in chosen.split(128):
        guesses = heads.guesses(
            positions.hidden[part].float(),
            backbone.lm_head_for(heads.vocabulary),
            num_ranks=MAX_RANKS,
            path=positions.path[part],
        )
        total = total + count_hits(guesses, positions.targets[part])
    return total


def read_answers(files: list[Path]) -> list[dict]:
    """The rows of Parquet files and of folders of them, of more than one answer token, in the files' order."""
    columns = ["id", "source", "prompt_ids", "response_ids"]
    rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    return [row for row in rows if row["response_ids"] and len(row["response_ids"]) > 1]


def adapters_digest(adapters: Adapters) -> str:
    digest = hashlib.sha256()
    for name in sorted(adapters.tensors):
        digest.update(adapters.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of(rows: list[dict]) -> str:
    """Of what was learned from, whatever the files."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["id"], row["prompt_ids"], row["response_ids"]]).encode())
    return digest.hexdigest()[:16]


def batches(positions: Positions, size: int) -> Iterator[Tensor]:
    """Endless batches of indices, drawn by weight, a new draw each epoch."""
    count = len(positions.weight)
    while True:
        order = torch.multinomial(positions.weight, min(count, 2**24 - 1), replacement=True)
        yield from (part for part in order.split(size) if len(part) == size)


def first_heads(backbone: Backbone, config: HeadsConfig, start_from: str) -> tuple[MedusaHeads, Adapters | None]:
    """Fresh heads of this shape ("none"), shipped ones, or those of a folder, over the whole vocabulary; with the adapters of
    a MEDUSA-2 set, by which the backbone is to be tuned."""
    trained = None
    if start_from != "none":
        trained = load_checkpoint(heads_folder(start_from, backbone.name), backbone=backbone)
        config = trained.heads.config
    heads = MedusaHeads(
        config,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        lm_head_weight=backbone.lm_head_weight.detach(),
    )
    if trained is None:
        return heads, None
    heads.load_state_dict(trained.heads.state_dict())
    return heads, trained.adapters


def guessing_among(heads: MedusaHeads, targets: Tensor, size: int) -> MedusaHeads:
    """The same heads, which guess among the `size` most frequent of the targets [P,K]; among all tokens where it is 0."""
    if not size:
        return heads
    counts = torch.bincount(targets[targets != IGNORE], minlength=heads.vocab_size)
    frequent = counts.argsort(descending=True, stable=True)[:size].sort().values
    fewer = MedusaHeads(heads.config, hidden_size=heads.hidden_size, vocab_size=heads.vocab_size, vocabulary=frequent)
    fewer.load_state_dict(heads.state_dict())
    return fewer


def main(
    data: Annotated[list[Path], typer.Option(help="Parquet of id, source, prompt_ids, response_ids; repeat it")],
    out: Annotated[Path, typer.Option(help="checkpoint folder to write")],
    steps: Annotated[int, typer.Option()] = 4400,
    batch: Annotated[int, typer.Option(help="positions of a step")] = 512,
    num_heads: Annotated[int, typer.Option()] = 5,
    num_layers: Annotated[int, typer.Option()] = 2,
    kind: Annotated[str, typer.Option(help="medusa; hydra: heads that read the path")] = "medusa",
    lm_heads: Annotated[str, typer.Option(help="shared: the backbone's; own: one for each head")] = "shared",
    vocabulary: Annotated[int, typer.Option(help="most frequent tokens that the heads guess among; 0: all")] = 0,
    start_from: Annotated[
        str, typer.Option(help="'none', 'default', 'plain', 'medusa2' or a folder, whose shape is kept")
    ] = "none",
    lr: Annotated[float, typer.Option()] = 2e-3,
    warmup: Annotated[int, typer.Option()] = 60,
    source: Annotated[list[str] | None, typer.Option(help="sources of rows to use (default: all)")] = None,
    limit: Annotated[int | None, typer.Option(help="rows to use (default: all)")] = None,
    positions: Annotated[Path | None, typer.Option(help="folder that keeps hidden states from run to run")] = None,
    dtype: Annotated[
        str, typer.Option(help="of hidden states and products; the heads' weights are float32")
    ] = "float32",
    threads: Annotated[int, typer.Option(help="torch threads; 0: as torch chooses")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train heads of the default backbone on its own answers."""
    if vocabulary and lm_heads != "shared":
        raise ValueError("own lm_heads score all tokens; leave --vocabulary out")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    backbone = load_backbone(DEFAULT_BACKBONE, dtype="float32", fused=False)
    shape = HeadsConfig(num_heads=num_heads, num_layers=num_layers, lm_heads=lm_heads, kind=kind)  # type: ignore[arg-type]
    heads, adapters = first_heads(backbone, shape, start_from)
    num_heads = heads.num_heads
    reader = backbone if dtype == "float32" else load_backbone(DEFAULT_BACKBONE, dtype=dtype, fused=False)
    if adapters is not None:
        for tuned in [backbone] if reader is backbone else [backbone, reader]:
            tuned.merge(adapters)
    rows = [row for row in read_answers(data) if not source or row["source"] in source][:limit]
    learn, held = [row for row in rows if not is_held_out(row["id"])], [row for row in rows if is_held_out(row["id"])]
    train = kept_positions(positions and positions / "train.pt", learn, reader, num_heads, adapters)
    test = kept_positions(positions and positions / "held-out.pt", held or rows[:1], reader, num_heads, adapters)
    lm_head = reader.lm_head_weight.detach()
    softmax = SampledSoftmax(lm_head, train.targets)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    decay = torch.tensor([HEAD_DECAY**k for k in range(1, num_heads + 1)])
    began = time.time()
    for step, chosen in zip(range(steps), batches(train, batch), strict=False):
        targets = train.targets[chosen]
        path = heads.path_embeddings(train.path[chosen], backbone.embed)
        with torch.autocast("cpu", torch.bfloat16, enabled=reader.dtype == torch.bfloat16):
            features = heads.features(train.hidden[chosen].float(), path=path).float()
        optimizer.zero_grad()
        losses, gradient = gradient_of(softmax, heads, features.detach(), targets, decay / batch)
        share = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = lr * share
        features.backward(gradient)
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            counts = (targets != IGNORE).sum(0)
            told = ", ".join(f"{x:.3f}" for x in (losses.sum(0) / counts).tolist())
            console.print(
                f"step {step + 1}: loss by head {told}; {(step + 1) * batch / (time.time() - began):.0f} pos/s"
            )
    heads = guessing_among(heads, train.targets, vocabulary)
    accuracy = held_out(heads, backbone, test).accuracy
    paths = grow_paths(accuracy, 64)
    method = "MEDUSA-1" if adapters is None else f"heads alone behind a backbone tuned before (alpha {adapters.alpha})"
    save_checkpoint(
        out,
        heads,
        paths=paths,
        backbone_name=DEFAULT_BACKBONE,
        backbone_fingerprint=backbone.fingerprint,
        default_nodes=min(16, len(paths) + 1),
        accuracy=accuracy,
        adapters=adapters,
        card={
            "Origin": f"`python -m benchmarks.pretrain`, {datetime.now(UTC).date()}, {method}, backbone frozen.",
            "Data": {"answers": len(rows), "positions": len(train.hidden), "digest": digest_of(rows)},
            "Settings": {
                "steps": steps,
                "positions a step": batch,
                "learning rate": lr,
                "dtype of products": dtype,
                "seed": seed,
                "vocabulary": vocabulary or "all",
                "from": start_from,
            },
        },
    )
    console.print(f"{out}: {expected_tokens(accuracy, paths):.2f} tokens a step expected of {len(paths) + 1} nodes")


if __name__ == "__main__":
    run_command(main)
