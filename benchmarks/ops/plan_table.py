"""The plans that the planner takes for the layers of three models, and their model times, as markdown. No GPU.

python -m benchmarks.ops.plan_table          writes benchmarks/results/plans.md again
The plans of the model before this one are no code any more: their columns are taken over from the file.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import shapes
from benchmarks.ops.plan_fit import CHOICE, host_module

TABLE = Path(__file__).parents[1] / "results" / "plans.md"
SPARSITY = 0.45
# An H100 SXM. Clusters that fit are assumed: six GPCs of 16 SMs and two of 18.
H100 = {"compute_capability": 90, "sm_count": 132, "smem_bytes": 232448, "clusters": [132, 66, 32, 16]}
SAME = 0.001  # plans whose times differ by less are as good

HEAD = """# Plans of `tile_linear` on an H100: model times, nothing measured

**No number here was measured on a card.** All are what the model of `csrc/gemm/plan.cpp`
([gemm.md](../../docs/inside/gemm.md), "Choosing a plan") says, for 45 % zeros, {sm_count} SMs, {smem_bytes} bytes of
shared memory and {clusters} clusters of 1, 2, 4, 8 CTAs (assumed). Written by `python -m benchmarks.ops.plan_table`.

A plan is tokens of a CTA, then the CTAs of a cluster along tokens x rows x K. "Before" is the plan of the model that
left out writes to shared memory and took an exchange of partial sums for 1500 cycles: its time by today's model, and in
brackets what that model said then. "Gain" is the time of the plan before over that of the plan today, both by today's
model.
"""

WRONG = """What a wrong constant costs: the time of these plans over that of the plans chosen with the card's constant,
both by the model with that constant. What costs most is worth measuring first; what costs less than 1 % everywhere is
left out.
"""


def layers() -> dict[tuple[int, int], str]:
    """Names of the layers by (rows, cols), equal ones under one name."""
    hidden, intermediate, _, heads, kv_heads, _ = shapes.CONFIGS["Llama-3.2-1B"]
    one_billion = {
        "qkv": (hidden + 2 * kv_heads * (hidden // heads), hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }
    models = {"2-7B": shapes.MODELS["llama-2-7b"], "3-8B": shapes.MODELS["llama-3-8b"], "3.2-1B": one_billion}
    names = defaultdict(list)
    for model, own in models.items():
        for layer, shape in own.items():
            names[shape].append(f"{model} {layer}")
    return {shape: ", ".join(each) for shape, each in names.items()}


def plan_text(choice: tuple[int, ...]) -> str:
    return f"{choice[0]} {choice[1]}x{choice[2]}x{choice[3]}"


def earlier_plans(text: str) -> dict[tuple[int, int, int], tuple[tuple[int, ...], str]]:
    """Choice and time of the model before by (rows, cols, tokens), from a table that this module wrote."""
    found = {}
    row = r"^\| (\d+)x(\d+) \| (\d+) \| [^|]* \| [\d.]+ \| (\d+) (\d)x(\d)x(\d) \| [\d.]+ \(([\d.]+)\) \|"
    for rows, cols, tokens, bn, *ctas, us in re.findall(row, text, re.MULTILINE):
        choice = (int(bn), *(int(count) for count in ctas), 0)
        found[int(rows), int(cols), int(tokens)] = (choice, us)
    return found


def entries(text: str) -> Iterator[dict]:
    """A row for each layer and number of tokens; `text` is the table before."""
    host = host_module()
    limits = host.DeviceLimits(**H100)
    earlier = earlier_plans(text)
    for rows, cols in layers():
        payload = shapes.weight_bytes(rows, cols, SPARSITY)
        for tokens in shapes.TOKENS:
            plan = host.choose_plan(rows, cols, tokens, payload, limits=limits)
            choice = tuple(plan[name] for name in ("bn", "token_ctas", "row_ctas", "splits"))
            before, said_us = earlier[rows, cols, tokens]
            (before_us,) = host.model_times_us([(rows, cols, tokens, payload, *before, 0)], limits)
            yield {
                "shape": f"{rows}x{cols}",
                "tokens": tokens,
                "plan": plan_text(choice),
                "us": plan["model_us"],
                "before": plan_text(before),
                "before_us": before_us,
                "said_us": said_us,
                "gain": before_us / plan["model_us"],
            }


def costs_of_wrong_constants() -> Iterator[tuple[str, float, float, float]]:
    """Name, factor, and geometric mean and most of what today's plans lose on a card whose constant is that factor off.

    Both times by the model with the card's constant: of the plan taken without knowing it, over the plan taken with it.
    """
    host = host_module()
    limits = host.DeviceLimits(**H100)
    calls = [
        (rows, cols, tokens, shapes.weight_bytes(rows, cols, SPARSITY))
        for rows, cols in layers()
        for tokens in shapes.TOKENS
    ]

    def plans(constants: dict[str, float]) -> list[tuple[int, ...]]:
        found = [host.choose_plan(*call, limits=limits, constants=constants) for call in calls]
        return [(*call, *(plan[name] for name in CHOICE), 0) for call, plan in zip(calls, found, strict=True)]

    today = plans({})
    for name, value in host.model_constants().items():
        for factor in (0.5, 2.0):
            if name.startswith("sm80") or (name == "shared_write_share" and factor > 1):
                continue
            card = {name: factor * value}
            taken, best = (np.array(host.model_times_us(each, limits, card)) for each in (today, plans(card)))
            losses = taken / best
            yield name, factor, float(np.exp(np.log(losses).mean())), float(losses.max())


def table(text: str) -> str:
    """The file, given what it was; raises KeyError for a layer or number of tokens that the table did not have."""
    rows = list(entries(text))
    lines = [HEAD.format(**H100 | {"clusters": ", ".join(map(str, H100["clusters"]))})]
    lines += ["| layer | shape |", "|---|---|"]
    lines += [f"| {name} | {rows}x{cols} |" for (rows, cols), name in layers().items()]
    lines += ["", "| tokens | layers with another plan | geometric mean of the gain | most |", "|---|---|---|---|"]
    for tokens in shapes.TOKENS:
        gains = [row["gain"] for row in rows if row["tokens"] == tokens]
        other = sum(gain > 1 + SAME for gain in gains)
        mean = np.exp(np.log(gains).mean())
        lines.append(f"| {tokens} | {other} of {len(gains)} | {mean:.3f} | {max(gains):.2f} |")
    lines += ["", WRONG, "| constant | the card's is | geometric mean | most |", "|---|---|---|---|"]
    wrong = sorted(costs_of_wrong_constants(), key=lambda cost: (-round(cost[2], 3), cost[:2]))
    lines += [
        f"| `{name}` | {factor:g} times | {mean:.3f} | {most:.2f} |"
        for name, factor, mean, most in wrong
        if round(most, 2) >= 1.01
    ]
    lines += [
        "",
        "| shape | tokens | plan | model us | plan before | model us (said then) | gain |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['shape']} | {row['tokens']} | {row['plan']} | {row['us']:.2f} | {row['before']} | "
        f"{row['before_us']:.2f} ({row['said_us']}) | {row['gain']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    TABLE.write_text(table(TABLE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
