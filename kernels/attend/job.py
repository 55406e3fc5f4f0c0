"""What a program does of a launch for heads that see rows of different tables, in columns of its *job*."""

from ..launch import constexpr

(
    SEQUENCE, HEAD, PART,  # its sequence, query head and part of the queries
    SHIFT,  # how far the first query lies behind the start of part 0; below 0: before it
    STOP,  # the first query behind those whose results it stores
    TABLE,  # the first block of its table, among those of all tables
    COPIES, COPIES_B,  # where its compacted rows begin, and how far it is from those of one sequence to the next
    INDEX, INDEX_B,  # the same of their index
    CHOSEN, CHOSEN_B,  # the same of what its block of queries chose
    FIRST, BLOCKS,  # the first token of block 0, and how many blocks were chosen
    COLUMNS,
) = (constexpr(i) for i in range(15))  # fmt: skip
KEYS = 64  # in a chosen block, also in the kernels
