"""Whether a response's answer is right.

Three tests, cheapest first: the same text, the same plain number, and math-verify on the rest (fractions, intervals,
tuples, units, text). The first two agree with math-verify wherever both have an opinion. Answers longer than
`MAX_ANSWER_CHARS` are compared as text only.
"""

import re
from decimal import Decimal
from functools import lru_cache

from services.trainer.evaluation.symbolic import comparer
from services.trainer.templates import get_template, unwrap_math

MAX_ANSWER_CHARS = 1000
# Between groups of three digits: a comma, a space of TeX's, or both. A comma and a plain space separate a list.
_SEPARATOR = r"(?:,|\{,\}|(?:,|\{,\})?(?:\\[,;:! ]|~) ?| )"
_PLAIN_NUMBER = re.compile(rf"[+-]?(\d{{1,3}}({_SEPARATOR}\d{{3}})+|\d+)(\.\d+)?", re.ASCII)
# Computer algebra compares decimals to 6 places and 15 digits, so beyond these the fast path has no opinion.
_MAX_EXACT_DIGITS = 15


def grade(template: str, response: str, answer: str) -> bool:
    """Whether `response` states `answer` in the form `template` asks for; `ConfigError` for an unknown template."""
    extracted = get_template(template).extract(response)
    return extracted is not None and is_equal(extracted, answer)


@lru_cache(maxsize=65536)
def is_equal(extracted: str, answer: str) -> bool:
    """Whether two answers, written as numbers, LaTeX or text, mean the same."""
    extracted, answer = (unwrap_math(" ".join(text.split())) for text in (extracted, answer))
    if not extracted or not answer:
        return False
    if extracted == answer:
        return True
    verdict = _compare_numbers(extracted, answer)
    if verdict is not None:
        return verdict
    if max(len(extracted), len(answer)) > MAX_ANSWER_CHARS:
        return False
    return comparer.is_equal(extracted, answer)


def _compare_numbers(extracted: str, answer: str) -> bool | None:
    """The exact verdict on two plain numbers; None when one is not plain or rounding could decide."""
    if not (_PLAIN_NUMBER.fullmatch(extracted) and _PLAIN_NUMBER.fullmatch(answer)):
        return None
    numbers = [Decimal(re.sub(_SEPARATOR, "", text)) for text in (extracted, answer)]
    if numbers[0] == numbers[1]:
        return True
    is_integral = all(number == number.to_integral_value() for number in numbers)
    is_short = all(number.adjusted() < _MAX_EXACT_DIGITS for number in numbers)
    return False if is_integral and is_short else None
