"""From settings to the objective they name. The only place that knows all of them."""

from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.config import ObjectiveConfig, ObjectiveKind
from services.trainer.objectives.contract import Objective
from services.trainer.objectives.full_vocabulary import FullVocabularyObjective
from services.trainer.objectives.sampled_token import SampledTokenObjective
from services.trainer.objectives.top_k import TopKObjective


def build_objective(config: ObjectiveConfig) -> Objective:
    """Temperatures are not the objective's: they belong to the log-probs it is given."""
    reduction = Reduction(aggregation=config.aggregation, staleness_cap=config.staleness_cap)
    match config.kind:
        case ObjectiveKind.TOP_K:
            return TopKObjective(
                gradient=config.gradient,
                support=config.support,
                weight=config.weight,
                renormalize=config.renormalize,
                reduction=reduction,
            )
        case ObjectiveKind.SAMPLED_TOKEN:
            return SampledTokenObjective(reduction=reduction)
        case ObjectiveKind.FULL_VOCABULARY:
            return FullVocabularyObjective(reduction=reduction)
