"""Names of the registered pruning methods by what they work on."""

from __future__ import annotations

from patch.pruning import METHODS

# The others learn the masks of a whole model at once.
ONE_WEIGHT_METHODS = [name for name, method in METHODS.items() if not method.learns]
