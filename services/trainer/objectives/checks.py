"""No number that is not one gets into a loss: checked under the mask, named by position.

T positions, K support columns. One synchronisation with the device per checked tensor, only when a step is trained.
"""

from torch import Tensor

from opd.errors import NonFiniteError
from services.trainer.objectives.contract import LossInputs


def require_finite(name: str, values: Tensor, mask: Tensor, inputs: LossInputs) -> None:
    """Raises `NonFiniteError` for the first value under the mask that is NaN or infinite; [T] or [T, K]."""
    values = values.detach()
    bad = ~values.isfinite() & mask
    if not bad.any():
        return
    position, *column = (int(index) for index in bad.nonzero()[0])
    value = float(values[(position, *column)])
    where = inputs.name_position(position)
    if column:
        where += f", support column {column[0]}"
        ids_TK = inputs.support_ids_TK
        where += f" (token id {int(ids_TK[position, column[0]])})" if ids_TK is not None else ""
    raise NonFiniteError(f"{name} at {where} is {value}: the step was not applied")
