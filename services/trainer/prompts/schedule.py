"""Which prompts each step trains on: a function of seed and step alone, so that a resumed run sees the same."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from opd.errors import ConfigError
from services.trainer.prompts.views import TokenizedPrompt


class PromptSchedule:
    """The prompts of every step.

    Every source is passed through in a new random order each time round. With `source_weights` the sources take turns
    in proportion to their weights (by the Sainte-Lague rule, so that the shares hold at every point of the run),
    however many prompts they have; a source with weight 0 is left out. Without, all prompts are one source.
    """

    def __init__(
        self,
        prompts: Sequence[TokenizedPrompt],
        *,
        prompts_per_step: int,
        seed: int,
        num_epochs: int = 1,
        source_weights: Mapping[str, float] | None = None,
    ) -> None:
        if prompts_per_step < 1 or num_epochs < 1:
            raise ConfigError(
                f"prompts_per_step={prompts_per_step} and num_epochs={num_epochs} must both be at least 1"
            )
        self._prompts_per_step = prompts_per_step
        self._seed = seed
        self._num_epochs = num_epochs
        self._pools = _pools(prompts, source_weights)
        self._taken = [0] * len(self._pools)
        self._turns: list[tuple[int, int]] = []
        self._orders: dict[tuple[int, int], list[int]] = {}

    @property
    def num_steps(self) -> int:
        """Full steps in `num_epochs` times the number of prompts; at least 1."""
        num_prompts = sum(len(pool) for pool, _ in self._pools)
        return max(1, num_prompts * self._num_epochs // self._prompts_per_step)

    def step_prompts(self, step: int) -> list[TokenizedPrompt]:
        """The prompts of step `step`, counted from 0; defined beyond `num_steps` too."""
        end = (step + 1) * self._prompts_per_step
        while len(self._turns) < end:
            self._turns.append(self._next_turn())
        chosen = [self._prompt(*turn) for turn in self._turns[end - self._prompts_per_step : end]]
        order = np.random.default_rng([self._seed, step]).permutation(len(chosen))
        return [chosen[position] for position in order]

    def _next_turn(self) -> tuple[int, int]:
        """The next source and how often it had its turn before."""
        claims = [weight / (2 * taken + 1) for (_, weight), taken in zip(self._pools, self._taken, strict=True)]
        source = claims.index(max(claims))
        self._taken[source] += 1
        return source, self._taken[source] - 1

    def _prompt(self, source: int, turn: int) -> TokenizedPrompt:
        pool, _ = self._pools[source]
        epoch, position = divmod(turn, len(pool))
        if (source, epoch) not in self._orders:
            generator = np.random.default_rng([self._seed, source, epoch, len(pool)])
            self._orders[source, epoch] = generator.permutation(len(pool)).tolist()
        return pool[self._orders[source, epoch][position]]


def _pools(
    prompts: Sequence[TokenizedPrompt], source_weights: Mapping[str, float] | None
) -> list[tuple[list[TokenizedPrompt], float]]:
    """Prompts by source with their weight, those with weight 0 left out."""
    if source_weights is None:
        return [(list(prompts), 1.0)]
    by_source: dict[str, list[TokenizedPrompt]] = {}
    for prompt in prompts:
        by_source.setdefault(prompt.problem.source, []).append(prompt)
    if by_source.keys() != source_weights.keys():
        raise ConfigError(
            f"source_weights: has {_listed(source_weights)}, the prompts have {_listed(by_source)}; give each source "
            "of the prompts a weight, 0 to leave it out"
        )
    bad = {name: weight for name, weight in source_weights.items() if not 0 <= weight < float("inf")}
    if bad or not any(source_weights.values()):
        raise ConfigError(f"source_weights: {dict(source_weights)} cannot be shares; give 0 or more, one above 0")
    return [(by_source[name], source_weights[name]) for name in sorted(by_source) if source_weights[name] > 0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
