"""The k largest values of each row with a fixed order among equals.

T rows, V columns, k kept. `torch.topk` finds the right values but promises nothing about which of several equal columns
it returns, nor in which order; two machines would then train on different supports. Here ties go to the lower column.
"""

import torch
from torch import Tensor

from opd.errors import InvalidRequestError


def top_k_stable(values_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns ids [T, k] (int64) and values [T, k] (fp32), largest first, ties to the lower id, ranked in fp32.

    What a row with NaN gets means nothing and may be V itself. Raises `InvalidRequestError` unless 1 <= k <= V.
    """
    num_columns = values_TV.shape[-1]
    if not 1 <= k <= num_columns:
        raise InvalidRequestError(f"score_top_k={k} is outside 1..{num_columns}, the number of ids: choose one inside")
    ranked_TV = values_TV.float()
    # One value more than asked for shows whether the last place is contested.
    found_values, found_ids = torch.topk(ranked_TV, min(k + 1, num_columns), dim=-1)
    ids_Tk, kept_Tk = found_ids[:, :k], found_values[:, :k]
    if k < num_columns:
        contested = (found_values[:, k - 1] == found_values[:, k]).nonzero().squeeze(-1)
        if contested.numel():
            ids_Tk = ids_Tk.clone()
            ids_Tk[contested] = _settle_last_places(ranked_TV[contested], ids_Tk[contested], kept_Tk[contested])
    return _order_equals(ids_Tk, kept_Tk)


def _settle_last_places(values_CV: Tensor, ids_Ck: Tensor, kept_Ck: Tensor) -> Tensor:
    """Fills the places held by the k-th value with the lowest ids that have it; C contested rows."""
    k, num_columns = ids_Ck.shape[-1], values_CV.shape[-1]
    threshold_C1 = kept_Ck[:, -1:]
    columns_V = torch.arange(num_columns, device=values_CV.device)
    # Ids are distinct, so this inner ranking has no ties of its own.
    candidates_CV = torch.where(values_CV == threshold_C1, columns_V, num_columns)
    lowest_Ck = candidates_CV.topk(k, dim=-1, largest=False, sorted=True).values
    num_above_C1 = (kept_Ck > threshold_C1).sum(-1, keepdim=True)
    place_1k = torch.arange(k, device=values_CV.device).unsqueeze(0)
    tied_Ck = lowest_Ck.gather(-1, (place_1k - num_above_C1).clamp_min(0))
    return torch.where(place_1k < num_above_C1, ids_Ck, tied_Ck)


def _order_equals(ids_Tk: Tensor, values_Tk: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts by value downwards and, among equals, by id upwards: a stable sort of what is already in id order."""
    ids_Tk, by_id = ids_Tk.sort(dim=-1)
    values_Tk, by_value = values_Tk.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return ids_Tk.gather(-1, by_value), values_Tk
