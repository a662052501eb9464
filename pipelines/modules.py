"""What DeepSpeed trains: the heads, or the heads with the backbone. One call of `forward` a micro-batch; no worker here.

    P label positions, B packed rows, S tokens of a row, K heads, D hidden, V vocabulary
`forward` returns (loss, sums, counts): the loss to go back from; [1+K] summed nats of the backbone's own loss and of
each head's cross-entropy, and how many labels each sum is over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.backbone import Backbone
from medusa.heads import LogitTransform, MedusaHeads
from medusa.linear_loss import Objective, TeacherTarget, linear_loss
from medusa.losses import IGNORE, HeadsLoss, SoftLabels, hard_target, heads_loss, true_path
from pipelines.config import TrainSection
from pipelines.dataset import Packed
from pipelines.positions import Positions
from pipelines.tuning import adapters_off, low_rank_of

Losses = tuple[Tensor, Tensor, Tensor]


class Readout(nn.Module):
    """An lm_head as a chunked loss. It owns the weights that it reads, so that ZeRO-3 gathers them around its call."""

    def __init__(self, lm_head: nn.Module, transform: LogitTransform, chunk_size: int) -> None:
        super().__init__()
        low_rank = low_rank_of(lm_head)
        layer: Any = lm_head
        self.weight: nn.Parameter = layer.weight if low_rank is None else layer.get_base_layer().weight
        self.transform, self.chunk_size = transform, chunk_size
        self.scale = 0.0
        self.up: nn.Parameter | None = None
        if low_rank is not None:
            self.dropout, self.down, self.up, self.scale = low_rank

    def forward(self, features: Tensor, objective: Objective) -> Tensor:
        """features [P,D] → the objective's sum."""
        terms = [(features, self.weight)]
        if self.up is not None:
            terms.append((self.down(self.dropout(features)) * self.scale, self.up))
        return linear_loss(terms, objective, transform=self.transform, chunk_size=self.chunk_size)

    def logits(self, features: Tensor) -> Tensor:
        """features [...,D] → logits [...,V]; the weights must be whole (gathered)."""
        raw = F.linear(features, self.weight)
        if self.up is not None:
            raw = raw + F.linear(self.down(features) * self.scale, self.up)
        return self.transform(raw)


class HeadsModule(nn.Module):
    """MEDUSA-1: the heads, and nothing of the backbone, whose lm_head it only reads."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, train: TrainSection) -> None:
        super().__init__()
        self.heads = heads
        # In a list, so that torch and DeepSpeed do not take it for one of the module's own tensors.
        self._lm_head = [backbone.lm_head_weight.detach().to(next(heads.parameters()).dtype)]
        self._transform, self._train, self._embed = backbone.transform, train, backbone.embed
        self.own = _own_readouts(heads, backbone, train)

    def _read(self, features: Tensor, objective: Objective) -> Tensor:
        terms = [(features, self._lm_head[0])]
        return linear_loss(terms, objective, transform=self._transform, chunk_size=self._train.chunk_size)

    def forward(self, batch: Positions, denominator: float) -> Losses:
        soft = None
        if batch.soft_tokens.shape[-1]:
            soft = SoftLabels(
                tokens=batch.soft_tokens, shares=batch.soft_shares.float(), weight=self._train.soft_weight
            )
        found = heads_loss(
            self.heads.features(batch.hidden, path=self.heads.path_embeddings(batch.path.long(), self._embed)),
            batch.targets.long(),
            list(self.own) or [self._read] * self.heads.num_heads,
            decay=self._train.loss_decay,
            denominator=denominator,
            soft=soft,
        )
        return _told(found.loss, found, lm=None)


class JointModule(nn.Module):
    """MEDUSA-2: the original backbone (adapters off, no gradient), then the tuned one and its heads, in one forward."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, train: TrainSection) -> None:
        super().__init__()
        self.model: nn.Module = backbone.model
        self.heads = heads
        self.readout = Readout(backbone.model.get_output_embeddings(), backbone.transform, train.chunk_size)
        self.own = _own_readouts(heads, backbone, train)
        self._backbone, self._train = backbone, train

    def forward(self, batch: Packed, denominator: float, lambda0: float) -> Losses:
        kept = batch.own != IGNORE
        objective: Objective = hard_target(batch.own[kept])
        if self._train.tune == "lora":
            with torch.no_grad(), adapters_off(self.model):
                original = self._backbone.hidden_states(batch.ids, batch.documents)[kept]
            objective = TeacherTarget(hidden=original, weight=self.readout.weight, transform=self.readout.transform)
        hidden = self._backbone.hidden_states(batch.ids, batch.documents)[kept]
        lm = self.readout(hidden, objective)
        path = true_path(batch.ids, self.heads.num_heads)[kept]
        found = heads_loss(
            self.heads.features(hidden, path=self.heads.path_embeddings(path, self._backbone.embed)),
            batch.targets[kept],
            list(self.own) or [self.readout] * self.heads.num_heads,
            decay=self._train.loss_decay,
            denominator=denominator,
        )
        return _told(lm / denominator + lambda0 * found.loss, found, lm=lm, num_labels=int(kept.sum()))


def _own_readouts(heads: MedusaHeads, backbone: Backbone, train: TrainSection) -> nn.ModuleList:
    """A readout for each head that has its own lm_head; none where they share the backbone's."""
    own = [head.lm_head for head in heads.heads if head.lm_head is not None]
    return nn.ModuleList([Readout(layer, backbone.transform, train.chunk_size) for layer in own])  # type: ignore[arg-type]


def _told(loss: Tensor, found: HeadsLoss, *, lm: Tensor | None, num_labels: int = 0) -> Losses:
    first = torch.zeros_like(found.sums[:1]) if lm is None else lm.detach().reshape(1)
    counts = torch.cat([found.counts.new_tensor([num_labels]), found.counts])
    return loss, torch.cat([first, found.sums]), counts
