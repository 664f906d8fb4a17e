"""Fig 14: whether the teacher's reward tells right from wrong, for a teacher that helps and one that does not."""

from collections.abc import Sequence
from typing import Any

from experiments.arms import Command
from experiments.cast import BASE, BIG, FAILURE, POST, SUCCESS
from experiments.claims import Check, Claim, within
from experiments.estimates import of_aurocs
from experiments.experiment import Experiment
from experiments.findings import Findings
from experiments.panels import TRAINING_ACCURACY, Accuracies, Curve, Custom
from services.trainer.evaluation.estimates import Estimate

HELPS, FAILS = "teacher-post: helps", "teacher-big: does not"
COMPARABLE = 0.05
METRIC = "outcome/auroc"


def auroc_command(teacher: str) -> Command:
    return Command(
        name="auroc",
        arguments=(
            "--student={student}", "--teacher={redis_url}#{pool}", "--data={data}/heldout.jsonl", "--num-samples=8",
            "--max-response-tokens=320", "--max-problems=128", "--cache={samples}", "--output={output}/report.json",
            "--figure={output}/auroc.png",
        ),
        student=BASE,
        teacher=teacher,
        product="report.json",
        minutes=1.0,
    )  # fmt: skip


def auroc_of(report: dict[str, Any]) -> Estimate | None:
    """The area with its interval; None where all rollouts are right, or all wrong."""
    found = report["teachers"][0]["auroc"]
    return Estimate(**found) if found else None


def auroc_difference(first: dict[str, Any], second: dict[str, Any]) -> Estimate | None:
    """Of two teachers' rewards of the same rollouts."""
    rewards = [report["teachers"][0]["rewards"] for report in (first, second)]
    return of_aurocs(rewards[0], rewards[1], first["is_correct"], first["problems"])


def claims(found: Findings) -> Sequence[Claim]:
    helps, fails = found.arms[HELPS], found.arms[FAILS]
    areas = {label: auroc_of(found.reports[label]) for label in (HELPS, FAILS)}
    return [
        Claim(
            statement="Correct rollouts receive the higher reward, from the helping teacher and from the failing one.",
            section="6.2",
            checks=[Check(what=f"AUROC, {label}", estimate=area, low=0.5) for label, area in areas.items()],
        ),
        Claim(
            statement="The failing teacher's reward separates them about as well.",
            section="6.2",
            checks=[
                Check(
                    what="AUROC, helping minus failing",
                    estimate=auroc_difference(found.reports[HELPS], found.reports[FAILS]),
                    **within(COMPARABLE),
                )
            ],
        ),
        Claim(
            statement="So a reward that tells right from wrong does not mean that the teacher helps.",
            section="6.2",
            checks=[
                Check(what="AUROC of the failing teacher", estimate=areas[FAILS], low=0.5),
                Check(what="gain of the failing run", estimate=fails.gain(), start=fails.before(), high=COMPARABLE),
                Check(what="gain of the working run", estimate=helps.gain(), start=helps.before(), low=COMPARABLE),
            ],
        ),
    ]


def draw_rewards(label: str) -> Custom:
    """Histograms of the mean reward of correct and of incorrect rollouts."""

    def draw(axes: Any, found: Findings) -> None:
        report = found.reports[label]
        pairs = list(zip(report["teachers"][0]["rewards"], report["is_correct"], strict=True))
        for name, wanted, color in (("correct", True, "#0072B2"), ("incorrect", False, "#D55E00")):
            rewards = [reward for reward, is_correct in pairs if is_correct is wanted]
            axes.hist(rewards, bins=40, density=True, alpha=0.6, color=color, label=name)
        axes.legend(fontsize=7)

    return Custom(draw=draw, title=f"Reward of a rollout, {label}", x_label="nats per position", y_label="density")


EXPERIMENT = Experiment(
    name="fig14_reward_auroc",
    title="a reward that tells right from wrong",
    figures="Fig 14",
    section="6.2",
    setting="Rollouts of student-base, scored by teacher-post (which helps it) and by teacher-big (which does not).",
    arms={HELPS: SUCCESS, FAILS: FAILURE},
    reports={HELPS: auroc_command(POST), FAILS: auroc_command(BIG)},
    claims=claims,
    panels=(
        draw_rewards(HELPS), draw_rewards(FAILS),
        Curve(metric=METRIC, title="AUROC of the reward while training", y_label="AUROC"), TRAINING_ACCURACY,
        Accuracies(),
    ),
)  # fmt: skip
