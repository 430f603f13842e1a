"""The text of the demo: the Python standard library's own sources.

Each file belongs to exactly one part, chosen by a hash of its relative path: `train` (the dense model learns it),
`learn` (calibration and mask learning), `heldout` (evaluation)."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PARTS = ("train", "learn", "heldout")
# Share of the files, in 1/16: 11 for training, 4 for learning the masks, 1 for evaluation.
_PART_OF_BUCKET = ("heldout", *("learn",) * 4, *("train",) * 11)
# Folders that hold tests, installed packages or generated tables instead of program text.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
)
_SKIPPED_FOLDERS_PREFIX = ("config-", "__pycache__")
_LARGEST_FILE_BYTES = 200_000


@dataclass(frozen=True)
class Corpus:
    """Documents of the three parts, each a list of texts, and the SHA-256 of all of them in order."""

    train: list[str]
    learn: list[str]
    heldout: list[str]
    sha256: str

    def describe(self) -> str:
        """One line: files and characters of each part."""
        sizes = (
            f"{part} {len(docs)} files, {sum(map(len, docs)) / 1e6:.1f} M characters" for part, docs in self.parts()
        )
        return "; ".join(sizes)

    def parts(self) -> Iterator[tuple[str, list[str]]]:
        """(name, documents) of each part."""
        return ((part, getattr(self, part)) for part in PARTS)


def stdlib_files(root: Path | None = None) -> list[Path]:
    """Python files of the standard library, sorted by relative path; tests and installed packages left out.

    root    folder to read; default the `stdlib` path of this interpreter.
    raises  FileNotFoundError when nothing usable is there (some embedded Pythons ship a zip without sources).
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        skipped = any(f in _SKIPPED_FOLDERS or f.startswith(_SKIPPED_FOLDERS_PREFIX) for f in folders)
        if not skipped and 200 <= path.stat().st_size <= _LARGEST_FILE_BYTES:
            found.append(path)
    if not found:
        expected = f"expected Python sources (*.py) of the standard library under {root}"
        raise FileNotFoundError(f"{expected}, found none. Pass a folder with text as --text FOLDER.")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def load_corpus(root: Path | None = None, *, max_characters: int | None = None) -> Corpus:
    """Read the sources and split them by file. max_characters shortens every part (for tests)."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    digest = hashlib.sha256()
    for path in stdlib_files(root):
        name = path.relative_to(root).as_posix()
        part = _PART_OF_BUCKET[hashlib.sha256(name.encode()).digest()[0] % 16]
        if max_characters is not None and sum(map(len, parts[part])) >= max_characters:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        digest.update(f"{part} {name} {len(text)}\n".encode())
        digest.update(text.encode())
        parts[part].append(text)
    empty = [part for part, documents in parts.items() if not documents]
    if empty:
        got = f"got none for {', '.join(empty)} under {root}. Pass a folder with more text."
        raise ValueError(f"expected at least one file in each of the parts {', '.join(PARTS)}, {got}")
    return Corpus(**parts, sha256=digest.hexdigest())
