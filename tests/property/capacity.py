"""A router with a capacity: each expert has so many places, and a token that finds none is dropped.

The number of places is an integer of Python, worked out from the number of tokens; so an exported graph may hold it
as a constant, and be right for some sizes only.

Shape legend: T tokens, E experts, K chosen per token, C places of each expert, H hidden.
"""

import torch
import torch.nn.functional as F

from tests.property.outside import TopK


class Capacity(TopK):
    def places(self, tokens: int) -> int:
        return max(2, int(1.25 * self.p.top_k * tokens / self.p.experts))

    def mixture(self, x, ids, weights):
        T, E, K = x.shape[0], self.p.experts, self.p.top_k
        places = self.places(T)
        chosen_KTE = F.one_hot(ids, E).permute(1, 0, 2)
        rank_KTE = (chosen_KTE.reshape(K * T, E).cumsum(0) - 1).reshape(K, T, E)
        chosen_KTE = chosen_KTE * (rank_KTE < places)
        place_KTC = F.one_hot((chosen_KTE * rank_KTE).sum(-1), places)
        full_TE = torch.zeros(T, E, dtype=weights.dtype).scatter(-1, ids, weights)
        table_TEC = ((chosen_KTE * full_TE).unsqueeze(3) * place_KTC.unsqueeze(2)).sum(0)
        rows_ECH = torch.einsum("tec,th->ech", (table_TEC != 0).to(x.dtype), x)
        out_ECH = torch.stack([expert(rows_ECH[e]) for e, expert in enumerate(self.experts)])
        return torch.einsum("tec,ech->th", table_TEC, out_ECH)
