"""Rare tags that make every token id occur in the demonstrations.

A tag is a few fragments in brackets, in front of a question and repeated at the start of its solution. Fragments are
single characters over the whole of Unicode and the texts of the tokenizer's own tokens, so byte tokens and intermediate
merges are seen in training and no row of the embedding stays at its random start.
"""

from __future__ import annotations

from random import Random

NUM_FRAGMENTS = 3
TAG_SHARE = 0.03


def _character(random: Random) -> str:
    """A character whose UTF-8 lead byte is uniform, so that rare lead bytes are not starved."""
    lead = random.choice([*range(0x00, 0x80), *range(0xC2, 0xF5)])
    if lead < 0x80:
        return chr(lead)
    if lead < 0xE0:
        return chr((lead & 0x1F) << 6 | random.randrange(0x40))
    if lead < 0xF0:
        low = 0x800 if lead == 0xE0 else 0
        # Code points from D800 on under lead ED are surrogates and no characters.
        high = 0x800 if lead == 0xED else 0x1000
        return chr((lead & 0x0F) << 12 | random.randrange(low, high))
    low = 0x10000 if lead == 0xF0 else 0
    high = 0x10000 if lead == 0xF4 else 0x40000
    return chr((lead & 0x07) << 18 | random.randrange(low, high))


def draw_tag(random: Random, fragments: tuple[str, ...]) -> str:
    """A bracketed tag; digits part the fragments because a digit ends every token beside it."""
    parts = [str(random.randrange(10))]
    for _ in range(NUM_FRAGMENTS):
        fragment = random.choice(fragments) if fragments and random.random() < 0.5 else _character(random)
        parts += [fragment, str(random.randrange(10))]
    return "[" + "".join(parts) + "] "
