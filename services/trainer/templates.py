"""Prompt templates and the answer extractor each of them owns.

A template puts a bare question into words and knows in which form the answer is then written: grading a "dapo" response
by its last box alone would read 0 (section 5.2 of the paper has both texts). `recognize` goes the other way, from a
rendered prompt back to the bare question, so that a data set can be re-rendered in another template.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from opd.errors import ConfigError

_DAPO_HEAD = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_TAIL = '\n\nRemember to put your answer on its own line after "Answer:".'
_BOXED_TAIL = " Please reason step by step, and put your final answer within \\boxed{}."
# Published prompt sets carry this spelling: the braces of a format string that was never formatted.
_BOXED_TAIL_DOUBLED = " Please reason step by step, and put your final answer within \\boxed{{}}."

_ANSWER_LINE = re.compile(r"\banswer[*_]*[ \t]*:[\s*_`]*([^\n]+)", re.IGNORECASE)
_BOX = "\\boxed"
# An escaped character is matched, and skipped, as a whole, so that an escaped brace opens and closes nothing.
_BRACE = re.compile(r"\\boxed\s{0,9}\{|\\.|[{}]", re.DOTALL)
_MATH_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One way to ask a question and to find the answer.

    Example: ``TEMPLATES["boxed"].extract("so it is \\boxed{7}.") == "7"``.
    """

    name: str
    head: str
    tail: str
    extractor: Callable[[str], str | None]
    """Finds the answer in a response; None when it is not in this template's form."""
    alternative_tails: tuple[str, ...] = ()
    """Other spellings met in data sets: recognised, never rendered."""

    def render(self, question: str) -> str:
        return f"{self.head}{question}{self.tail}"

    def extract(self, response: str) -> str | None:
        """The answer as written, without math delimiters around it; None when there is none in this form."""
        return self.extractor(response)

    def match(self, user_text: str) -> str | None:
        """The question inside a prompt rendered with this template, or None."""
        for tail in (self.tail, *self.alternative_tails):
            is_match = user_text.startswith(self.head) and user_text.endswith(tail)
            if is_match and len(user_text) > len(self.head) + len(tail):
                return user_text[len(self.head) : len(user_text) - len(tail)]
        return None


def extract_answer_line(response: str) -> str | None:
    """What follows the last "Answer:", up to the end of its line; None when nothing does."""
    found = _ANSWER_LINE.findall(response)
    return unwrap_math(found[-1].strip().rstrip("*_`").removesuffix(".")) or None if found else None


def extract_boxed(response: str) -> str | None:
    r"""The content of the last balanced, non-empty \boxed{...}; None when there is none. One pass over the text."""
    opened: list[int | None] = []
    start, content = -1, None
    for token in _BRACE.finditer(response):
        if token.group() == "}":
            box = opened.pop() if opened else None
            if box is not None and box > start and response[box : token.start()].strip():
                start, content = box, response[box : token.start()]
        elif token.group().startswith(_BOX):
            opened.append(token.end())
        elif token.group() == "{":
            opened.append(None)
    return None if content is None else unwrap_math(content)


def unwrap_math(text: str) -> str:
    r"""Takes away blanks and one pair of $...$, $$...$$, \(...\) or \[...\] when it encloses the whole text."""
    text = text.strip()
    for opening, closing in _MATH_DELIMITERS:
        inner = text[len(opening) : len(text) - len(closing)]
        is_wrapped = text.startswith(opening) and text.endswith(closing) and inner.strip() != ""
        if is_wrapped and opening not in inner and closing not in inner:
            return inner.strip()
    return text


TEMPLATES: dict[str, Template] = {
    "dapo": Template(name="dapo", head=_DAPO_HEAD, tail=_DAPO_TAIL, extractor=extract_answer_line),
    "boxed": Template(
        name="boxed",
        head="",
        tail=_BOXED_TAIL,
        extractor=extract_boxed,
        alternative_tails=(_BOXED_TAIL_DOUBLED,),
    ),
}


def get_template(name: str) -> Template:
    """The template of this name; `ConfigError` naming the choices otherwise."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise ConfigError(f"template: unknown name {name!r}; choose one of {', '.join(sorted(TEMPLATES))}") from None


def recognize(user_text: str) -> tuple[str, str] | None:
    """Template name and bare question of a rendered prompt, or None when no template matches."""
    for template in TEMPLATES.values():
        question = template.match(user_text)
        if question is not None:
            return template.name, question
    return None
