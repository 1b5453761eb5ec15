"""Who holds which block of the paged cache, and which blocks can be shared. Pure integers; torch-free.

A block is in exactly one of three states:

    empty     ──allocate──▶  held (references > 0)  ──release──▶  empty, or, if it is in the prefix cache,
      ▲                          ▲                                cached (0 references, content kept, evictable)
      └────────evict─────────────┼──────────────────────────────────┘ │
                                 └───────────────acquire──────────────┘

The prefix cache maps the digest of a *full* block to the block that holds it. A digest is chained,

    digest[i] = blake2b(digest[i-1] ‖ tokens of block i),        digest[-1] = blake2b(salt, adapter)

so equal digests mean equal tokens from position 0 on, equal salts and one adapter: requests with different salts
(tenants) never share, and cannot learn from timing what another one asked; nor do requests with different adapters,
which compute other entries for the same tokens. Evicted first is what was released longest ago, and of one
request's blocks the last (a prefix is of no use without its beginning).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

from freehold.errors import EngineError

_DIGEST_BYTES = 32  # cryptographic: a tenant must not be able to construct a collision


def root_digest(salt: str | None, adapter: str | None = None) -> bytes:
    """The parent of a first block's digest. No salt and an empty salt are different salts."""
    key = b"" if adapter is None else blake2b(adapter.encode("utf-8"), digest_size=_DIGEST_BYTES).digest()
    salted = b"" if salt is None else b"salt:" + salt.encode("utf-8")
    return blake2b(salted, key=key, digest_size=_DIGEST_BYTES).digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest of one full block that follows the block with digest `parent`."""
    return blake2b(array("i", token_ids).tobytes(), key=parent, digest_size=_DIGEST_BYTES).digest()


class BlockTable:
    """One request's blocks, in order of position, and the digests of its full blocks as far as they were needed.

    epoch counts the times the table was rebuilt; within an epoch it only grows.
    """

    __slots__ = ("_ids", "blocks", "digests", "epoch", "num_published", "root")

    def __init__(self, salt: str | None = None, adapter: str | None = None) -> None:
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        self.num_published = 0  # leading blocks that are full, computed, and offered to the prefix cache
        self.epoch = 0
        self.root = root_digest(salt, adapter)
        self._ids: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The blocks as a tuple, which is made again only after the table grew (once in block_size decode steps)."""
        if len(self._ids) != len(self.blocks):
            self._ids = tuple(self.blocks)
        return self._ids

    def digest(self, index: int, token_ids: Sequence[int], block_size: int) -> bytes:
        """Digest of full block `index` of a request with these tokens; digests are made once and in order."""
        while len(self.digests) <= index:
            at = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else self.root
            self.digests.append(block_digest(parent, token_ids[at : at + block_size]))
        return self.digests[index]


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each. Never computes anything that grows with the cache's size."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks = {num_blocks} and block_size = {block_size} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._references = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks  # set: the block is in the prefix cache
        self._cached: dict[bytes, int] = {}  # digest -> block, held or not
        self._empty = list(range(num_blocks - 1, -1, -1))  # a stack, so that the lowest ids are used first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached and not held, the next victim first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now: empty ones, and cached ones that nobody holds."""
        return len(self._empty) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, held or not."""
        return len(self._cached)

    @property
    def usage(self) -> float:
        """Fraction of the blocks that requests hold."""
        return 1.0 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> list[int]:
        """The longest run of cached blocks that begin this sequence; changes nothing.

        Stops short of the last token, which has to be computed for its logits, and at the first miss, so that a prompt
        that nobody asked before costs one digest.
        """
        if not self.enable_prefix_cache:
            return []
        return list(self._cached_run(table, token_ids, 0))

    def adopt(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """Replace blocks behind the published ones by cached ones of the same content; returns how many there were.

        For a request whose next blocks another one computed in the meantime: its own are released, be they empty or
        filled in part, the table is a rebuilt one (a new epoch), and what was adopted counts as computed and published.
        Stops where `find_prefix` does.
        """
        before = table.num_published
        for block in self._cached_run(table, token_ids, before):
            self._acquire(block)
            self._release(table.blocks[table.num_published])
            table.blocks[table.num_published] = block
            table.num_published += 1
        if table.num_published > before:
            table.epoch += 1
            table._ids = ()
        return table.num_published - before

    def _cached_run(self, table: BlockTable, token_ids: Sequence[int], first: int) -> Iterator[int]:
        for index in range(first, (len(token_ids) - 1) // self.block_size):
            block = self._cached.get(table.digest(index, token_ids, self.block_size))
            if block is None:
                return
            yield block

    def allocate(self, table: BlockTable, num_tokens: int, prefix: Sequence[int] = (), spare: int = 0) -> bool:
        """Build an empty table that covers `num_tokens` positions and begins with the found prefix.

        Takes nothing and returns False unless at least `spare` blocks stay free.
        """
        if table.blocks:
            raise EngineError("block manager: allocate() on a table that already has blocks")
        fresh = max(0, self.blocks_for(num_tokens) - len(prefix))
        revived = sum(self._references[block] == 0 for block in prefix)  # these stop being free, too
        if fresh + revived + spare > self.num_free:
            return False
        for block in prefix:
            self._acquire(block)
        table.epoch += 1
        table.blocks.extend(prefix)
        self._take(fresh, table.blocks)
        table.num_published = len(prefix)
        return True

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Grow the table until it covers `num_tokens` positions; takes nothing and returns False if it cannot."""
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > self.num_free:
            return False
        self._take(missing, table.blocks)
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer the blocks that are now full and computed, of the prompt or generated, to the prefix cache.

        If another block already has the same content, this one stays private and is emptied when released.
        """
        if not self.enable_prefix_cache:
            return
        for index in range(table.num_published, num_computed // self.block_size):
            digest = table.digest(index, token_ids, self.block_size)
            block = table.blocks[index]
            if digest not in self._cached:
                self._cached[digest] = block
                self._digests[block] = digest
            table.num_published = index + 1

    def free(self, table: BlockTable) -> None:
        """Give all blocks of a table back. Cached ones keep their content until they are evicted."""
        for block in reversed(table.blocks):  # the last block first, so that it is evicted first
            self._release(block)
        table.blocks = []
        table.num_published = 0
        table._ids = ()

    def evict(self, count: int | None = None) -> int:
        """Empty up to `count` cached blocks that nobody holds (None: all of them); returns how many."""
        victims = len(self._evictable) if count is None else min(count, len(self._evictable))
        for _ in range(victims):
            self._empty.append(self._evict_one())
        return victims

    def _take(self, count: int, into: list[int]) -> None:
        """Move `count` free blocks to the end of a table: empty ones first, then evicted ones."""
        empty, references = self._empty, self._references
        for _ in range(count):
            block = empty.pop() if empty else self._evict_one()
            references[block] = 1
            into.append(block)

    def _acquire(self, block: int) -> None:
        if self._references[block] == 0:
            del self._evictable[block]
        self._references[block] += 1

    def _release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        if self._digests[block] is None:
            self._empty.append(block)
        else:
            self._evictable[block] = None

    def _evict_one(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None  # only cached blocks are evictable
        del self._cached[digest]
        self._digests[block] = None
        return block

    def check_integrity(self, tables: Iterable[BlockTable] = ()) -> None:
        """Check every invariant against the tables of all running requests; raises EngineError naming what is broken.

        Costs O(blocks): for tests, and for when nothing runs.
        """

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise EngineError(f"block manager integrity: {message}")

        tables = tuple(tables)
        held = Counter(block for table in tables for block in table.blocks)
        for table in tables:
            require(len(set(table.blocks)) == len(table.blocks), f"a table holds a block twice: {table.blocks}")
            require(table.ids == tuple(table.blocks), "a table's tuple is stale")
            for index, block in enumerate(table.blocks):
                digest = self._digests[block]
                if index < table.num_published:
                    require(digest in (None, table.digests[index]), f"block {block} is cached as another content")
                else:
                    require(digest is None, f"block {block} is cached but its holder has not filled it")
                    require(held[block] == 1, f"block {block} is shared but not full and computed")
        empty = set(self._empty)
        require(len(empty) == len(self._empty), "a block is twice in the empty list")
        for block in range(self.num_blocks):
            references = self._references[block]
            require(references == held[block], f"block {block} has {references} references, {held[block]} holders")
            states = (references > 0) + (block in empty) + (block in self._evictable)
            require(states == 1, f"block {block} is in {states} of the states held, empty, evictable, not 1")
            digest = self._digests[block]
            require(digest is None or self._cached.get(digest) == block, f"block {block}'s digest leads elsewhere")
            require((digest is not None) or block not in self._evictable, f"block {block} is evictable without content")
            require((digest is None) or block not in empty, f"block {block} is empty but cached")
        require(len(self._cached) == sum(d is not None for d in self._digests), "the prefix cache has dangling digests")
