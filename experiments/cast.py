"""The models and arms that several figures share. An arm that two figures name is trained once.

Who stands for whom: `student-base` for R1-Distill-1.5B and Qwen3-1.7B-Base, `teacher-post` (post-trained from the
student's own checkpoint) for JustRL-1.5B, `teacher-big` (twice the size, same pipeline and fault) for R1-Distill-7B,
`teacher-other` (accurate, with another way to solve) for Qwen3-4B Non-thinking.
"""

from experiments.arms import Arm, Command, Evaluation

BASE = "student-base"
POST = "teacher-post"
BIG = "teacher-big"
OTHER = "teacher-other"

SUCCESS = Arm(student=BASE, teacher=POST)
FAILURE = Arm(student=BASE, teacher=BIG, minutes=1.6)
OTHER_PATTERN = Arm(student=BASE, teacher=OTHER)
BIG_SUCCESS = Arm(student=BIG, teacher=POST, minutes=2.0)
BIG_FAILURE = Arm(student=BIG, teacher=BASE, minutes=2.0)

NO_SUPPORT = {"objective.gradient": "exact"}
"""For kinds that look at no support, which refuse the base's `policy` as a setting they would ignore."""

GRPO = Arm(
    student=BASE,
    # Scores nothing that trains: it is there for the metrics.
    teacher=POST,
    settings={
        **NO_SUPPORT,
        "objective.kind": "grpo",
        "rollout.rollouts_per_prompt": 8,
        "data.template": "boxed",
        "steps": 64,
    },
    evaluation=Evaluation(template="boxed"),
    minutes=4.5,
)
"""Table 1 at laptop size: 8 rollouts of a prompt, verified rewards alone, the template `boxed`."""

COLD_START = Command(
    name="cold-start",
    arguments=(
        "--student={student}", "--teacher={teacher}", "--prompts={data}/train_2.jsonl", "--output={output}",
        "--max-response-tokens=320", "--lr=5e-4", "--epochs=2", "--seed=0",
    ),
    student=BASE,
    teacher=OTHER,
    product="model",
    minutes=3.0,
)  # fmt: skip
"""Supervised training on `teacher-other`'s own solutions of prompts that the distillation afterwards does not use."""
