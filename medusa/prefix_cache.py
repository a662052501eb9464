"""Keys and values of prompts and answers met before, for the next prompt that begins alike. Knows token ids; knows no model.

    Y layers, H key/value heads, E head size

Sequences are cut into blocks of BLOCK tokens, and blocks form a tree: what several sequences begin with is held once.
Keys and values depend on all tokens before them, so a block is reached only through the blocks before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 16


@dataclass(eq=False, kw_only=True)
class _Block:
    """Keys and values [Y·2,H,BLOCK,E] of `tokens`, behind those of `parent`."""

    tokens: tuple[int, ...]
    parent: _Block | None
    keys_values: Tensor
    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)


class PrefixCache:
    """At most `max_tokens` tokens' keys and values, whole blocks only; the least recently used blocks make room.

    Waste is bounded: fewer than BLOCK tokens at a sequence's end are not kept, and nothing is held twice. Everything
    belongs to one `version` of the weights; what another version brings or asks for empties the cache first.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 0:
            raise ValueError(f"max_tokens of a prefix cache must be 0 (off) or more, got {max_tokens}")
        self._max_blocks = max_tokens // BLOCK
        self._version: Hashable = None
        self._roots: dict[tuple[int, ...], _Block] = {}
        # By last use. A path is touched from its end to its beginning, so the oldest block never has children.
        self._by_use: OrderedDict[_Block, None] = OrderedDict()

    @property
    def enabled(self) -> bool:
        return self._max_blocks > 0

    @property
    def num_tokens(self) -> int:
        """Tokens held now."""
        return len(self._by_use) * BLOCK

    def known(self, tokens: Sequence[int], version: Hashable) -> int:
        """How many of the first tokens are held; asking is no use."""
        return len(self._path(tokens, version)) * BLOCK

    def take(self, tokens: Sequence[int], version: Hashable) -> list[Tensor]:
        """Keys and values of the longest beginning of `tokens` that is held, in pieces [Y·2,H,BLOCK,E] to be copied."""
        path = self._path(tokens, version)
        self._touch(path)
        return [block.keys_values for block in path]

    def keep(self, tokens: Sequence[int], read: Callable[[int, int], Tensor], version: Hashable) -> None:
        """Hold the whole blocks of a sequence. `read(start, stop)` gives a copy of the keys and values there.

        Of a sequence longer than the cache its beginning is held.
        """
        path = self._path(tokens, version)
        self._touch(path)
        for start, part in list(_blocks(tokens))[len(path) : self._max_blocks]:
            if len(self._by_use) == self._max_blocks:
                self._drop(next(iter(self._by_use)))
            parent = path[-1] if path else None
            block = _Block(tokens=part, parent=parent, keys_values=read(start, start + BLOCK))
            self._siblings(parent)[part] = block
            self._by_use[block] = None
            path.append(block)
        self._touch(path)

    def clear(self) -> None:
        self._roots.clear()
        self._by_use.clear()

    def _path(self, tokens: Sequence[int], version: Hashable) -> list[_Block]:
        if version != self._version:
            self.clear()
            self._version = version
        path: list[_Block] = []
        for _, part in _blocks(tokens) if self._by_use else ():
            block = self._siblings(path[-1] if path else None).get(part)
            if block is None:
                break
            path.append(block)
        return path

    def _siblings(self, parent: _Block | None) -> dict[tuple[int, ...], _Block]:
        return self._roots if parent is None else parent.children

    def _touch(self, path: list[_Block]) -> None:
        for block in reversed(path):
            self._by_use.move_to_end(block)

    def _drop(self, block: _Block) -> None:
        assert not block.children, "a block is used whenever one behind it is"
        del self._by_use[block]
        del self._siblings(block.parent)[block.tokens]


def shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens in the whole blocks that two sequences both begin with."""
    count = 0
    for (_, mine), (_, theirs) in zip(_blocks(one), _blocks(other), strict=False):
        if mine != theirs:
            break
        count += BLOCK
    return count


def _blocks(tokens: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(where it begins, its tokens) of each whole block."""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        yield start, tuple(tokens[start : start + BLOCK])
