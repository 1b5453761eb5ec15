"""Wrong block managers: each shares, keeps or returns a block when it must not. `test_schedule` must catch them all."""

from __future__ import annotations

from collections.abc import Sequence

from freehold.engine.block_manager import BlockManager, BlockTable, root_digest


class ForgetsTheSalt(BlockManager):
    """Tenants share blocks."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        table.root = root_digest(None)
        return super().find_prefix(table, token_ids)


class ForgetsTheParent(BlockManager):
    """A block is found wherever its own tokens occur, whatever came before them."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        self._unchain(table, token_ids)
        return super().find_prefix(table, token_ids)

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        self._unchain(table, token_ids)
        super().publish(table, token_ids, num_computed)

    def _unchain(self, table: BlockTable, token_ids: Sequence[int]) -> None:
        size = self.block_size
        table.digests = [
            BlockTable(None).digest(0, token_ids[at : at + size], size)
            for at in range(0, len(token_ids) // size * size, size)
        ]


class SharesPartialBlocks(BlockManager):
    """Publishes a block as soon as its first token is computed."""

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        size = self.block_size
        super().publish(table, token_ids, min(-(-num_computed // size) * size, len(token_ids) // size * size))


class SharesRejectedDrafts(BlockManager):
    """Publishes every block of the table, also where only drafts were written."""

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        padded = [*token_ids, *[1] * self.block_size]
        super().publish(table, padded, len(table.blocks) * self.block_size)


class ReusesTheLastToken(BlockManager):
    """Takes the whole prompt from the cache, so that nothing is left to compute the logits of."""

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        return super().find_prefix(table, [*token_ids, 1])


class KeepsEvictedDigests(BlockManager):
    """Evicts a block but leaves it in the prefix cache."""

    def _evict_one(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        return block


class LeaksSharedBlocks(BlockManager):
    """Forgets to count one of the two who gave a shared block back."""

    def _release(self, block: int) -> None:
        if self._references[block] != 2:
            super()._release(block)


class FreesSharedBlocks(BlockManager):
    """Frees a block with its first holder, though another still reads it."""

    def _release(self, block: int) -> None:
        self._references[block] = 1
        super()._release(block)


class KeepsAdoptedBlocks(BlockManager):
    """Forgets to give back the blocks that adopted ones replace."""

    def adopt(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        own, before = list(table.blocks), table.num_published
        adopted = super().adopt(table, token_ids)
        for block in own[before : before + adopted]:
            if block in self._empty:
                self._empty.remove(block)
        return adopted


class AdoptsTheFirst(BlockManager):
    """Adopts one block of any content."""

    def adopt(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        at = table.num_published
        if at < (len(token_ids) - 1) // self.block_size and self._cached:
            self._cached.setdefault(table.digest(at, token_ids, self.block_size), next(iter(self._cached.values())))
        return super().adopt(table, token_ids)
