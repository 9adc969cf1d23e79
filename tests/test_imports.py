"""Import cost and import order: what `import lmjax` may load, and which room may know which."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lmjax

ROOT = Path(lmjax.__file__).parent

# From the bottom to the top; a room imports only rooms of lower rank. See docs/architecture.md.
GROUND = ("_lazy", "errors", "batch", "config_files", "command_line", "host_memory")
ORDER = (
    *("sharding", "losses", "tokenizers", "data", "modules", "models", "policy", "interop"),
    *("adapters", "objectives", "training", "generation", "evaluation", "rl"),
)
# What a room knows nothing of, though it lies below.
UNKNOWN = {
    "losses": {"batch"},
    "adapters": {"losses"},
    "objectives": {"data", "tokenizers", "training"},
    "interop": {"training"},
    "training": {"losses"},
    "generation": {"losses", "objectives"},
    "evaluation": {"training"},
}


def _loaded(code: str, names: tuple[str, ...]) -> list[str]:
    code = f"import sys\n{code}\nprint([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout.splitlines()[-1])


def test_importing_lmjax_loads_no_library():
    heavy = ("jax", "flax", "optax", "orbax", "grain", "numpy", "tokenizers", "tyro", "rich", "matplotlib")
    assert _loaded("import lmjax", heavy) == []


def test_the_rooms_load_jax_and_flax_and_leave_the_rest_for_later():
    rooms = [room for room in ORDER if (ROOT / room).exists() or (ROOT / f"{room}.py").exists()]
    later = ("orbax", "orbax.checkpoint", "grain", "tokenizers", "matplotlib", "tyro", "transformers")
    assert _loaded("\n".join(f"import lmjax.{room}" for room in rooms), (*later, "torch", "pyarrow")) == []


def _packages() -> list[str]:
    files = ROOT.rglob("__init__.py")
    return sorted(".".join(("lmjax", *file.parent.relative_to(ROOT).parts)) for file in files)


@pytest.mark.parametrize("package", _packages())
def test_every_lazy_name_resolves(package):
    module = importlib.import_module(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.a_name_that_no_module_has  # noqa: B018


@pytest.mark.parametrize("package", _packages())
def test_no_lent_name_is_also_a_module(package):
    # Importing a submodule sets it as an attribute of its package, over the lent name.
    file = ROOT.parent.joinpath(*package.split("."), "__init__.py")
    keywords = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.keyword)]
    lent = [ast.literal_eval(node.value) for node in keywords if node.arg == "names"]
    names = {name for table in lent for exported in table.values() for name in exported}
    assert not {name for name in names if (file.parent / f"{name}.py").exists()}


def _modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py" or path.parent != ROOT)


def _imports(path: Path) -> set[str]:
    """The rooms that a file imports, at the top or inside its functions."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms.update(name.split(".")[1] for name in names if name.startswith("lmjax."))
    return rooms & {*ORDER, *GROUND}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = _imports(path) - {room}
    if room in GROUND:
        assert imported <= set(GROUND)
        return
    assert room in ORDER, f"{room} has no place in the order of the rooms"
    above = {other for other in imported & set(ORDER) if ORDER.index(other) > ORDER.index(room)}
    assert not above, f"{room} lies below {sorted(above)}"
    assert not imported & UNKNOWN.get(room, set()), f"{room} is to know nothing of what it imports here"


def test_no_file_is_too_long_to_read_in_one_sitting():
    long = {path.name: count for path in _modules() if (count := len(path.read_text().splitlines())) > 450}
    assert long == {}
