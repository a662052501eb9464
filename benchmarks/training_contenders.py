"""Whole training steps, ours and plainly written ones, over the same rows. Knows models and tensors; no process, no clock.

    B rows, S tokens of the longest row, K heads, V vocabulary, D hidden
Ours are the learners of `medusa train`, label positions and packed rows included, without what runs them: Ray's workers,
DeepSpeed's engine (ZeRO, float32 copies of bfloat16 weights), the rates' schedule, metrics, checkpoints. Naive ones pad
a batch on the right and keep every logit, as the reference implementation's scripts do. All take the same clipped AdamW
step in the weights' own type over heads of the same shape, which share the backbone's lm_head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medusa.backbone import Backbone
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.losses import IGNORE
from pipelines.config import TrainSection
from pipelines.dataset import length_of, num_positions, pack_rows
from pipelines.hidden_cache import kept_on_disk
from pipelines.learner import HeadsLearner, JointLearner, Learner
from pipelines.positions import Lane, PositionsReader
from pipelines.records import Answer
from pipelines.tuning import linear_layers, make_tunable
from pipelines.zero import learning_rates

Batch = Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the contenders of a method share. `folder` is where hidden states are kept."""

    backbone: Backbone
    heads: HeadsConfig
    train: TrainSection
    batches: Sequence[Batch]
    folder: Path

    def fresh_heads(self) -> MedusaHeads:
        backbone = self.backbone
        return MedusaHeads(
            self.heads, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, dtype=backbone.dtype,
            device=backbone.device,
        )  # fmt: skip


class Contender(Protocol):
    """A step's first half; `groups` are what is trained, by learning rate."""

    groups: dict[str, list[nn.Parameter]]

    def backward(self, number: int) -> float:
        """Leave the gradients of batch `number`; its loss in nats per label position."""


class Trainer:
    """The second half, the same for all."""

    def __init__(self, contender: Contender, train: TrainSection) -> None:
        self.contender, self._max_norm = contender, train.max_grad_norm
        self._trained = [weight for group in contender.groups.values() for weight in group]
        rates = learning_rates(train, 0)
        groups = [{"params": weights, "lr": rates[name]} for name, weights in contender.groups.items()]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=train.weight_decay)

    def step(self, number: int) -> float:
        """One optimizer step; the loss before it."""
        loss = self.contender.backward(number)
        nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss


class OurHeads:
    """MEDUSA-1: hidden states at label positions, read from the backbone where the folder does not keep them already."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._heads = setting, setting.fresh_heads()
        self.groups = {"heads": list(self._heads.parameters())}

    def backward(self, number: int) -> float:
        lane = keep(self._setting, number)
        train = self._setting.train.model_copy(update={"batch_positions": len(lane)})
        return _learn(HeadsLearner(self._heads, self._setting.backbone, train, {0: lane}))


def keep(setting: Setting, number: int) -> Lane:
    """The label positions of a batch, on disk from the first call on."""
    reader = PositionsReader(backbone=setting.backbone, num_heads=setting.heads.num_heads)
    packs = pack_rows(setting.batches[number], setting.train.sequence_length)
    total = sum(map(num_positions, setting.batches[number]))
    kept = kept_on_disk(setting.folder / f"batch-{number}", reader.read(packs), reader.empty(), total)
    return Lane(reader, packs, seed=setting.train.seed, kept=kept)


class OurJoint:
    """MEDUSA-2: packed rows, one forward for each `sequences_at_once`, adapters off for the original's distribution."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._heads = setting, setting.fresh_heads()
        make_tunable(setting.backbone, setting.train)
        self.groups = self._learner(0).groups

    def backward(self, number: int) -> float:
        return _learn(self._learner(number))

    def _learner(self, number: int) -> JointLearner:
        packs = pack_rows(self._setting.batches[number], self._setting.train.sequence_length)
        train = self._setting.train.model_copy(update={"batch_sequences": len(packs)})
        return JointLearner(self._heads, self._setting.backbone, train, {0: packs})


def _learn(learner: Learner) -> float:
    """Forward and backward over a step's micro-batches, as the training loop makes them; the loss."""
    micro_batches = learner.micro_batches(0)
    labels = float(sum(batch.num_labels for batch in micro_batches))
    total = 0.0
    for batch in micro_batches:
        torch.manual_seed(batch.seed)
        loss, *_ = learner.module(batch.data, labels, *learner.weights(0))
        loss.backward()
        total += float(loss.detach())
    return total


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Rows padded on the right: `ids` and `mask` [B,S]; `own` [B,S] the next token where the answer has it, `targets`
    [K,B,S] what each head wants there, −100 elsewhere."""

    ids: Tensor
    mask: Tensor
    own: Tensor
    targets: Tensor


def padded(rows: Batch, num_heads: int, device: torch.device) -> Padded:
    shape = (len(rows), max(map(length_of, rows)))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full((shape[0], shape[1] + num_heads + 1), IGNORE)
    for b, row in enumerate(rows):
        ids[b, : length_of(row)] = torch.tensor(row.prompt_ids + row.response_ids)
        mask[b, : length_of(row)] = 1
        labels[b, len(row.prompt_ids) : length_of(row)] = torch.tensor(row.response_ids)
    own = labels[:, 1 : shape[1] + 1]
    targets = torch.stack([labels[:, k + 1 : shape[1] + k + 1] for k in range(1, num_heads + 1)])
    targets = targets.masked_fill(own == IGNORE, IGNORE)
    return Padded(ids=ids.to(device), mask=mask.to(device), own=own.to(device), targets=targets.to(device))


class _Naive:
    """What the two plain loops share: transformers' own attention, a padded batch, all heads over all positions."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._heads = setting, setting.fresh_heads()
        self._model: Any = setting.backbone.model
        self._model.set_attn_implementation("sdpa")
        self._model.requires_grad_(False)
        self.groups = {"heads": list(self._heads.parameters())}

    def _padded(self, number: int) -> Padded:
        return padded(self._setting.batches[number], self._heads.num_heads, self._setting.backbone.device)

    def _hidden(self, model: Any, batch: Padded) -> Tensor:
        found: Tensor = model.get_decoder()(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        return found

    def _logits(self, model: Any, features: Tensor) -> Tensor:
        """features [...,D] → float32 logits [...,V]."""
        return self._setting.backbone.transform(model.get_output_embeddings()(features)).float()

    def _heads_sum(self, hidden: Tensor, batch: Padded) -> Tensor:
        """hidden [B,S,D] → Σ decay^k · summed cross-entropy of head k, by way of logits [K,B,S,V]."""
        logits = self._logits(self._model, torch.stack([head(hidden) for head in self._heads.heads]))
        # All heads in one call: indexing the logits head by head would write zeros for the others on the way back.
        nats = F.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
        decay = [self._setting.train.loss_decay**k for k in range(1, self._heads.num_heads + 1)]
        return (nats.view(len(decay), -1).sum(dim=1) * nats.new_tensor(decay)).sum()


class NaiveHeads(_Naive):
    """MEDUSA-1: the whole frozen backbone anew each step."""

    def backward(self, number: int) -> float:
        batch = self._padded(number)
        with torch.no_grad():
            hidden = self._hidden(self._model, batch)
        loss = self._heads_sum(hidden, batch) / (batch.targets[0] != IGNORE).sum()
        loss.backward()
        return float(loss.detach())


class NaiveJoint(_Naive):
    """MEDUSA-2: peft's LoRA, and a copy of the original as the teacher."""

    def __init__(self, setting: Setting) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(setting)
        self._teacher = copy.deepcopy(self._model)
        train = setting.train
        config = LoraConfig(
            r=train.lora_rank, lora_alpha=train.lora_alpha, lora_dropout=train.lora_dropout,
            target_modules=linear_layers(self._model),
        )  # fmt: skip
        torch.manual_seed(train.seed)
        student = get_peft_model(self._model, config, autocast_adapter_dtype=False).train()
        self.groups["backbone"] = [weight for weight in student.parameters() if weight.requires_grad]

    def backward(self, number: int) -> float:
        batch = self._padded(number)
        with torch.no_grad():
            original = self._logits(self._teacher, self._hidden(self._teacher, batch)).log_softmax(dim=-1)
        hidden = self._hidden(self._model, batch)
        guessed = self._logits(self._model, hidden).log_softmax(dim=-1)
        kept = batch.own != IGNORE
        divergence = F.kl_div(guessed, original, log_target=True, reduction="none").sum(dim=-1)
        heads = self._heads_sum(hidden, batch)
        loss = ((divergence * kept).sum() + self._setting.train.lambda0 * heads) / kept.sum()
        loss.backward()
        return float(loss.detach())


NAIVE, OURS, FIRST, LATER = "naive", "ours", "ours, first epoch", "ours, later epochs"
CONTENDERS: dict[str, dict[str, Callable[[Setting], Contender]]] = {
    "medusa1": {NAIVE: NaiveHeads, FIRST: OurHeads, LATER: OurHeads},
    "medusa2": {NAIVE: NaiveJoint, OURS: OurJoint},
}
