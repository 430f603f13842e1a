"""Which channels should be neighbours: the search behind `patch.pruning.permutation`.

A pattern of 2:4 prunes of every group of four columns the two that cost least, in each row. Beside three columns that
cost a <= b <= c in a row, a column that costs x makes the group lose a + min(b, x): so what each of many columns would
cost in each of many groups is one pass over the rows, and pairs of columns that gain by changing places do so at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patch.pruning.options import GROUP

DEFAULT_STEPS = 200
# Groups whose columns are compared with each other in a step. Others come together in the next: the work of a step
# grows with the columns and not with their square.
WINDOW = 32
# Of what a group loses: rounding alone must not keep two columns changing places.
_LEAST_GAIN = 1e-5
# Rows that an order is found from. The others follow: what neighbours differ in is the scale of a column.
SEARCHED_ROWS = 4096


@torch.no_grad()
def best_order(costs: Tensor, heads: int, steps: int, generator: torch.Generator) -> Tensor:
    """Order (K,) int64 on the CPU of the columns of costs (N, K) in which 2:4 loses less; they stay in their head.

    heads  equal parts of the columns, each a multiple of 4
    No step makes it worse but by rounding. Columns of a group, and groups, are in the order of their first column.
    """
    if len(costs) > SEARCHED_ROWS:
        costs = costs[torch.randperm(len(costs), generator=generator)[:SEARCHED_ROWS].to(costs.device)]
    columns = costs.T.contiguous()
    groups = torch.arange(len(columns)).reshape(heads, -1, GROUP)
    for _ in range(steps):
        for head in groups:
            for window in torch.randperm(len(head), generator=generator).split(WINDOW):
                head[window] = _exchanged(columns, head[window], generator)
    groups = groups.sort(2).values
    return torch.cat([head[head[:, 0].argsort()] for head in groups]).flatten()


def _exchanged(columns: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Groups (G, 4) of columns (K, N) after one column of each was offered to the others."""
    count = torch.arange(len(groups))
    place = torch.randint(0, GROUP, (len(groups), 1), generator=generator)
    offered = groups.gather(1, place)[:, 0]
    rest = groups.gather(1, (place + torch.arange(1, GROUP)) % GROUP)
    second = columns[rest.to(columns.device)].median(1).values
    loss = torch.minimum(second[:, None], columns[offered.to(columns.device)]).sum(2).cpu()
    # Row: a group, column: the column that it would take. Pairs change places until none gains by it.
    taken = count
    while True:
        given = loss[:, taken]
        own = given.diagonal()
        gain = own[:, None] + own - given - given.T
        best = gain.argmax(1)
        gains = gain[count, best] > _LEAST_GAIN * own
        # Of both: the least gain is a share of what each loses, and rounding differs.
        agreed = (best[best] == count) & gains & gains[best]
        if not agreed.any():
            return torch.cat([rest, offered[taken][:, None]], 1)
        taken = taken[torch.where(agreed, best, count)]
