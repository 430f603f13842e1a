"""The rooms of the project: every one imports from those before it alone, and no two modules import each other."""

import ast

import pytest
from support import ROOT

# docs/inside/rooms.md says what each is for. A module of `patch` stands in the room that its path begins with.
ORDER = [
    "patch_kernels",
    "patch.files",
    "patch.settings",
    "patch.mask patch.priors",
    "patch.models",
    "patch.data",
    "patch.evaluate",
    "patch.runs",
    "patch.pruning",
    "patch.slim",
    "patch.artifacts",
    "patch.packed",
    "patch.learn",
    "patch.jobs",
    "patch.published patch.utils patch.fine_tune_mask",
    "patch.demo",
    "patch.cli",
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms.split()}


def modules():
    """{dotted name: path} of both packages."""
    found = {}
    for package in ("patch", "patch_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room_of(name):
    """Room of a module: "patch.cli" for patch.cli.commands.eval; None for `patch` and `python -m patch` themselves."""
    room = ".".join(name.split(".")[:2]) if name.startswith("patch.") else name.split(".")[0]
    return None if room in ("patch", "patch.__main__") else room


def imported(path, whole_file):
    """Modules of ours that a file imports: while it is imported itself, or with whole_file in functions too."""
    tree = ast.parse(path.read_text())
    found = set()
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not whole_file:
            continue
        # Seen by type checkers alone.
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not whole_file:
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}; name the module in full"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {node.module}
    return found & set(MODULES)


def lazily_named(path):
    """Modules that a file names in a text, "patch.cli.parser" or "patch.slim.options:Options", to import later."""
    texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    return {text.split(":")[0] for text in texts if isinstance(text, str)} & set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_the_rooms_before_its_own(name):
    room = room_of(name)
    if room is None:
        return
    assert room in FLOOR, f"{name}: a room of its own; give it a place in ORDER and in docs/inside/rooms.md"
    needed = imported(MODULES[name], whole_file=True) | lazily_named(MODULES[name])
    needed.discard("patch")  # which holds the version
    behind = sorted(n for n in needed if FLOOR[room_of(n)] > FLOOR[room])
    assert not behind, f"{name} imports {behind}, which stand behind {room}"


def test_no_modules_import_each_other():
    """Imports in functions count: what is needed in a circle belongs in one module."""
    needed = {name: imported(path, whole_file=True) - {name} for name, path in MODULES.items()}
    # A package that shows its modules' names is not one of them.
    needed = {name: {n for n in needed[name] if not name.startswith(f"{n}.")} for name in needed}
    done, path = set(), []

    def visit(name):
        assert name not in path, "circle: " + " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(needed[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def test_the_order_names_every_room():
    rooms = {room_of(name) for name in MODULES} - {None}
    assert rooms == set(FLOOR)
