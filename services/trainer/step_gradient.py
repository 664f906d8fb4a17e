"""The gradient of one step, added up over its parts as they come and divided once, when all are known.

Each part adds the gradient of its loss as a sum; what the mean is over is only known at the end, since a rollout may
still be lost. Divided and not yet clipped it is the gradient of the mean over the whole step, whatever the parts were
and in whichever order they came, up to rounding in fp32.
"""

from collections.abc import Iterable, Sequence

from opd.errors import NonFiniteError
from services.trainer.batch import ScoredRollout, build_batch, micro_batches
from services.trainer.diagnostics.means import Mean, joined
from services.trainer.distributed.step_scope import LocalStep, StepScope
from services.trainer.loss import DistillLoss
from services.trainer.objectives.aggregation import denominator
from services.trainer.objectives.config import Aggregation
from services.trainer.student import Student, StudentOptimizer


class StepGradient:
    """Takes scored rollouts in any order; `finish` leaves the gradient of their mean in the student's parameters."""

    def __init__(
        self,
        student: Student,
        loss: DistillLoss,
        optimizer: StudentOptimizer,
        *,
        max_tokens: int,
        aggregation: Aggregation = Aggregation.TOKEN_MEAN,
        scope: StepScope | None = None,
    ) -> None:
        """`max_tokens` is the most of one forward and backward pass; `scope` tells of other ranks."""
        self.trained: list[ScoredRollout] = []
        self._student = student
        self._loss = loss
        self._optimizer = optimizer
        self._max_tokens = max_tokens
        self._aggregation = aggregation
        self._scope = scope or LocalStep()
        self._waiting: list[ScoredRollout] = []
        self._metrics: list[dict[str, Mean]] = []
        optimizer.zero_grad()

    @property
    def has_rest(self) -> bool:
        """Whether rollouts wait for a part to be full."""
        return bool(self._waiting)

    def hold(self, scored: Iterable[ScoredRollout]) -> None:
        """Keeps them for `train_rest`, which cuts all of a step into parts."""
        self._waiting += scored

    def train_full(self, scored: Iterable[ScoredRollout]) -> None:
        """Trains all parts but the last of what waits and these make up, which later ones may still fill."""
        *full, self._waiting = self._parts([*self._waiting, *scored]) or [[]]
        self._train_rounds(full)

    def train_rest(self) -> None:
        """Trains what waits, full or not."""
        waiting, self._waiting = self._waiting, []
        self._train_rounds(self._parts(waiting))

    def finish(self) -> dict[str, Mean]:
        """Divides by what was trained; the losses as means. `NonFiniteError` where nothing was."""
        self.train_rest()
        if not self._scope.total(len(self.trained)):
            raise NonFiniteError("no rollout was scored, so there is nothing to train on; see the warnings above")
        local = denominator(self._aggregation, [item.num_trained_tokens for item in self.trained])
        self._optimizer.divide_gradient(self._scope.total(local))
        names = self._metrics[0] if self._metrics else {}
        return self._scope.means({name: joined(part[name] for part in self._metrics) for name in names})

    def _parts(self, scored: Sequence[ScoredRollout]) -> list[list[ScoredRollout]]:
        return micro_batches(scored, self._max_tokens, shares_prompts=self._student.shares_prompts)

    def _train_rounds(self, parts: Sequence[list[ScoredRollout]]) -> None:
        num_rounds = self._scope.num_rounds(len(parts))
        for number in range(num_rounds):
            with self._scope.micro_batch(is_last=number == num_rounds - 1):
                if number < len(parts):
                    self._train(parts[number])
                else:
                    self._scope.idle_loss().backward()

    def _train(self, part: list[ScoredRollout]) -> None:
        output = self._loss(build_batch(part, self._student.device))
        # The loss has been found finite by now, so a bad part never reaches the gradient.
        output.loss_sum.backward()
        self._metrics.append(output.metrics)
        self.trained += part
