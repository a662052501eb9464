"""`python -m benchmarks.gpu.train_default answer|train …`: the default backbone's heads from tens of millions of tokens.

    answer   the backbone answers prompts, and prompts that it writes itself, into Parquet
    train    MEDUSA-1 or, with `--rank`, MEDUSA-2; writes heads, adapters, tree, log
Each ends by itself after `--minutes`, whatever is done by then is whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer

from benchmarks.command import console, run_app
from benchmarks.gpu.answers import SELF_PROMPTED, answer, asked_prompts, own_prompts
from benchmarks.gpu.learn import Log, Row, Settings, train
from benchmarks.gpu.low_rank import adapt, exported
from benchmarks.gpu.pool import plain_decoder
from medusa.backbone import Backbone, load_backbone
from medusa.checkpoint import load_checkpoint, save_checkpoint
from medusa.config import HeadsConfig
from medusa.heads import MedusaHeads
from medusa.pretrained import heads_folder
from medusa.provision import DEFAULT_BACKBONE
from medusa.replay import guessed_ranks
from medusa.tree_search import MAX_RANKS, HitTable, grow_paths

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
HELD_OUT_PERCENT = 1
MAX_HELD_OUT = 200
MAX_NODES = 64
LORA_ALPHA = 16.0


@app.command("answer")
def answer_command(
    out: Annotated[Path, typer.Option(help="folder of Parquet files")],
    prompts: Annotated[list[Path] | None, typer.Option(help="JSONL of messages; repeat it")] = None,
    backbone: Annotated[str, typer.Option(help="built-in name or model folder")] = DEFAULT_BACKBONE,
    own: Annotated[int, typer.Option(help="prompts that the backbone writes itself")] = 60000,
    own_tokens: Annotated[int, typer.Option(help="of such a prompt; longer ones are dropped")] = 64,
    own_share: Annotated[float, typer.Option(min=0, max=1, help="of the time, to write them")] = 1 / 3,
    batch: Annotated[int, typer.Option(help="sequences at once")] = 1024,
    max_prompt: Annotated[int, typer.Option(help="tokens; longer prompts are left out")] = 256,
    max_tokens: Annotated[int, typer.Option(help="of an answer")] = 256,
    minutes: Annotated[float, typer.Option()] = 8.0,
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """The backbone first writes prompts, for a share of the time, and then answers what is given and what it wrote."""
    began = time.monotonic()
    base = load_backbone(backbone, dtype="bfloat16" if device == "cuda" else "float32", device=device)
    decoder = plain_decoder(base, batch=batch, max_prompt=max_prompt, max_tokens=max(max_tokens, own_tokens))
    asked = [row for file in prompts or [] for row in asked_prompts(file)]
    if own:
        end = began + 60 * minutes * own_share
        written = own_prompts(decoder, max_tokens=own_tokens, until=end, tell=told_briefly)
        asked += [(name, SELF_PROMPTED, words) for name, words in islice(written, own)]
    console.print(f"{len(asked)} prompts after {time.monotonic() - began:.0f} s")
    tokens = answer(
        decoder, asked, out, max_prompt=max_prompt, max_tokens=max_tokens, until=began + 60 * minutes, tell=told_briefly
    )
    console.print(f"{tokens} answer tokens in {out} after {time.monotonic() - began:.0f} s")


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def read_rows(folder: Path) -> tuple[list[Row], list[Row]]:
    """(rows to learn from, rows held out) of all Parquet files of a folder; an answer of one token teaches no head."""
    learn: list[Row] = []
    held: list[Row] = []
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=["id", "prompt_ids", "response_ids"]).to_pylist():
            if len(row["response_ids"]) > 1:
                (held if is_held_out(row["id"]) else learn).append((row["prompt_ids"], row["response_ids"]))
    if not learn:
        raise ValueError(f"no answers in {folder}; run `answer` first")
    return learn, held[:MAX_HELD_OUT] or learn[:1]


def frequent_tokens(rows: Sequence[Row], size: int, vocab_size: int) -> torch.Tensor | None:
    """Ascending ids of the `size` most frequent tokens of the answers; None, for all tokens, where it is 0."""
    counts = torch.bincount(torch.tensor([token for _, answer in rows for token in answer]), minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)[:size].sort().values if size else None


def make_heads(
    backbone: Backbone, start_from: str, shape: HeadsConfig, vocabulary: torch.Tensor | None = None
) -> MedusaHeads:
    """Heads to train, in float32: fresh ones ("none"), which guess among `vocabulary`, or others ("default", "plain": shipped)
    with their own. ValueError for heads of a tuned backbone: they would be trained behind the original one."""
    trained = None
    if start_from != "none":
        known = load_checkpoint(heads_folder(start_from, backbone.name), backbone=backbone, dtype=torch.float32)
        if known.adapters is not None:
            raise ValueError(
                f"{start_from} holds heads of a tuned backbone (MEDUSA-2); start from heads of the original"
            )
        trained = known.heads
        shape = trained.config
    heads = MedusaHeads(
        shape, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, dtype=torch.float32,
        device=backbone.device, lm_head_weight=backbone.lm_head_weight.detach(),
        vocabulary=vocabulary if trained is None else trained.vocabulary,
    )  # fmt: skip
    if trained is not None:
        heads.load_state_dict(trained.state_dict())
    return heads


@torch.inference_mode()
def held_out(heads: MedusaHeads, backbone: Backbone, rows: Sequence[Row]) -> HitTable:
    """Hits by rank over held-out answers."""
    cast = torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16)
    with cast:
        ranks = torch.cat(list(guessed_ranks(backbone, heads, rows, rows=512)))
    hits = torch.stack([(ranks == rank).sum(dim=0) for rank in range(MAX_RANKS)], dim=1)
    counts = torch.tensor([sum(max(len(answer) - k, 0) for _, answer in rows) for k in range(1, heads.num_heads + 1)])
    return HitTable(hits=hits, counts=counts)


@app.command("train")
def train_command(
    data: Annotated[Path, typer.Option(help="folder that `answer` wrote")],
    out: Annotated[Path, typer.Option(help="checkpoint folder; its log lies beside it")],
    backbone: Annotated[str, typer.Option(help="built-in name or model folder")] = DEFAULT_BACKBONE,
    start_from: Annotated[str, typer.Option(help="'none', 'default', 'plain' or a heads folder")] = "none",
    num_heads: Annotated[int, typer.Option()] = 5,
    num_layers: Annotated[int, typer.Option()] = 2,
    kind: Annotated[str, typer.Option(help="medusa; hydra: heads that read the path")] = "medusa",
    lm_heads: Annotated[str, typer.Option(help="shared or own")] = "shared",
    vocabulary: Annotated[int, typer.Option(help="most frequent tokens that fresh heads guess among; 0: all")] = 0,
    rank: Annotated[int, typer.Option(help="of the adapters; 0: MEDUSA-1")] = 0,
    dropout: Annotated[float, typer.Option(help="of what the adapters read")] = 0.05,
    lr: Annotated[float, typer.Option(help="of the heads")] = 1e-3,
    lambda0: Annotated[float, typer.Option()] = 0.2,
    soft: Annotated[int, typer.Option(help="ranks of soft labels (MEDUSA-1)")] = 0,
    epochs: Annotated[float, typer.Option()] = 1.0,
    minutes: Annotated[float, typer.Option()] = 8.0,
    tokens_a_step: Annotated[int, typer.Option()] = 32768,
    tokens_at_once: Annotated[int, typer.Option()] = 32768,
    device: Annotated[str, typer.Option()] = "cuda",
    dtype: Annotated[str, typer.Option(help="of the backbone; what is trained is float32")] = "bfloat16",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train one set of heads, measure it on held-out answers, save it."""
    torch.manual_seed(seed)
    base = load_backbone(backbone, dtype=dtype, device=device, fused=False)
    fingerprint = base.fingerprint
    learn, held = read_rows(data)
    shape = HeadsConfig(num_heads=num_heads, num_layers=num_layers, lm_heads=lm_heads, kind=kind)  # type: ignore[arg-type]
    heads = make_heads(base, start_from, shape, frequent_tokens(learn, vocabulary, base.vocab_size))
    settings = Settings(
        lr=lr, lambda0=lambda0, soft_ranks=soft, epochs=epochs, limit_s=60 * minutes, tokens_a_step=tokens_a_step,
        tokens_at_once=tokens_at_once, seed=seed,
    )  # fmt: skip
    layers = adapt(base.model, rank=rank, alpha=LORA_ALPHA, dropout=dropout) if rank else None
    began = time.monotonic()
    log = train(heads, base, learn, settings, layers=layers, tell=told_briefly)
    seconds = time.monotonic() - began
    hits = held_out(heads, base, held)
    top = {n: [round(float(row[:n].sum()), 4) for row in hits.accuracy] for n in (1, 5)}
    paths = grow_paths(hits.accuracy, MAX_NODES)
    save_checkpoint(
        out,
        heads,
        paths=paths,
        backbone_name=base.name,
        backbone_fingerprint=fingerprint,
        default_nodes=min(16, len(paths) + 1),
        accuracy=hits.accuracy,
        adapters=exported(layers, rank=rank, alpha=LORA_ALPHA) if layers else None,
        card=card(settings, log, rows=len(learn), seconds=seconds, rank=rank, start_from=start_from),
    )
    told = {
        "settings": asdict(settings),
        "rank": rank,
        "top": top,
        "seconds": seconds,
        "tokens": log.tokens,
        "log": log.entries,
    }
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    console.print(f"{out}: {log.steps} steps, {log.tokens} tokens in {seconds:.0f} s; top-1 {top[1]}, top-5 {top[5]}")


def told_briefly(entry: dict[str, float]) -> None:
    console.print(", ".join(f"{name} {value:.4g}" for name, value in entry.items()))


def card(settings: Settings, log: Log, *, rows: int, seconds: float, rank: int, start_from: str) -> dict[str, Any]:
    """Where the heads come from."""
    method = f"MEDUSA-2, adapters of rank {rank}" if rank else "MEDUSA-1, backbone frozen"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "Origin": f"`python -m benchmarks.gpu.train_default train`, {datetime.now(UTC).date()}, {method}, from {start_from}.",
        "Data": {"answers": rows, "tokens seen, prompts included": log.tokens},
        "Settings": asdict(settings) | {"steps": log.steps, "seconds": round(seconds), "device": where},
    }


if __name__ == "__main__":
    run_app(app)
