"""Configuration: precedence of the sources, conversion to types, unknown keys, atomic files."""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import pytest

from patch import settings
from patch.files import atomic
from patch.files.schema import record
from patch.settings import Names, NewPath, Seed, Tile


@record
class Inner:
    lr: float = 1e-3
    tile: Tile = (128, 128)
    hard: bool = False


@record
class Outer:
    model: str
    out: NewPath = Path("out")
    steps: int | None = None
    method: Literal["wanda", "magnitude"] = "wanda"
    exclude: Names = ()
    extra: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    seed: Seed = 0


def load(**sources):
    return settings.load_config(Outer, **({"flags": {"model": "m"}} | sources))


def test_later_sources_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: file\nsteps: 2\nmethod: magnitude\ninner: {lr: 2.0, tile: [8, 8], hard: true}\n")
    result = settings.load_config(
        Outer,
        preset={"steps": 1, "inner": {"lr": 1.0, "tile": [4, 4]}, "exclude": ["a"]},
        file=file,
        overrides=["inner.lr=3.0", "steps=3", "steps=4"],
        flags={"inner.lr": "4", "out": None},
    )
    assert result.inner == Inner(lr=4.0, tile=(8, 8), hard=True)  # flag; file; file
    assert (result.model, result.steps, result.method, result.exclude) == ("file", 4, "magnitude", ("a",))
    assert result.out == Path("out")


def test_json_file_and_empty_yaml(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"inner": {"tile": [64, 32]}}))
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert load(file=tmp_path / "c.json").inner.tile == (64, 32)
    assert load(file=tmp_path / "empty.yml") == Outer("m")


@pytest.mark.parametrize(
    ("override", "attribute", "expected"),
    [
        ("inner.lr=1e-3", "lr", 1e-3),  # a text for YAML 1.1
        ("inner.lr=5", "lr", 5.0),
        ("inner.tile=64,32", "tile", (64, 32)),
        ("inner.tile=64x32", "tile", (64, 32)),
        ("inner.tile=[64, 32]", "tile", (64, 32)),
        ("inner.tile=64", "tile", (64, 64)),
        ("inner.tile='64'", "tile", (64, 64)),
        ("inner.hard=yes", "hard", True),
        ("inner.hard='off'", "hard", False),
    ],
)
def test_override_becomes_the_fields_type(override, attribute, expected):
    value = getattr(load(overrides=[override]).inner, attribute)
    assert value == expected
    assert type(value) is type(expected)


def test_other_conversions():
    result = load(flags={"model": 7, "steps": "12", "exclude": "*.k_proj, *.v_proj", "out": "~/x", "extra": {"a": 1}})
    assert result.model == "7"
    assert result.steps == 12
    assert result.exclude == ("*.k_proj", "*.v_proj")
    assert result.out == Path("~/x").expanduser()
    assert load(overrides=["steps=null"]).steps is None
    assert load(overrides=["steps=none"]).steps is None


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"overrides": ["inner.lrr=1"]}, r"--set inner.lrr=1: .* got 'inner.lrr'. Did you mean 'inner.lr'\?"),
        ({"overrides": ["lr=1"]}, r"got 'lr'. Did you mean 'inner.lr'\?"),
        ({"overrides": ["qqqqqq=1"]}, r"got 'qqqqqq'. Settings are: model, out, .*inner.hard"),
        ({"overrides": ["inner=3"]}, r"expected 'inner' to hold settings by name, got 3. Write inner.lr = "),
        ({"overrides": ["steps"]}, r"expected KEY=VALUE such as learn.lr=1e-3, got 'steps'"),
        ({"overrides": ["=3"]}, r"expected KEY=VALUE"),
        ({"overrides": ["a..b=3"]}, r"expected KEY=VALUE"),
        ({"overrides": ["steps=[1"]}, r"--set steps: expected a YAML value, got '\[1'"),
        ({"overrides": ["extra=3"]}, r"expected 'extra' to hold settings by name, got 3. Write extra.NAME = \.\.\."),
        ({"overrides": ["out=''"]}, r"out: expected a path, got ''. Write for example ./folder."),
        ({"flags": {"model": "m", "out": " "}}, r"out: expected a path, got ' '. Write for example ./folder."),
        ({"overrides": ["seed=4294967296"]}, r"seed: expected a seed of 0 to 4294967295, got 4294967296. Choose a sm"),
        ({"overrides": ["steps=1.5"]}, r"steps: expected an integer, got 1.5"),
        ({"overrides": ["steps=true"]}, r"steps: expected an integer, got True"),
        ({"overrides": ["inner.lr=fast"]}, r"inner.lr: expected a number, got 'fast'"),
        ({"overrides": ["inner.hard=maybe"]}, r"inner.hard: expected true or false, got 'maybe'"),
        (
            {"overrides": ["inner.tile=1,2,3"]},
            r"inner.tile: expected 2 values, each an integer, got '1,2,3'. .*128,128",
        ),
        ({"overrides": ["inner.tile=a,b"]}, r"inner.tile: expected 2 values, each an integer, got 'a,b'. .*128,128"),
        (
            {"overrides": ["method=wandaa"]},
            r"method: expected one of wanda, magnitude, got 'wandaa'. Did you mean 'wanda'",
        ),
        ({"overrides": ["exclude=3"]}, r"exclude: expected a list, got 3. Write for example a,b"),
        ({"flags": {}}, r"expected --model, got nothing"),
        ({"file": "missing.yaml"}, r"missing.yaml: expected a configuration file, found none"),
        ({"file": "config.toml"}, r"expected a file ending in .yaml, .yml, .json. Rename"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(sources, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(**sources)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inner(lr="1e-3"), "lr: expected a number, got '1e-3'"),
        (lambda: Inner(tile=128), r"tile: expected 2 values, each an integer, got 128. .*\(128, 128\)"),
        (lambda: Inner(tile="128,128"), "tile: expected 2 values, each an integer, got '128,128'"),
        (lambda: Inner(1e-3, (128.0, 128)), r"tile: expected 2 values, each an integer, got \(128.0, 128\)"),
        (lambda: Inner(tile=(8, 6)), r"tile: expected .* columns a multiple of 4, got \(8, 6\)"),
        (lambda: Inner(hard=1), "hard: expected true or false, got 1"),
        (lambda: Inner(lrr=1), r"expected known keys, got 'lrr'. Did you mean 'lr'\?"),
        (lambda: Outer(), "expected model, got nothing"),
        (lambda: Outer("m", inner={"lr": 1}), "inner: expected values by name"),
    ],
)
def test_record_made_in_python_converts_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert Inner(lr=1, tile=[64, 32]) == Inner(1.0, (64, 32))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "a: [1\n", "expected valid YAML"),
        ("a.json", '{"steps": }', "expected valid JSON"),
        ("a.yaml", "steps: 1\nsteps: 2\n", "expected valid YAML, got an error: the key 'steps' is there twice below"),
        ("a.yaml", "inner:\n  lr: 1\n  lr: 2\n", "the key 'lr' is there twice below line 2. Correct the file"),
        ("a.json", '{"steps": 1, "steps": 2}', "expected valid JSON, got an error: a key occurs twice"),
        ("a.yaml", "- 1\n- 2\n", "expected settings by name, got list"),
        ("a.yaml", "1: 2\n", "expected settings by name"),
        ("a.yaml", "stepz: 2\n", r"a.yaml: expected a known setting, got 'stepz'. Did you mean 'steps'\?"),
        ("a.yaml", "x: !!python/object/apply:os.system [ls]\n", "expected valid YAML"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(file=tmp_path / name)


def test_resolved_file_gives_the_same_configuration(tmp_path):
    first = load(overrides=["inner.tile=8,4", "steps=3", "exclude=[a, b]"], flags={"model": "m", "inner.lr": "1e-5"})
    path = settings.save_resolved(first, tmp_path / "new" / "folder", header="patch-llm x\nsecond line")
    assert path.name == "config.resolved.yaml"
    assert path.read_text().startswith("# patch-llm x\n# second line\n")
    assert settings.load_config(Outer, file=path) == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_atomic_write_keeps_the_earlier_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f.txt"
    atomic.write_text_atomic(path, "one")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(settings.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        atomic.write_text_atomic(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]
