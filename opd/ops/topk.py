"""The k largest values of each row with a fixed order among equals.

T rows, V columns, k kept. `torch.topk` finds the right values but promises nothing about which of several equal columns
it returns, nor in which order; two machines would then train on different supports. Here ties go to the lower column.

Wide rows are ranked in two stages. Columns form groups of neighbours; only the k groups whose largest values come first
(ties to the lower group) can hold one of the k largest: any other group's best has k values before it, one from each of
those. So one pass for the groups' maxima and a ranking of k groups give exactly what ranking all columns would.
"""

import torch
from torch import Tensor

from opd.errors import InvalidRequestError
from opd.ops.moments import GROUP

_MIN_GROUPS_PER_KEPT = 4
"""Below this the chosen groups are most of the row."""


def top_k_stable(values_TV: Tensor, k: int, group_maxima_TG: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns ids [T, k] (int64) and values [T, k] (fp32), largest first, ties to the lower id, ranked in fp32.

    `group_maxima_TG` are those of `row_moments`, where they are known already.

    What a row with NaN gets means nothing and may be V itself. Raises `InvalidRequestError` unless 1 <= k <= V.
    """
    num_columns = values_TV.shape[-1]
    if not 1 <= k <= num_columns:
        raise InvalidRequestError(f"score_top_k={k} is outside 1..{num_columns}, the number of ids: choose one inside")
    ranked_TV = values_TV.float()
    if num_columns // (GROUP * k) < _MIN_GROUPS_PER_KEPT:
        return _ranked(ranked_TV, k)
    return _ranked_in_two_stages(ranked_TV, k, None if group_maxima_TG is None else group_maxima_TG.float())


def _ranked_in_two_stages(values_TV: Tensor, k: int, group_maxima_TG: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = values_TV.shape
    num_groups = num_columns // GROUP
    grouped_TGg = values_TV[:, : num_groups * GROUP].reshape(num_rows, num_groups, GROUP)
    # The columns that fill no group are ranked with the chosen ones; being last, they lose their ties as they should.
    rest_TR = values_TV[:, num_groups * GROUP :]
    best_Tk, _ = _ranked(grouped_TGg.amax(dim=-1) if group_maxima_TG is None else group_maxima_TG, k)
    # In the order of their columns, so that a place among the chosen says which of two equals is the lower. A row with
    # NaN may name a group that does not exist.
    chosen_Tk = best_Tk.sort(dim=-1).values.clamp_max(num_groups - 1)
    kept_Tkg = grouped_TGg.gather(1, chosen_Tk.unsqueeze(-1).expand(-1, -1, GROUP))
    places_Tk, kept_Tk = _ranked(torch.cat([kept_Tkg.flatten(1), rest_TR], dim=-1), k)
    columns_g = torch.arange(GROUP, device=values_TV.device)
    columns_R = torch.arange(num_groups * GROUP, num_columns, device=values_TV.device)
    ids_Tc = torch.cat(
        [(chosen_Tk.unsqueeze(-1) * GROUP + columns_g).flatten(1), columns_R.expand(num_rows, -1)], dim=-1
    )
    return ids_Tc.gather(-1, places_Tk.clamp_max(ids_Tc.shape[-1] - 1)), kept_Tk


def _ranked(ranked_TV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same over all columns at once."""
    num_columns = ranked_TV.shape[-1]
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
