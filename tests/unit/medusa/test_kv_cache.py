"""Slots: append, compact, move, free — against a plain list of positions."""

from __future__ import annotations

import torch

from medusa.kv_cache import KVCache

LAYERS, SLOTS, CAPACITY, HEADS, SIZE = 2, 3, 10, 2, 4


def cache() -> KVCache:
    return KVCache(
        num_layers=LAYERS, num_slots=SLOTS, capacity=CAPACITY, num_kv_heads=HEADS, head_dim=SIZE,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def write(store: KVCache, first_slot: int, offsets: list[int], num_new: int, base: float) -> None:
    """Position p of row r in layer y gets the value base + 100 y + 10 r + p everywhere (negated for values)."""
    store.begin(first_slot=first_slot, offsets=torch.tensor(offsets), num_new=num_new, length=CAPACITY)
    for layer in range(LAYERS):
        rows = torch.stack(
            [base + 100 * layer + 10 * r + offset + torch.arange(num_new) for r, offset in enumerate(offsets)]
        )
        new = rows[:, None, :, None].expand(-1, HEADS, -1, SIZE).float()
        keys, values = store.update(new, -new, layer)
        assert keys.shape == (len(offsets), HEADS, CAPACITY, SIZE)
        torch.testing.assert_close(keys, -values, rtol=0, atol=0, equal_nan=True)


def held(store: KVCache, slot: int, layer: int = 0) -> list[float]:
    one, *others = store.store[2 * layer, slot].permute(0, 2, 1).flatten(0, 1).tolist()  # each head and each component
    assert all(other == one for other in others)
    return one


def test_rows_write_behind_their_own_offsets_and_nowhere_else() -> None:
    store = cache()
    write(store, 1, [2, 5], 3, base=0)
    assert held(store, 0) == [0] * 10
    assert held(store, 1) == [0, 0, 2, 3, 4, 0, 0, 0, 0, 0]
    assert held(store, 2, layer=1) == [0, 0, 0, 0, 0, 115, 116, 117, 0, 0]


def test_compaction_keeps_the_path_in_order_although_sources_and_targets_overlap() -> None:
    store = cache()
    write(store, 0, [1, 0], 6, base=0)
    before = [held(store, slot) for slot in range(2)]
    kept = torch.tensor([[0, 2, 3, 5], [0, 1, 4, -1]])
    store.compact(first_slot=0, offsets=torch.tensor([1, 0]), kept=kept)
    assert held(store, 0)[:5] == [before[0][i] for i in (0, 1, 3, 4, 6)]
    assert held(store, 1)[:3] == [before[1][i] for i in (0, 1, 4)]
    assert held(store, 1)[3] == before[1][3], "a slot past the path stays as it is"
    assert held(store, 2) == [0] * 10


def test_a_moved_sequence_leaves_nothing_of_the_former_tenant() -> None:
    store = cache()
    write(store, 0, [0, 0], 8, base=1)
    store.move(1, 0, 3)
    assert held(store, 0) == [11, 12, 13, 0, 0, 0, 0, 0, 0, 0]


def test_a_freed_slot_is_zero_even_where_it_held_nan() -> None:
    store = cache()
    write(store, 0, [0], 4, base=float("nan"))
    store.free(0)
    assert (store.store[:, 0] == 0).all()


def test_what_was_read_from_one_slot_is_written_into_another() -> None:
    store = cache()
    write(store, 0, [0, 0], 8, base=1)
    pieces = [store.read(1, 0, 3), store.read(1, 3, 5)]
    store.store[:, 1] = float("nan")  # a copy does not change with its source
    assert store.write(2, pieces) == 5
    assert held(store, 2) == [11, 12, 13, 14, 15, 0, 0, 0, 0, 0]
    assert held(store, 2, layer=1) == [111, 112, 113, 114, 115, 0, 0, 0, 0, 0]
    store.free(2)
    assert (store.store[:, 2] == 0).all()
