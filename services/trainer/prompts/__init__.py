"""Prompts: from files and data sets to token ids, and from a seed to the prompts of every step."""

from services.trainer.prompts.problems import PromptProblem, TeacherColumn, load_problems, retemplate
from services.trainer.prompts.schedule import PromptSchedule
from services.trainer.prompts.views import Overlong, PromptView, TokenizedPrompt, tokenize_problems

__all__ = [
    "Overlong",
    "PromptProblem",
    "PromptSchedule",
    "PromptView",
    "TeacherColumn",
    "TokenizedPrompt",
    "load_problems",
    "retemplate",
    "tokenize_problems",
]
