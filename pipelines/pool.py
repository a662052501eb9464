"""Rows through a Ray Data actor pool into a folder of Parquet files, each exactly once. Knows no prompt and no engine.

An actor's output is written into a hidden folder of the run and committed by renaming whole files into the folder, so
a file there is complete. Whoever comes next, after a death at any moment, first takes over the complete files of the
dead run and then settles what is there twice. A row bears a key (rows with the same key are made together) and an
`error`, null where all went well.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import DistillSection
from pipelines.errors import StageError
from pipelines.failures import meaning
from pipelines.folder_lock import alone_in
from pipelines.stage import Progress, Step, polled

logger = logging.getLogger(__name__)

RUN = ".run-"  # folders of runs under way; hidden from whoever globs for *.parquet


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A folder of rows and who makes them. `worker(*args)` is built once in each actor; a table in, a table out."""

    folder: Path
    key: str
    worker: type
    args: tuple[Any, ...]
    settings: DistillSection

    def alone(self) -> AbstractContextManager[None]:
        """Nobody else writes into the folder meanwhile. Raises StageError where somebody does."""
        return alone_in(self.folder)

    def done(self) -> dict[str, bool]:
        """Key → did it fail?, for all that is there. Adopts what dead runs left and settles what is there twice."""
        adopt(self.folder)
        return settle(self.folder, self.key)

    def run(self, rows: pa.Table, watch: Watch) -> None:
        """Make the rows. Raises StageError; what was committed by then stays, and the next run asks for the rest."""
        run_folder = self.folder / f"{RUN}{uuid.uuid4().hex[:8]}"
        run_folder.mkdir()
        with polled(lambda: watch.look(run_folder), watch.progress):
            try:
                self._stream(rows, run_folder)
            except Exception as error:
                adopt(self.folder)
                raise _one_line(error) from error
        watch.progress(watch.look(run_folder))
        self.done()

    def _stream(self, rows: pa.Table, run_folder: Path) -> None:
        import ray.data
        from ray.data import SaveMode

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.issue_detectors_config.detectors = []
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # `watch` tells what is under way
        settings = self.settings
        size = max(1, min(settings.rows_per_file, -(-rows.num_rows // settings.num_actors)))
        blocks = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
        made = ray.data.from_arrow(blocks).map_batches(
            self.worker,
            fn_constructor_args=self.args,
            batch_format="pyarrow",
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=min(settings.num_actors, len(blocks))),
            num_cpus=settings.cpus_per_actor if not settings.gpus_per_actor else None,
            num_gpus=settings.gpus_per_actor or None,
        )
        made.write_parquet(str(run_folder), mode=SaveMode.APPEND)


class Watch:
    """What a run has finished so far, read from its files; each file is read once."""

    def __init__(
        self, progress: Progress, *, key: str, done_before: int, total: int, clock: Any, what: str = "prompts"
    ) -> None:
        self.progress = progress
        self._what = what
        self.keys = 0
        self.tokens = 0
        self.reasons: Counter[str] = Counter()
        self._key = key
        self._before = done_before
        self._total = total
        self._clock = clock
        self._began = self._last = clock()
        self._seen: set[str] = set()

    @property
    def tokens_per_s(self) -> float:
        """From the beginning, loading of the model included, to the last file that was finished."""
        return self.tokens / max(self._last - self._began, 1e-9)

    @property
    def done(self) -> int:
        return min(self._before + self.keys, self._total)

    def look(self, run_folder: Path) -> Step:
        """Take in the files that are complete by now."""
        for file in sorted(run_folder.glob("*.parquet")):
            if file.name in self._seen:
                continue
            try:
                table = pq.read_table(file, columns=[self._key, "response_ids", "finish_reason", "error"])
            except (pa.ArrowException, OSError):
                continue  # still being written
            self._seen.add(file.name)
            self._last = self._clock()
            self.keys += pc.count_distinct(table[self._key]).as_py()
            self.tokens += pc.sum(pc.list_value_length(table["response_ids"])).as_py() or 0
            failed = pc.is_valid(table["error"])
            reasons = pc.if_else(failed, "error", table["finish_reason"]).to_pylist()
            self.reasons.update(str(reason) for reason in reasons)
        return Step(done=self.done, total=self._total, note=self.note)

    @property
    def note(self) -> str:
        if not self._seen:
            return self._what
        reasons = ", ".join(f"{name} {count}" for name, count in sorted(self.reasons.items()))
        return f"{self._what}, {self.tokens_per_s:.0f} tokens/s ({reasons})"


def adopt(folder: Path) -> int:
    """Commit the complete files of runs that ended, drop the torn ones; how many rows were saved."""
    saved = 0
    for run_folder in sorted(folder.glob(f"{RUN}*")):
        for file in sorted(run_folder.glob("*.parquet")):
            try:
                rows = pq.read_metadata(file).num_rows  # the footer is written last
            except (pa.ArrowException, OSError):
                logger.warning("%s was cut off while it was written; its prompts are asked again", file.name)
                continue
            saved += rows
            os.replace(file, folder / f"{run_folder.name.removeprefix(RUN)}-{file.name}")
        # A worker that outlives its driver may write here still; what it adds is adopted, and settled, by the next run.
        shutil.rmtree(run_folder, ignore_errors=True)
    return saved


def settle(folder: Path, key: str) -> dict[str, bool]:
    """Leave one version of each key's rows: one without an error before one with, then the longer. Key → did it fail?

    A version is what one file holds of a key. Which one wins depends on the files alone, so a death half-way through
    costs nothing: the next call ends what this one began.
    """
    versions: dict[str, list[tuple[bool, int, str]]] = defaultdict(list)
    files = sorted(folder.glob("*.parquet"))
    for file in files:
        rows, failed = Counter[str](), set()
        for row in _columns(file, [key, "error"]):
            rows[row[key]] += 1
            if row["error"] is not None:
                failed.add(row[key])
        for name, count in rows.items():
            versions[name].append((name in failed, -count, file.name))
    best = {name: min(options) for name, options in versions.items()}
    superseded: dict[str, set[str]] = defaultdict(set)
    for name, options in versions.items():
        for _, _, file_name in options:
            if file_name != best[name][2]:
                superseded[file_name].add(name)
    for file in files:
        if names := superseded.get(file.name):
            _drop(file, key, names)
    return {name: failed for name, (failed, _, _) in best.items()}


def _drop(file: Path, key: str, names: set[str]) -> None:
    """Rewrite a file without some keys' rows, whole or not at all."""
    table = pq.read_table(file)
    left = table.filter(pc.invert(pc.is_in(table[key], value_set=pa.array(sorted(names)))))
    if not left.num_rows:
        file.unlink()
        return
    rewritten = file.with_name(f".{file.name}.part")
    pq.write_table(left, rewritten)
    os.replace(rewritten, file)


def _columns(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    try:
        return pq.read_table(file, columns=list(columns)).to_pylist()
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError) as error:
        raise StageError(f"{file} is not a file of ours: {' '.join(str(error).split()):.200}") from None


def _one_line(error: Exception) -> Exception:
    """What the user can act upon, of an error that Ray carried here as text from an actor or a writing task."""
    said = re.search(rf"^{re.escape(StageError.__module__)}\.{StageError.__name__}: (.+)$", str(error), re.MULTILINE)
    if said is not None:
        return StageError(said[1])
    known = meaning(str(error), lower="distill.batch_size, distill.context_length or distill.num_actors")
    return StageError(f"{known}, and run this again: nothing finished is lost") if known else error
