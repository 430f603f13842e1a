"""Fixtures shared by all tests: tiny random models of every supported family, a byte tokenizer, a text file.

Nothing here needs a network: models are built from configs, the tokenizer from the 256 byte symbols.
"""

from __future__ import annotations

import os

from support.models import build_byte_tokenizer, build_tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture
def tiny_model():
    return build_tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return build_byte_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    """About 60 kB of text with structure, one paragraph a line."""
    lines = [
        f"Paragraph {i}: the {'quick' if i % 3 else 'slow'} fox number {i * i} jumps over {i % 7} lazy dogs."
        for i in range(800)
    ]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
