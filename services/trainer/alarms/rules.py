"""The table of alarms: rule, remedy and where the paper gives it. A new alarm is a name, a rule, settings and a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.trainer.alarms import entropy, gradients, lengths, overlap, scores
from services.trainer.alarms.config import AlarmSettings
from services.trainer.alarms.contract import AlarmName, Finding
from services.trainer.alarms.history import History


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule takes the history and its own section of the settings, which has the alarm's name."""

    find: Callable[[History, Any], Finding | None]
    remedy: str
    section: str


RULES: dict[AlarmName, Rule] = {
    AlarmName.OVERLAP_STAGNATING: Rule(
        find=overlap.stagnating,
        remedy="try another teacher, closer to the student and with something new to teach, or a cold start on its "
        "rollouts first",
        section="3, 4.1, 5.1",
    ),
    AlarmName.OVERLAP_COLLAPSE: Rule(
        find=overlap.collapsing,
        remedy="shorten the responses, or the part of them that is supervised, and go on from a checkpoint before the "
        "collapse",
        section="6.1",
    ),
    AlarmName.DIVERGENCE_RISING: Rule(
        find=overlap.diverging,
        remedy="go back to a checkpoint before the rise with a lower optim.lr; if it rises again, try a teacher closer "
        "to the student or a cold start on its rollouts",
        section="3, 5.1",
    ),
    AlarmName.ENTROPY_COLLAPSE: Rule(
        find=entropy.collapsing,
        remedy="mix in prompts from outside the teacher's post-training data",
        section="5.2",
    ),
    AlarmName.LOW_OVERLAP_MASS: Rule(
        find=overlap.low_mass,
        remedy="do not trust the advantage; begin with a cold start on the teacher's rollouts",
        section="C.2, 5.1",
    ),
    AlarmName.CANCELLING_GRADIENTS: Rule(
        find=gradients.cancelling,
        remedy="the teacher's signal may cancel between positions: look at distill/gradient_coherence and try a "
        "teacher whose thinking pattern is closer to the student's",
        section="6.2, B.2",
    ),
    AlarmName.GRADIENT_SPIKE: Rule(
        find=gradients.spike,
        remedy="spikes come with the collapse of long responses: watch overlap and entropy by position, shorten the "
        "responses or lower optim.lr",
        section="6.1",
    ),
    AlarmName.LENGTH_EXPLOSION: Rule(
        find=lengths.exploding,
        remedy="lower rollout.max_response_tokens: rewards at late positions are the least reliable; see whether both "
        "models end with the same EOS",
        section="6.1",
    ),
    AlarmName.EOS_MISMATCH: Rule(
        find=lengths.eos_mismatch,
        remedy="compare the two chat templates and EOS tokens, and ask the teacher in its own template",
        section="5.2",
    ),
    AlarmName.SMALL_SUPPORTS: Rule(
        find=scores.small_supports,
        remedy="raise objective.score_top_k to 4 or more, or choose a wider objective.support",
        section="6.3",
    ),
    AlarmName.UNIFORM_TEACHER: Rule(
        find=scores.uniform_teacher,
        remedy="the scores carry no signal: look at the teacher's weights, dtype and prompt",
        section="",
    ),
}


def find(name: AlarmName, history: History, settings: AlarmSettings) -> Finding | None:
    """What the rule of this name sees in the history."""
    return RULES[name].find(history, getattr(settings, name))
