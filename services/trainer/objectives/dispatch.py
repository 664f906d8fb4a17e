"""From settings to the objective they name; a kind is the module of this folder that has its name."""

from importlib import import_module

from services.trainer.objectives.aggregation import Reduction
from services.trainer.objectives.config import Credit, ObjectiveConfig, OutcomeRegion
from services.trainer.objectives.contract import Term
from services.trainer.objectives.credit import Discounted, ToGo
from services.trainer.objectives.entropy import EntropyBonus
from services.trainer.objectives.objective import Objective, Region, WeightedTerm
from services.trainer.objectives.outcome import Outcome

_OUTCOME_REGIONS = {OutcomeRegion.ALL: Region.ALL, OutcomeRegion.BEYOND_HORIZON: Region.BEYOND}


def build_objective(config: ObjectiveConfig) -> Objective:
    """Temperatures are not the objective's: they belong to the log-probs it is given."""
    name = "signal" if config.uses_teacher else "outcome"
    terms = [WeightedTerm(name=name, term=_signal(config), region=Region.SUPERVISED)]
    if config.outcome.weight:
        region = _OUTCOME_REGIONS[config.outcome.region]
        terms.append(WeightedTerm(name="outcome", term=Outcome(), weight=config.outcome.weight, region=region))
    if config.entropy_bonus:
        terms.append(WeightedTerm(name="entropy_bonus", term=EntropyBonus(), weight=config.entropy_bonus))
    reduction = Reduction(aggregation=config.aggregation, staleness_cap=config.staleness_cap)
    return Objective(terms=tuple(terms), reduction=reduction)


def _signal(config: ObjectiveConfig) -> Term:
    term: Term = import_module(f"services.trainer.objectives.{config.kind}").build(config)
    if config.position_discount != 1.0:
        term = Discounted(term=term, discount=config.position_discount)
    return ToGo(term=term) if config.credit is Credit.TO_GO else term
