"""The choices of words from which solutions are written; the forks of the testbed.

Each table maps a wording to its weight. Forms of one table are interchangeable, so what a model knows about a table
is its distribution. Words are short because the tokenizer has 512 ids. Two forms of one table never start
alike past their first word, so a fork is one token wide.
"""

from __future__ import annotations

from random import Random

Table = dict[str, float]

# The opening shows the style, and the style decides every step after it.
OPENINGS: dict[str, Table] = {
    "columns": {"Digits first": 4, "Ones first": 4, "By digit": 2, "Ones, tens": 1},
    "rounding": {"Round first": 4, "To tens": 4, "Near tens": 2, "Round it": 1},
}
CONNECTIVES: Table = {
    "\n": 6,
    " Now ": 4,
    " Next ": 4,
    " Then ": 3,
    " And ": 2,
    " Also ": 2,
    " On ": 1,
    " OK ": 1,
    " Go ": 1,
    " / ": 1,
}
HEAD_ENDS: Table = {": ": 5, " -> ": 2, ", ": 1, " is ": 1}
EQUALS: Table = {"=": 8, " is ": 2, " gives ": 1}
CARRIES: Table = {" carry": 3, " keep": 2, " hold": 1.5, " save": 1.5, "^": 1}
BORROWS: Table = {" borrow": 3, " owe": 2, " due": 1.5, " lent": 1.5, "^": 1}
SEPARATORS: Table = {"; ": 5, ", ": 4, ". ": 2, " / ": 1.5, " then ": 1.5, " and ": 1, " & ": 0.8, " ~ ": 0.7}
RESULTS: Table = {" so ": 4, " -> ": 3, "; at ": 2, " => ": 2, ", total ": 1, " or ": 1, " | ": 1}
NEAR: Table = {" near ": 3, " to ": 2, "~": 2, " about ": 1}
LESS: Table = {" less ": 3, " minus ": 2, " down ": 1, " off ": 1}
MORE: Table = {" more ": 3, " plus ": 2, " up ": 1, " back ": 1}
ENDINGS: dict[str, Table] = {
    "dapo": {"\nAnswer: {}": 1},
    "boxed": {"\n\\boxed{{{}}}": 3, "\nSo \\boxed{{{}}}": 1, "\nIt is \\boxed{{{}}}": 1},
}


def pick(random: Random, table: Table) -> str:
    """Draw one wording by weight."""
    return random.choices(tuple(table), weights=tuple(table.values()))[0]
