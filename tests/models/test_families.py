"""Every model family takes every step as the table of docs says."""

from __future__ import annotations

import pytest
from support.families import DOCUMENT, FAMILIES, STEPS, document, lines, outcomes


# Their packed folders do not open yet.
@pytest.mark.parametrize(
    "name",
    list(FAMILIES),
)
def test_family_gets_as_far_as_its_row_says(name, tmp_path):
    family = FAMILIES[name]
    written = DOCUMENT.read_text(encoding="utf-8").splitlines()
    for line in lines(family, outcomes(family, tmp_path)):
        assert line in written, f"{line}\nwrite it with: python tools/families_table.py"


def test_page_has_these_families_and_no_other_cell():
    written = DOCUMENT.read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if line.startswith("| ")]
    by_family = [[row for row in rows if row.startswith(f"| {name} |")] for name in FAMILIES]
    assert written == document(by_family)
    assert len(FAMILIES) >= 16
    for row, *reasons in by_family:
        cells = dict(zip(STEPS, row.strip("| ").split(" | ")[-len(STEPS) :], strict=True))
        refused = [step for reason in reasons for step in reason.split(" | ")[1].split(", ")]
        assert sorted(refused) == sorted(step for step, cell in cells.items() if cell == "refused")
        assert set(cells.values()) <= {"works", "refused"}
