"""The direction of imports: flows -> tasks -> tasks.core, flows and tasks -> infra, never back."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"flows", "tasks", "infra", "tests"}
OUTSIDE_CORE = {"prefect", "prefect_dask", "distributed", "s3fs", "obstore", "pystac_client"}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found, f"no modules in {room}"
    return found


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("infra", {"flows", "tasks", "tests"}),
        ("tasks", {"flows", "tests"}),
        ("flows", {"tests"}),
        ("tasks/core", OUTSIDE_CORE | {"flows", "infra", "tests"}),
    ],
)
def test_no_room_imports_back(room, forbidden):
    for path in files(room):
        assert not roots(path) & forbidden, f"{path} imports {roots(path) & forbidden}"


def test_core_imports_nothing_of_ours_but_core():
    for path in files("tasks/core"):
        ours = {name for name in imported(path) if name.split(".")[0] in OURS}
        assert all(name.startswith("tasks.core") for name in ours), f"{path} imports {ours}"


def test_no_utils():
    assert not [path for room in ("flows", "tasks", "infra") for path in files(room) if path.stem == "utils"]
