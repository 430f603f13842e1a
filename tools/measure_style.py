"""Measures the Python of folders: length of functions, and how much of the code is validation.

    python tools/measure_style.py [FOLDER ...] [--files]          default patch patch_kernels

A line of code is a line with a token of the program: no blank line, comment or docstring. Validation is every line of
  - a function whose name says that it checks (check_*, require_*, refuse_*, validate_*) or that a validator of pydantic
    decorates, and `__post_init__`;
  - an `if` (or one of its branches) that ends in `raise`, with its condition, and an `except` that only raises;
  - any other `raise` and every `assert`.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

CHECKING_NAMES = ("check", "require", "refuse", "validate")
VALIDATORS = ("field_validator", "model_validator", "validator")
_SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass
class Measure:
    """Numbers of one file; of several after `+=`."""

    code: int = 0
    validation: int = 0
    raises: int = 0
    functions: list[int] = field(default_factory=list)

    def __iadd__(self, other: Measure) -> Measure:
        self.code += other.code
        self.validation += other.validation
        self.raises += other.raises
        self.functions += other.functions
        return self

    @property
    def share(self) -> float:
        """Validation as a share of the lines of code."""
        return self.validation / max(1, self.code)


def measure(source: str) -> Measure:
    """Numbers of the text of a module."""
    tree = ast.parse(source)
    code = _code_lines(source) - _docstring_lines(tree)
    checking: set[int] = set()
    for node in ast.walk(tree):
        checking |= _validation_lines(node)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [len(code & set(range(node.lineno, node.end_lineno + 1))) for node in functions]
    return Measure(len(code), len(code & checking), sum(isinstance(n, ast.Raise) for n in ast.walk(tree)), lengths)


def _code_lines(source: str) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            if isinstance(body[0].value.value, str):
                lines.update(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def _validation_lines(node: ast.AST) -> set[int]:
    if isinstance(node, ast.FunctionDef) and _is_checking(node):
        return set(range(node.decorator_list[0].lineno if node.decorator_list else node.lineno, node.end_lineno + 1))
    if isinstance(node, ast.Raise | ast.Assert):
        return set(range(node.lineno, node.end_lineno + 1))
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
        return set(range(node.lineno, node.body[-1].end_lineno + 1))
    if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Raise) for line in node.body):
        return set(range(node.lineno, node.end_lineno + 1))
    return set()


def _is_checking(function: ast.FunctionDef) -> bool:
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    names = {d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in decorators}
    own = function.name.lstrip("_")
    return own.startswith(CHECKING_NAMES) or function.name == "__post_init__" or bool(names & set(VALIDATORS))


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description="share of validation, and length of functions")
    parser.add_argument("folders", nargs="*", default=["patch", "patch_kernels"])
    parser.add_argument("--files", action="store_true", help="a line for each file, those with most validation first")
    arguments = parser.parse_args()
    found = {path: measure(path.read_text()) for folder in arguments.folders for path in Path(folder).rglob("*.py")}
    if arguments.files:
        for path, one in sorted(found.items(), key=lambda item: -item[1].validation):
            print(f"{one.validation:5} of {one.code:5}  {one.share:5.0%}  {path}")
    total = Measure()
    for one in found.values():
        total += one
    lengths = sorted(total.functions)
    high = lengths[int(0.95 * len(lengths))]
    print(
        f"{len(found)} files, {total.code} lines of code: {total.share:.1%} validation, "
        f"{100 * total.raises / total.code:.1f} raises per 100 lines; {len(lengths)} functions, median "
        f"{statistics.median(lengths):.0f} lines, 95th percentile {high}, longest {lengths[-1]}"
    )


if __name__ == "__main__":
    main()
