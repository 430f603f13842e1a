"""Runs of `patch-llm` in this process."""

from __future__ import annotations

from patch import cli


def text(lines: int) -> str:
    return "\n".join(f"Line {i}: the {'quick' if i % 3 else 'slow'} fox {i * i} jumps." for i in range(lines))


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
