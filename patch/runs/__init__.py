"""What long jobs leave on disk, so that they go on where they stopped: stages, checkpoints, metrics, identities."""
