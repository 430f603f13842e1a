"""Artifacts: masks (and what belongs to them) as folders, and masks made by others."""
