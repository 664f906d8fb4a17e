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
    teacher=None,
    settings={
        **NO_SUPPORT,
        "objective.kind": "grpo",
        "rollout.rollouts_per_prompt": 8,
        "data.template": "boxed",
        "steps": 96,
        "optim.lr": 8e-5,
    },
    evaluation=Evaluation(template="boxed"),
    minutes=6.5,
)
"""Table 1 at laptop size: 8 rollouts of a prompt, verified rewards alone, the template `boxed`.

The rate is lower than the base's 2e-4, at which the accuracy of training rollouts rose and fell again within 40 steps:
one bit a rollout is a noisier signal than a teacher's distributions.
"""

COLD_START = Command(
    name="cold-start",
    arguments=(
        "student.model={student}", "teacher.model={teacher}", 'data.files=["{data}/train_2.jsonl"]', "data.share=1.0",
        "data.template=dapo", "rollout.rollouts_per_prompt=8", "rollout.max_prompt_tokens=256",
        "rollout.max_response_tokens=320", "sft.sequence_tokens=1024", "sft.rows_per_batch=4",
        "sft.max_micro_batch_tokens=4096", "sft.num_epochs=2", "sft.optim.lr=1.5e-3", "run_dir={output}",
    ),
    student=BASE,
    teacher=OTHER,
    product="model",
    minutes=9.0,
)  # fmt: skip
"""Supervised training on `teacher-other`'s own solutions of prompts that the distillation afterwards does not use.

A new way to solve takes a model of this size many examples: after one solution of each prompt, three times over, it had
lost its old way and not learned the new one (accuracy 0.59 before, 0.10 after); after four of each it had 0.19, after
eight of each, twice over, 0.79.
"""
