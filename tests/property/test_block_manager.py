"""Random use of the block manager against a model that is too simple to be wrong."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from freehold.engine.block_manager import BlockManager, BlockTable

SIZE = 3
Held = tuple[BlockTable, list[int], str | None]


class Blocks(RuleBasedStateMachine):
    """Every block remembers what was computed in it; a prefix that is found must hold exactly the tokens asked for."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(9, SIZE)
        self.content: dict[int, tuple[str | None, tuple[int, ...]]] = {}  # block -> salt and all tokens up to its end
        self.tables: list[BlockTable] = []

    @rule(
        target=held,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        salt=st.sampled_from([None, "a"]),
        spare=st.integers(0, 2),
        late=st.booleans(),
    )
    def allocate(self, tokens: list[int], salt: str | None, spare: int, late: bool) -> object:
        table = BlockTable(salt)
        prefix = self.blocks.find_prefix(table, tokens)
        assert len(prefix) * SIZE < len(tokens), "the last token must be computed"
        for index, block in enumerate(prefix):
            assert self.content[block] == (salt, tuple(tokens[: (index + 1) * SIZE]))
        free = self.blocks.num_free
        if not self.blocks.allocate(table, len(tokens), prefix, spare):
            assert self.blocks.num_free == free
            return multiple()
        assert self.blocks.num_free >= spare
        self.tables.append(table)
        if not late:
            self._compute(table, tokens, salt, len(prefix))
        return table, tokens, salt

    @rule(one=held)
    def adopt(self, one: Held) -> None:
        """What was only allocated takes what others have computed since, and computes the rest."""
        table, tokens, salt = one
        if table in self.tables and table.num_published < len(tokens) // SIZE:
            before, free = table.num_published, self.blocks.num_free
            first = before + self.blocks.adopt(table, tokens)
            assert first * SIZE < len(tokens), "the last token must be computed"
            for index in range(before, first):
                assert self.content[table.blocks[index]] == (salt, tuple(tokens[: (index + 1) * SIZE]))
            assert self.blocks.num_free >= free
            self._compute(table, tokens, salt, first)

    @rule(one=held, token=st.integers(0, 1))
    def extend(self, one: Held, token: int) -> None:
        table, tokens, salt = one
        computed = table.num_published == len(tokens) // SIZE
        if table in self.tables and computed and self.blocks.extend(table, len(tokens) + 1):
            tokens.append(token)
            self._compute(table, tokens, salt, (len(tokens) - 1) // SIZE)

    def _compute(self, table: BlockTable, tokens: list[int], salt: str | None, first: int) -> None:
        for index in range(first, len(table.blocks)):
            self.content[table.blocks[index]] = (salt, tuple(tokens[: (index + 1) * SIZE]))
        self.blocks.publish(table, tokens, len(tokens))

    @rule(one=consumes(held))
    def free(self, one: Held) -> None:
        table, _, _ = one
        self.tables.remove(table)
        self.blocks.free(table)

    @rule(count=st.integers(0, 3))
    def evict(self, count: int) -> None:
        assert self.blocks.evict(count) <= count

    @invariant()
    def intact(self) -> None:
        self.blocks.check_integrity(self.tables)
        assert self.blocks.num_free == 9 - len({block for table in self.tables for block in table.blocks})


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)
