"""Templates: the exact words, and the answers they find in awkward responses."""

import pytest

from opd.errors import ConfigError
from services.trainer.templates import TEMPLATES, get_template, recognize, unwrap_math

QUESTION = "What is $1+1$?\n\nGive an integer. {braces} stay."


def test_the_texts_are_the_papers() -> None:
    assert TEMPLATES["dapo"].render("Q") == (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nQ\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    assert TEMPLATES["boxed"].render("Q") == (
        "Q Please reason step by step, and put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_rendered_prompt_is_recognised(name: str) -> None:
    assert recognize(TEMPLATES[name].render(QUESTION)) == (name, QUESTION)


def test_the_doubled_braces_of_published_sets_are_recognised() -> None:
    text = "Q Please reason step by step, and put your final answer within \\boxed{{}}."
    assert recognize(text) == ("boxed", "Q")


@pytest.mark.parametrize("text", ["", "What is 1+1?", TEMPLATES["boxed"].tail, TEMPLATES["dapo"].render("")])
def test_other_texts_are_not_recognised(text: str) -> None:
    assert recognize(text) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so\nAnswer: 42", "42"),
        ("Answer: 1\nno, wait\nAnswer: 2", "2"),
        ("Answer: $\\frac{1}{2}$", "\\frac{1}{2}"),
        ("Answer: \\(7\\).", "7"),
        ("**Answer:** 12", "12"),
        ("**Answer**: 12", "12"),
        ("**Answer: 12**", "12"),
        ("Answer: `12`", "12"),
        ("The final answer: 9 ", "9"),
        ("ANSWER: 10,000", "10,000"),
        ("Answer:\n\n$x = 3$", "x = 3"),
        ("Answer: (1, 2)\nDone.", "(1, 2)"),
        ("Answer: $5$ and $6$", "$5$ and $6$"),
        ("Answer:", None),
        ("Answer: \n  ", None),
        ("The result is 4", None),
        ("MyAnswer: 4", None),
        ("", None),
        ("it is \\boxed{4}", None),
    ],
)
def test_the_last_answer_line_is_found(response: str, answer: str | None) -> None:
    assert TEMPLATES["dapo"].extract(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("thus \\boxed{42}.", "42"),
        ("\\boxed{1} no \\boxed{2}", "2"),
        ("\\boxed {8} and \\boxed\n{9}", "9"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
        ("\\boxed{ $x$ }", "x"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{3} then \\boxed{4", "3"),
        ("\\boxed{3} as asked, within \\boxed{}.", "3"),
        ("\\boxed{a \\\\ b}", "a \\\\ b"),
        ("\\boxed{x \\boxed{y} z", "y"),
        ("} \\boxed{5} }", "5"),
        ("\\boxed{a {b} c}", "a {b} c"),
        ("\\boxed{", None),
        ("\\boxed{}", None),
        ("boxed{3}", None),
        ("Answer: 3", None),
    ],
)
def test_the_last_balanced_box_is_found(response: str, answer: str | None) -> None:
    assert TEMPLATES["boxed"].extract(response) == answer


def test_a_long_response_is_searched_in_no_time() -> None:
    assert TEMPLATES["boxed"].extract("\\boxed{" * 20_000) is None
    assert TEMPLATES["boxed"].extract("\\boxed{" * 20_000 + "7" + "}" * 20_000) == "7"
    assert TEMPLATES["dapo"].extract("answer " * 20_000) is None


@pytest.mark.parametrize(
    ("text", "inner"),
    [("$1$", "1"), ("$$1$$", "1"), ("\\[1\\]", "1"), (" a ", "a"), ("$1$,$2$", "$1$,$2$"), ("$", "$")],
)
def test_only_delimiters_around_the_whole_are_removed(text: str, inner: str) -> None:
    assert unwrap_math(text) == inner


def test_an_unknown_template_names_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'plain'; choose one of boxed, dapo"):
        get_template("plain")
