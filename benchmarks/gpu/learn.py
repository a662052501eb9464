"""MEDUSA-1 and MEDUSA-2 on one device, over answers in memory. Knows `medusa`'s losses; knows no file.

    B rows, S tokens of the longest, P positions that predict an answer's token, K heads, R ranks of soft labels, D hidden
The losses are those of `medusa.losses`: the backbone's over the whole vocabulary, the heads' over the tokens that they guess
among, where a target outside them is none. What is trained is float32, under autocast where the backbone is bfloat16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.low_rank import LowRank, switched_off
from medusa.backbone import Backbone
from medusa.heads import MedusaHeads
from medusa.linear_loss import CHUNK_SIZE, Objective, TeacherTarget, Terms, linear_loss
from medusa.losses import IGNORE, HeadsLoss, Reader, SoftLabels, head_targets, heads_loss, next_tokens, true_path

Row = tuple[list[int], list[int]]  # ids of prompt and answer
CHUNKS = {
    "cpu": CHUNK_SIZE,
    "cuda": 4096,
}  # positions whose logits exist at once: a GPU has the memory, and no time to wait


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`lr` is the heads'; the adapters learn `lr / lr_ratio`. `soft_ranks` 0: hard labels alone. `lambda0` weighs the heads
    beside the backbone's own loss (MEDUSA-2). Training ends after `epochs` or at `limit_s`, whichever comes first."""

    lr: float = 1e-3
    lr_ratio: float = 4.0
    lambda0: float = 0.2
    soft_ranks: int = 0
    soft_weight: float = 0.5
    tokens_a_step: int = 32768
    tokens_at_once: int = 32768
    epochs: float = 1.0
    limit_s: float = 480.0
    warmup: float = 0.02
    seed: int = 0


@dataclass(kw_only=True)
class Log:
    """What training went through: one entry every `every` steps."""

    entries: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`ids` [B,S] padded on the right, `labels` [B,S]: the token where the backbone wrote it, −100 elsewhere."""

    ids: Tensor
    labels: Tensor

    @property
    def num_answer_tokens(self) -> int:
        return int((self.labels != IGNORE).sum())


def batches(rows: Sequence[Row], *, tokens: int, seed: int) -> Iterator[list[Row]]:
    """One epoch in batches of at most `tokens` tokens, padding included (a longer row alone); rows of like length together."""
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    groups: list[list[Row]] = [[]]
    for i in order:
        longest = sum(map(len, rows[i]))  # ascending, so the newest is the longest
        if groups[-1] and longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(rows[i])
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    yield from (groups[i] for i in shuffled.tolist() if groups[i])


def collate(rows: Sequence[Row], device: torch.device) -> Batch:
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE)
    for b, (prompt, answer) in enumerate(rows):
        ids[b, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[b, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return Batch(ids=ids.to(device), labels=labels.to(device))


def readers(heads: MedusaHeads, backbone: Backbone) -> list[Reader]:
    """What each head's features are read with: the backbone's lm_head, of the tokens guessed among, or its own."""
    shared = backbone.lm_head_weight.detach()
    if heads.vocabulary is not None:
        shared = shared[heads.vocabulary]

    def reader(own: nn.Linear | None) -> Reader:
        weight = shared if own is None else own.weight

        def read(features: Tensor, objective: Objective) -> Tensor:
            terms = [(features.to(shared.dtype), weight.to(shared.dtype))]
            return _loss(terms, objective, backbone)

        return read

    return [reader(head.lm_head) for head in heads.heads]  # type: ignore[arg-type]


def _loss(terms: Terms, objective: Objective, backbone: Backbone) -> Tensor:
    return linear_loss(terms, objective, transform=backbone.transform, chunk_size=CHUNKS[backbone.device.type])


@torch.no_grad()
def soft_labels(backbone: Backbone, hidden: Tensor, labels: Tensor, num_heads: int, settings: Settings) -> SoftLabels:
    """hidden [B,S,D] → the backbone's best tokens and shares [P,K,R] where the heads' targets stand: it predicts the target
    of head k at t from position t + k."""
    ranks, (rows, length) = settings.soft_ranks, labels.shape
    wanted = next_tokens(labels) != IGNORE
    tokens = torch.zeros(rows, length, ranks, dtype=torch.long, device=hidden.device)
    shares = torch.zeros(rows, length, ranks, device=hidden.device)
    parts = [backbone.logits(part).float().topk(ranks, dim=-1) for part in hidden[wanted].split(2048)]
    tokens[wanted] = torch.cat([best.indices for best in parts])
    shares[wanted] = torch.cat([best.values for best in parts]).softmax(dim=-1)
    places = torch.arange(length, device=hidden.device)[:, None] + torch.arange(1, num_heads + 1, device=hidden.device)
    inside = places.clamp_max(length - 1)
    real = head_targets(labels, num_heads) != IGNORE
    shares = shares[:, inside] * real[..., None]
    return SoftLabels(tokens=tokens[:, inside][wanted], shares=shares[wanted], weight=settings.soft_weight)


def places(heads: MedusaHeads, tokens: Tensor) -> Tensor:
    """Token ids, −100 for none → their places among those that the heads guess among, −100 for a token outside them."""
    if heads.vocabulary is None:
        return tokens
    place = torch.full((heads.vocab_size,), IGNORE, device=tokens.device)
    place[heads.vocabulary] = torch.arange(len(heads.vocabulary), device=tokens.device)
    return place[tokens.clamp_min(0)].where(tokens != IGNORE, IGNORE)


def heads_part(
    heads: MedusaHeads,
    backbone: Backbone,
    batch: Batch,
    hidden: Tensor,
    denominator: float,
    soft: SoftLabels | None = None,
) -> HeadsLoss:
    """The heads' loss from hidden [P,D] at the positions of a batch that predict an answer's token."""
    kept = next_tokens(batch.labels) != IGNORE
    targets = places(heads, head_targets(batch.labels, heads.num_heads)[kept])
    path = heads.path_embeddings(true_path(batch.ids, heads.num_heads)[kept], backbone.embed)
    features = heads.features(hidden, path=path)
    return heads_loss(features, targets, readers(heads, backbone), denominator=denominator, soft=soft)


def medusa1(heads: MedusaHeads, backbone: Backbone, batch: Batch, settings: Settings, denominator: float) -> HeadsLoss:
    """The heads' loss over a batch, the backbone frozen."""
    with torch.no_grad():
        hidden = backbone.hidden_states(batch.ids)
        soft = None
        if settings.soft_ranks:
            soft = soft_labels(backbone, hidden, batch.labels, heads.num_heads, settings)
            chosen = places(heads, soft.tokens)
            soft = replace(soft, tokens=chosen.clamp_min(0), shares=soft.shares * (chosen != IGNORE))
    kept = next_tokens(batch.labels) != IGNORE
    return heads_part(heads, backbone, batch, hidden[kept], denominator, soft)


def medusa2(
    heads: MedusaHeads,
    backbone: Backbone,
    layers: dict[str, LowRank],
    batch: Batch,
    settings: Settings,
    denominator: float,
) -> tuple[Tensor, Tensor, HeadsLoss]:
    """(loss, KL(original ‖ tuned) in nats a label, the heads' part): heads and adapters learn together."""
    kept = next_tokens(batch.labels) != IGNORE
    with torch.no_grad(), switched_off(layers):
        original = backbone.hidden_states(batch.ids)[kept]
    weight = backbone.lm_head_weight.detach()
    hidden = backbone.hidden_states(batch.ids)[kept]
    objective = TeacherTarget(hidden=original.to(weight.dtype), weight=weight, transform=backbone.transform)
    kl = _loss([(hidden.to(weight.dtype), weight)], objective, backbone) / denominator
    found = heads_part(heads, backbone, batch, hidden, denominator)
    return kl + settings.lambda0 * found.loss, kl.detach(), found


def train(
    heads: MedusaHeads,
    backbone: Backbone,
    rows: Sequence[Row],
    settings: Settings,
    *,
    layers: dict[str, LowRank] | None = None,
    every: int = 20,
    tell: Callable[[dict[str, float]], None] = lambda entry: None,
) -> Log:
    """Train in place: MEDUSA-2 where `layers` are given, else MEDUSA-1. Warm-up, then a cosine to zero at the end.

    `tell` hears each entry of the log as it is made.
    """
    backbone.model.requires_grad_(False)
    groups = [{"params": list(heads.parameters()), "lr": settings.lr, "most": settings.lr}]
    if layers is not None:
        adapters = [p for layer in layers.values() for p in (layer.down, layer.up)]
        groups.append(
            {
                "params": [p.requires_grad_() for p in adapters],
                "lr": settings.lr,
                "most": settings.lr / settings.lr_ratio,
            }
        )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.98))
    device, log, began = backbone.device, Log(), time.monotonic()
    total = settings.epochs * sum(len(prompt) + len(answer) for prompt, answer in rows)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16)
    for step in _steps(rows, settings):
        progress = max(log.tokens / total, (time.monotonic() - began) / settings.limit_s)
        if progress >= 1:
            break
        share = min(1.0, progress / settings.warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * share
        parts = [collate(part, device) for part in step]
        denominator = float(sum(max(part.num_answer_tokens, 1) for part in parts))
        kls, sums = 0.0, torch.zeros(heads.num_heads, device=device)
        counts = torch.zeros_like(sums)
        for part in parts:
            with cast:
                if layers is None:
                    found = medusa1(heads, backbone, part, settings, denominator)
                    loss = found.loss
                else:
                    loss, kl, found = medusa2(heads, backbone, layers, part, settings, denominator)
                    kls += float(kl)
            loss.backward()  # type: ignore[no-untyped-call]
            sums, counts = sums + found.sums.float(), counts + found.counts
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        log.steps += 1
        log.tokens += sum(len(prompt) + len(answer) for part in step for prompt, answer in part)
        if log.steps % every == 1 or every == 1:
            means = (sums / counts.clamp_min(1)).tolist()
            entry = {"step": log.steps, "tokens": log.tokens, "seconds": time.monotonic() - began, "kl": kls}
            log.entries.append(entry | {f"head{k}": value for k, value in enumerate(means, start=1)})
            tell(log.entries[-1])
    return log


def _steps(rows: Sequence[Row], settings: Settings) -> Iterator[list[list[Row]]]:
    """Micro-batches of each step, epoch after epoch."""
    at_once = max(1, round(settings.tokens_a_step / settings.tokens_at_once))
    epoch = 0
    while True:
        waiting: list[list[Row]] = []
        for batch in batches(rows, tokens=settings.tokens_at_once, seed=settings.seed * 1000 + epoch):
            waiting.append(batch)
            if len(waiting) == at_once:
                yield waiting
                waiting = []
        if waiting:
            yield waiting
        epoch += 1
