"""Which part of a step's prompts a rank samples and has scored: whole groups, so that advantages need no other rank.

Shares are consecutive and differ by at most one prompt. Positions are counted over the whole step, so ids and seeds of
rollouts are unique within a run and the same for any number of ranks.
"""

from dataclasses import dataclass

from opd.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One rank's part. Example: of 5 prompts, ranks 0 and 1 of 2 have 0, 1 and 2, 3, 4."""

    rank: int = 0
    num_ranks: int = 1

    def prompts(self, num_prompts: int) -> range:
        """Positions of this rank's prompts among the step's."""
        return range(num_prompts * self.rank // self.num_ranks, num_prompts * (self.rank + 1) // self.num_ranks)

    def rollouts(self, num_prompts: int, rollouts_per_prompt: int) -> range:
        """Positions of this rank's rollouts among the step's, those of one prompt side by side."""
        mine = self.prompts(num_prompts)
        return range(mine.start * rollouts_per_prompt, mine.stop * rollouts_per_prompt)

    def check(self, prompts_per_step: int) -> None:
        """`ConfigError` where a rank would have no prompt at all."""
        if prompts_per_step < self.num_ranks:
            raise ConfigError(
                f"rollout.prompts_per_step={prompts_per_step} is below the {self.num_ranks} processes of the run, so "
                "some would have nothing to sample; raise it or start fewer"
            )
