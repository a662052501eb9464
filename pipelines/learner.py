"""The two methods as one thing: a module to train, the micro-batches of a step, and what is measured and saved.

    K heads, R ranks
Knows tensors and the configuration; knows neither DeepSpeed's engine nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from medusa.adapters import Adapters
from medusa.backbone import Backbone
from medusa.heads import LmHead, LogitTransform, MedusaHeads
from medusa.losses import IGNORE
from pipelines.config import TrainSection
from pipelines.dataset import Order, Pack, collate, length_of
from pipelines.memory import Shape
from pipelines.modules import HeadsModule, JointModule, Readout
from pipelines.positions import Lane, Positions, PositionsReader
from pipelines.records import Answer
from pipelines.tuning import exported, set_dropout
from pipelines.zero import lambda0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward: the module's first argument, how many labels the loss is a mean over, and what seeds its dropout."""

    data: Any
    num_labels: int
    seed: int


class Learner(Protocol):
    """What the training loop needs to know of a method."""

    heads: MedusaHeads
    backbone: Backbone

    @property
    def module(self) -> nn.Module: ...

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, in groups of one learning rate each."""

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This worker's part of a step; equally many on every worker."""

    def weights(self, step: int) -> tuple[float, ...]:
        """The module's further arguments at a step."""

    def held_out_reader(self) -> tuple[PositionsReader, LmHead]:
        """What turns held-out rows into positions, and the lm_head that shared heads then read."""

    def adapters(self) -> Adapters | None:
        """What was changed in the backbone; the weights must be whole."""


class HeadsLearner:
    """MEDUSA-1: the backbone is frozen and its hidden states are known."""

    def __init__(self, heads: MedusaHeads, backbone: Backbone, train: TrainSection, lanes: dict[int, Lane]) -> None:
        self.heads, self.backbone = heads, backbone
        self.module = HeadsModule(heads, backbone, train)
        self._train, self._lanes = train, lanes

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"heads": list(self.heads.parameters())}

    def micro_batches(self, step: int) -> list[MicroBatch]:
        size = self._train.batch_positions // self._train.num_lanes
        data = Positions.joined([lane.batch(step, size) for lane in self._lanes.values()])
        return [MicroBatch(data=data, num_labels=len(data), seed=0)]

    def weights(self, step: int) -> tuple[float, ...]:
        return ()

    def held_out_reader(self) -> tuple[PositionsReader, LmHead]:
        reader = PositionsReader(backbone=self.backbone, num_heads=self.heads.num_heads)
        return reader, self.backbone.lm_head_for(self.heads.vocabulary)

    def adapters(self) -> Adapters | None:
        return None


class JointLearner:
    """MEDUSA-2: heads and backbone learn together, over packed rows. The backbone is tunable already."""

    def __init__(
        self, heads: MedusaHeads, backbone: Backbone, train: TrainSection, lanes: Mapping[int, Sequence[Pack]]
    ) -> None:
        self.heads, self.backbone = heads, backbone
        self.module = JointModule(heads, backbone, train)
        self._train, self._lanes = train, lanes
        self._orders = {
            lane: Order(sizes=[1] * len(packs), seed=lane_seed(train, lane)) for lane, packs in lanes.items()
        }

    @property
    def groups(self) -> dict[str, list[nn.Parameter]]:
        heads = list(self.heads.parameters())
        known = set(map(id, heads))
        tuned = [p for p in self.module.parameters() if p.requires_grad and id(p) not in known]
        return {"heads": heads, "backbone": tuned}

    def micro_batches(self, step: int) -> list[MicroBatch]:
        size = self._train.batch_sequences // self._train.num_lanes
        found = []
        for lane, packs in self._lanes.items():
            chosen = self._orders[lane].batch(step, size).split(self._train.sequences_at_once)
            for number, some in enumerate(chosen):
                data = collate([packs[i] for i in some.tolist()], self.heads.num_heads, self.backbone.device)
                # Named by lane, not by worker: dropout too is the same for any number of workers.
                seed = hash((self._train.seed, step, lane, number)) % 2**63
                found.append(MicroBatch(data=data, num_labels=int((data.own != IGNORE).sum()), seed=seed))
        return found

    def weights(self, step: int) -> tuple[float, ...]:
        return (lambda0(self._train, step),)

    def held_out_reader(self) -> tuple[PositionsReader, LmHead]:
        set_dropout(self.backbone.model, on=False)
        reader = PositionsReader(backbone=self.backbone, num_heads=self.heads.num_heads)
        lm_head = _TunedLmHead(
            readout=self.module.readout, vocabulary=self.heads.vocabulary, embeddings=_embeddings(self.backbone)
        )
        return reader, lm_head

    def adapters(self) -> Adapters | None:
        return exported(self.backbone, self._train)


@dataclass(frozen=True, kw_only=True)
class _TunedLmHead:
    """The lm_head as it is being trained, over some tokens or all, and the embeddings; the weights must be whole."""

    readout: Readout
    vocabulary: Tensor | None
    embeddings: Tensor

    @property
    def transform(self) -> LogitTransform:
        return self.readout.transform

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.readout.logits(hidden)
        return logits if self.vocabulary is None else logits[..., self.vocabulary]

    def embed(self, ids: Tensor, /) -> Tensor:
        """Up to their scale. Not by their layer, after whose call ZeRO-3 lets go of a weight that an lm_head may share."""
        return F.embedding(ids, self.embeddings)


def _embeddings(backbone: Backbone) -> nn.Parameter:
    return backbone.model.get_input_embeddings().weight  # type: ignore[return-value]


def shape_of(learner: Learner, rows: Sequence[Answer]) -> Shape:
    """What the memory of a step over `rows` depends on."""
    backbone, heads = learner.backbone, learner.heads
    config = backbone.model.config.get_text_config()
    return Shape(
        trainable=sum(weight.numel() for group in learner.groups.values() for weight in group),
        num_heads=heads.num_heads,
        head_layers=heads.config.num_layers,
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        layers=config.num_hidden_layers,
        inner=getattr(config, "intermediate_size", None) or backbone.hidden_size,
        longest=max(map(length_of, rows), default=0),
    )


def lane_seed(train: TrainSection, lane: int) -> int:
    return train.seed * 1000 + lane


def read_weights(learner: Learner) -> list[nn.Parameter]:
    """The weights that are read directly when heads guess, without calling the layer that owns them."""
    found = [head.lm_head.weight for head in learner.heads.heads if head.lm_head is not None]  # type: ignore[union-attr]
    readout = getattr(learner.module, "readout", None)
    if isinstance(readout, Readout):
        found += [readout.weight] + ([readout.up] if readout.up is not None else [])
        found += [_embeddings(learner.backbone)]
    return list(dict.fromkeys(found))  # type: ignore[arg-type]
