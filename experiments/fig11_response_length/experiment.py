"""Figs 11, 12, 13 and 23: how long the supervised responses may be, on chains of 20 to 28 steps."""

from collections.abc import Sequence
from typing import Any

from experiments.arms import Arm, Command
from experiments.cast import BASE, POST
from experiments.claims import Check, Claim
from experiments.estimates import difference_of
from experiments.experiment import Experiment
from experiments.findings import ArmFindings, Findings, Window
from experiments.panels import GRADIENT_NORM, OVERLAP, STUDENT_ENTROPY, Accuracies, ByPosition, Custom
from services.trainer.evaluation.estimates import Estimate

MINUTES = {32: 0.8, 64: 1.0, 128: 1.5, 256: 2.4, 512: 3.8, 768: 4.6}
"""By the longest response, in tokens: what a seed takes."""
SHORTEST, MODERATE, LONGEST = 32, 256, 768
ORDINARY, LONG = "ordinary problems", "long chains"
FIRST, LAST, MIDDLE = Window.FIRST, Window.LAST, Window.MIDDLE


def label_of(length: int) -> str:
    return f"up to {length} tokens"


def arm_of(length: int) -> Arm:
    settings = {"rollout.max_response_tokens": length, "rollout.prompts_per_step": 8}
    return Arm(student=BASE, teacher=POST, data=("train_long.jsonl",), settings=settings, minutes=MINUTES[length])


def claims(found: Findings) -> Sequence[Claim]:
    shortest, moderate, longest = (found.arms[label_of(length)] for length in (SHORTEST, MODERATE, LONGEST))
    return [
        Claim(
            statement="Very short responses teach less than moderate ones.",
            section="6.1",
            checks=[
                Check(what=f"accuracy after, {MODERATE} minus {SHORTEST} tokens",
                      estimate=moderate.accuracy_over(shortest), low=0),
            ],
        ),
        Claim(
            statement="Beyond moderate lengths there is nothing to gain.",
            section="6.1",
            checks=[
                Check(what=f"accuracy after, {LONGEST} minus {MODERATE} tokens",
                      estimate=longest.accuracy_over(moderate), high=0.02),
            ],
        ),
        Claim(
            statement="With the longest responses the overlap ratio falls late in training, with moderate ones not.",
            section="6.1",
            checks=[_late(longest, "distill/overlap_ratio", "longest", high=0),
                    _late(moderate, "distill/overlap_ratio", "moderate", low=-0.01)],
        ),
        Claim(
            statement="With the longest responses student entropy and gradient norm spike late in training.",
            section="6.1",
            checks=[
                _late(longest, metric, "longest", low=0) for metric in ("distill/entropy_student", "optim/grad_norm")
            ],
        ),
        *(_from_the_back(longest, side, section) for side, section in (("student", "6.1"), ("teacher", "D.1"))),
        *(_continuation(found, label) for label in (ORDINARY, LONG)),
    ]  # fmt: skip


def _late(arm: ArmFindings, metric: str, name: str, **limits: float) -> Check:
    return Check(what=f"{metric} with the {name} responses, change from the middle to the last steps",
                 estimate=arm.change(metric, MIDDLE, LAST), start=arm.metric(metric, FIRST), **limits)  # fmt: skip


def _from_the_back(arm: ArmFindings, side: str, section: str) -> Claim:
    metric = f"distill/entropy_{side}"
    first, last = (arm.back_minus_front(metric, window) for window in (FIRST, LAST))
    return Claim(
        statement=f"The {side}'s entropy rises at the back of the response first.",
        section=section,
        checks=[
            Check(what="entropy at the last minus at the first positions, change over training",
                  estimate=difference_of(last, first), low=0),
        ],
        conditions=[_late(arm, "distill/entropy_student", "longest", low=0)],
        note="The claim is about runs that collapse; where entropy does not rise late, nothing can be told.",
    )  # fmt: skip


def continuation_of(data: str, depths: Sequence[int], max_tokens: int, minutes: float) -> Command:
    return Command(
        name="continuation",
        arguments=(
            "--student={student}", "--teacher={teacher}", f"--data={{data}}/{data}", "--num-samples=8",
            f"--depths={','.join(map(str, depths))}", f"--max-response-tokens={max_tokens}", "--cache={samples}",
            "--output={output}/report.json", "--figure={output}/continuation.png",
        ),
        student=BASE,
        teacher=POST,
        product="report.json",
        minutes=minutes,
    )  # fmt: skip


def gains_by_depth(report: dict[str, Any]) -> list[tuple[int, Estimate]]:
    """Accuracy that the teacher's continuation adds, by the depth it starts from."""
    return [(row["depth"], Estimate(**row["gain"])) for row in report["depths"]]


def _continuation(found: Findings, label: str) -> Claim:
    report = found.reports[label]
    shallow, first = gains_by_depth(report)[0]
    decline = Estimate(**report["decline"])
    return Claim(
        statement=f"What the teacher's continuation adds falls with the depth of the student's prefix ({label}).",
        section="6.1",
        checks=[Check(what="gain at the smallest depth minus gain at the largest", estimate=decline, low=0)],
        conditions=[Check(what=f"gain at {shallow} tokens", estimate=first, low=0)],
    )


def draw_continuation(axes: Any, found: Findings) -> None:
    for label, marker in zip((ORDINARY, LONG), "os", strict=True):
        gains = gains_by_depth(found.reports[label])
        depths, values = [depth for depth, _ in gains], [gain.value for _, gain in gains]
        errors = [[gain.value - gain.low for _, gain in gains], [gain.high - gain.value for _, gain in gains]]
        axes.errorbar(depths, values, yerr=errors, color="black", marker=marker, capsize=3, label=label)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.legend(fontsize=7)


EXPERIMENT = Experiment(
    name="fig11_response_length",
    title="how long supervised responses may be",
    figures="Figs 11, 12, 13, 23",
    section="6.1, D.1",
    setting=(
        "student-base from teacher-post on chains of 20 to 28 steps, whose responses take about 500 tokens, cut off at "
        "six lengths. Hardly any long chain is solved by any model here, so accuracy is that on ordinary problems; the "
        "teacher's continuation is studied on both."
    ),
    arms={label_of(length): arm_of(length) for length in MINUTES},
    reports={
        ORDINARY: continuation_of("heldout.jsonl", (4, 8, 16, 32, 64), 320, 2.0),
        LONG: continuation_of("heldout_long.jsonl", (16, 64, 128, 256, 384), 768, 5.0),
    },
    claims=claims,
    panels=(
        Accuracies(),
        OVERLAP,
        STUDENT_ENTROPY,
        GRADIENT_NORM,
        ByPosition(metric="distill/entropy_student", title="Student entropy", y_label="nats"),
        ByPosition(metric="distill/entropy_teacher", title="Teacher entropy", y_label="nats"),
        Custom(draw=draw_continuation, title="Teacher continuation", x_label="depth of the student's prefix, tokens",
               y_label="gain in accuracy"),
    ),
)  # fmt: skip
