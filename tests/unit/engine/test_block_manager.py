"""The block manager: who holds what, what is shared, what is evicted first."""

from __future__ import annotations

import pytest

from freehold.engine.block_manager import BlockManager, BlockTable, block_digest, root_digest
from freehold.errors import EngineError

TOKENS = list(range(1, 101))


def filled(blocks: BlockManager, tokens: list[int], salt: str | None = None) -> BlockTable:
    """A table whose tokens are all computed and published."""
    table = BlockTable(salt)
    assert blocks.allocate(table, len(tokens), blocks.find_prefix(table, tokens))
    blocks.publish(table, tokens, len(tokens))
    return table


def test_a_table_covers_its_tokens() -> None:
    blocks = BlockManager(8, 4)
    table = BlockTable()
    assert blocks.allocate(table, 9)
    assert len(table.ids) == 3
    assert blocks.extend(table, 12)
    assert len(table.ids) == 3, "nothing to extend yet"
    assert blocks.extend(table, 13)
    assert len(table.ids) == 4
    assert blocks.usage == 0.5
    blocks.check_integrity([table])
    blocks.free(table)
    assert blocks.num_free == 8
    blocks.check_integrity()


def test_what_does_not_fit_takes_nothing() -> None:
    blocks = BlockManager(3, 4)
    table = BlockTable()
    assert not blocks.allocate(table, 13)
    assert not blocks.allocate(table, 12, spare=1)
    assert blocks.num_free == 3
    assert blocks.allocate(table, 12)
    assert not blocks.extend(table, 13)
    assert len(table.blocks) == 3
    blocks.check_integrity([table])


def test_the_tuple_is_made_again_only_when_the_table_grew() -> None:
    blocks = BlockManager(8, 4)
    table = BlockTable()
    blocks.allocate(table, 4)
    first = table.ids
    blocks.extend(table, 4)
    assert table.ids is first
    blocks.extend(table, 5)
    assert table.ids[:1] == first


def test_epoch_changes_when_a_table_is_rebuilt() -> None:
    blocks = BlockManager(8, 4)
    table = BlockTable()
    blocks.allocate(table, 4)
    before = table.epoch
    blocks.extend(table, 8)
    assert table.epoch == before
    blocks.free(table)
    blocks.allocate(table, 4)
    assert table.epoch != before


def test_a_prefix_is_shared_and_counted() -> None:
    blocks = BlockManager(8, 4)
    first = filled(blocks, TOKENS[:10])
    second = BlockTable()
    prefix = blocks.find_prefix(second, TOKENS[:11])
    assert prefix == first.blocks[:2], "two full blocks; the third is not full"
    assert blocks.allocate(second, 11, prefix)
    assert blocks.num_free == 8 - 3 - 1
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.check_integrity([second])
    blocks.free(second)
    assert blocks.num_free == 8
    assert blocks.num_cached == 2


def test_the_last_token_is_always_left_to_compute() -> None:
    blocks = BlockManager(8, 4)
    first = filled(blocks, TOKENS[:8])
    assert blocks.find_prefix(BlockTable(), TOKENS[:8]) == first.blocks[:1]
    assert blocks.find_prefix(BlockTable(), TOKENS[:9]) == first.blocks[:2]


def test_salts_do_not_share() -> None:
    blocks = BlockManager(16, 4)
    tables = [filled(blocks, TOKENS[:8], salt) for salt in (None, "", "a", "b")]
    assert len({block for table in tables for block in table.blocks}) == 8
    assert blocks.find_prefix(BlockTable("a"), TOKENS[:9]) == tables[2].blocks
    assert len({root_digest(salt) for salt in (None, "", "a", "b")}) == 4


def test_adapters_do_not_share() -> None:
    roots = {root_digest(salt, adapter) for salt in (None, "", "a", "b") for adapter in (None, "", "a", "b")}
    assert len(roots) == 16
    assert BlockTable("a", "b").root == root_digest("a", "b") != BlockTable("a").root


def test_a_digest_depends_on_all_that_came_before() -> None:
    root = root_digest(None)
    assert block_digest(root, [1, 2]) == block_digest(root, (1, 2))
    assert block_digest(root, [1, 2]) != block_digest(root, [2, 1])
    assert block_digest(block_digest(root, [1, 2]), [3, 4]) != block_digest(block_digest(root, [9, 2]), [3, 4])


def test_generated_blocks_are_cached_as_well() -> None:
    blocks = BlockManager(8, 4)
    tokens = TOKENS[:3]
    table = BlockTable()
    blocks.allocate(table, 3)
    for token in TOKENS[3:9]:
        tokens.append(token)
        blocks.extend(table, len(tokens))
        blocks.publish(table, tokens, len(tokens) - 1)
    assert table.num_published == 2
    assert blocks.find_prefix(BlockTable(), TOKENS[:20]) == table.blocks[:2]


def test_the_same_content_twice_is_cached_once() -> None:
    blocks = BlockManager(8, 4)
    one, two = BlockTable(), BlockTable()
    for table in (one, two):  # neither finds the other's: both compute
        blocks.allocate(table, 5)
    for table in (one, two):
        blocks.publish(table, TOKENS[:5], 5)
    blocks.check_integrity([one, two])
    assert blocks.num_cached == 1
    blocks.free(two)
    blocks.free(one)
    blocks.check_integrity()
    assert blocks.num_cached == 1


def test_eviction_takes_the_longest_unused_and_of_it_the_end() -> None:
    blocks = BlockManager(4, 4)
    old = filled(blocks, TOKENS[:8])
    new = filled(blocks, TOKENS[50:58])
    old_blocks = list(old.blocks)
    blocks.free(old)
    blocks.free(new)
    table = BlockTable()
    blocks.allocate(table, 4)
    assert table.blocks == [old_blocks[1]]
    assert blocks.find_prefix(BlockTable(), TOKENS[:9]) == [old_blocks[0]]
    assert len(blocks.find_prefix(BlockTable(), TOKENS[50:60])) == 2


def test_use_renews() -> None:
    blocks = BlockManager(4, 4)
    old, new = filled(blocks, TOKENS[:4]), filled(blocks, TOKENS[50:54])
    blocks.free(old)
    blocks.free(new)
    again = BlockTable()
    blocks.allocate(again, 5, blocks.find_prefix(again, TOKENS[:5]))
    blocks.free(again)
    assert blocks.evict(1) == 1
    assert blocks.find_prefix(BlockTable(), TOKENS[:5]), "used more recently"
    assert not blocks.find_prefix(BlockTable(), TOKENS[50:55])


def test_empty_blocks_are_used_before_cached_ones_are_evicted() -> None:
    blocks = BlockManager(4, 4)
    blocks.free(filled(blocks, TOKENS[:8]))
    table = BlockTable()
    blocks.allocate(table, 8)
    assert blocks.num_cached == 2


def test_held_blocks_are_never_evicted() -> None:
    blocks = BlockManager(4, 4)
    held = filled(blocks, TOKENS[:8])
    assert blocks.evict() == 0
    assert blocks.find_prefix(BlockTable(), TOKENS[:9]) == held.blocks


def test_without_a_prefix_cache_nothing_is_found() -> None:
    blocks = BlockManager(4, 4, enable_prefix_cache=False)
    blocks.free(filled(blocks, TOKENS[:8]))
    assert blocks.find_prefix(BlockTable(), TOKENS[:9]) == []
    assert blocks.num_cached == 0


def test_a_cold_prompt_costs_one_digest() -> None:
    blocks = BlockManager(400, 4)
    table = BlockTable()
    assert blocks.find_prefix(table, list(range(1000))) == []
    assert len(table.digests) == 1


def test_integrity_names_a_leak_and_a_wrong_share() -> None:
    blocks = BlockManager(4, 4)
    table = filled(blocks, TOKENS[:6])
    with pytest.raises(EngineError, match="1 references, 0 holders"):
        blocks.check_integrity()
    other = BlockTable()
    other.blocks = [table.blocks[1]]  # the block that is not full
    blocks._references[table.blocks[1]] = 2
    with pytest.raises(EngineError, match="shared but not full"):
        blocks.check_integrity([table, other])


# ── adopting ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_another_one_computed_meanwhile_is_adopted() -> None:
    blocks = BlockManager(16, 4)
    first, second = BlockTable(), BlockTable()
    assert blocks.allocate(first, 14)
    assert blocks.allocate(second, 13)
    before, epoch = second.ids, second.epoch
    assert blocks.adopt(second, TOKENS[:13]) == 0
    assert (second.ids, second.epoch) == (before, epoch)
    blocks.publish(first, TOKENS[:14], 9)
    assert blocks.adopt(second, TOKENS[:13]) == 2
    assert second.ids == first.ids[:2] + before[2:]
    assert second.epoch > epoch, "a runner must not append to the old table"
    assert second.num_published == 2
    assert blocks.num_free == 16 - 4 - 2
    blocks.check_integrity([first, second])
    blocks.publish(first, TOKENS[:14], 14)
    assert blocks.adopt(second, TOKENS[:13]) == 1, "the last token has to be computed"
    blocks.free(first)
    blocks.free(second)
    assert blocks.num_free == 16
    blocks.check_integrity()


def test_the_last_token_is_not_adopted() -> None:
    blocks = BlockManager(16, 4)
    filled(blocks, TOKENS[:8])
    table = BlockTable()
    assert blocks.allocate(table, 8)
    assert blocks.adopt(table, TOKENS[:8]) == 1


def test_nothing_is_adopted_across_salts_or_without_a_cache() -> None:
    for blocks, salt in ((BlockManager(16, 4), "a"), (BlockManager(16, 4, enable_prefix_cache=False), None)):
        filled(blocks, TOKENS[:12])
        table = BlockTable(salt)
        assert blocks.allocate(table, 12)
        assert blocks.adopt(table, TOKENS[:12]) == 0
