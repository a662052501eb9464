"""Who waits, whose prompt is being read, who runs, and in which slot. Knows lengths and order; knows no tensors.

Slot i is that of `running[i]`; behind them lies the one sequence whose prompt is only half read, if there is one. More
are never needed: a chunk takes either several prompts to their ends or a part of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from medusa.decoder import chunk_size
from medusa.prefix_cache import shared_tokens
from medusa.sequence import Sequence

MAX_PREFILL_ROWS = 4


class Schedule:
    """First come, first served: no prompt is begun before all that came earlier are."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.waiting: deque[Sequence] = deque()
        self.half_read: Sequence | None = None
        self.running: list[Sequence] = []

    @property
    def num_taken(self) -> int:
        """Slots in use."""
        return len(self.running) + (self.half_read is not None)

    @property
    def can_read(self) -> bool:
        """Is there a prompt to read, and a slot for it?"""
        return self.half_read is not None or bool(self.waiting and self.num_taken < self.num_slots)

    def __contains__(self, request_id: str) -> bool:
        everyone = (*self.waiting, *self.running, *([self.half_read] if self.half_read else ()))
        return any(sequence.request_id == request_id for sequence in everyone)

    def next_prompts(self, max_tokens: int, known: Callable[[Sequence], int] | None) -> list[Sequence]:
        """Whose prompts the next chunk reads, in order, and into the slots behind those running.

        The first may be too long for one chunk, and then goes alone; others join it as long as all of them, padded to
        the longest, have room within `max_tokens`. `known(sequence)` is how many prompt tokens need no reading, where
        prefixes are kept (None: they are not). A prompt that begins like one in the chunk, beyond what is known, waits
        for the next chunk: it will be known then.
        """
        half = [self.half_read] if self.half_read else []
        free = self.num_slots - len(self.running)
        chosen: list[Sequence] = []
        widest = 0
        for sequence in (*half, *islice(self.waiting, MAX_PREFILL_ROWS)):
            found = sequence.num_read or (known(sequence) if known else 0)
            left = len(sequence.prompt_ids) - found
            widest = chunk_size(max(widest, left))
            if len(chosen) == min(free, MAX_PREFILL_ROWS):
                break
            if chosen and (widest * (len(chosen) + 1) > max_tokens or (known and _gains(sequence, chosen, found))):
                break
            chosen.append(sequence)
        return chosen

    def begin(self, sequences: list[Sequence]) -> None:
        """These prompts are in whole now: their sequences run."""
        self._leave_queue(sequences)
        self.half_read = None
        self.running += sequences

    def begin_half(self, sequence: Sequence) -> None:
        """A part of this prompt is in."""
        self._leave_queue([sequence])
        self.half_read = sequence

    def _leave_queue(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence is not self.half_read:
                first = self.waiting.popleft()
                assert first is sequence, "first come, first served"


def _gains(sequence: Sequence, chosen: list[Sequence], known: int) -> bool:
    # The last token is always read, so it gains nothing.
    return any(shared_tokens(sequence.prompt_ids[:-1], other.prompt_ids) > known for other in chosen)
