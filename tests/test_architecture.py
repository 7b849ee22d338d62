"""The direction of imports: flows -> tasks -> tasks.core, flows and tasks -> infra, never back; and between rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"flows", "tasks", "infra", "tests"}
STEPS = {"sample", "train", "encode", "publish", "evaluate", "ablate", "steps"}
BELOW = {  # of each room of tasks, the rooms that it may import
    "plots": set(),
    "tables": set(),
    "patches": {"plots", "tables"},
    "model": {"patches"},
    "database": {"tables", "model"},
    "grid": {"plots", "tables", "model", "database"},
    "points": {"tables", "model", "database", "grid"},
    "release": {"plots", "model", "database", "grid"},
    "evaluation": {"tables", "model", "database", "grid", "points"},
}
MOST_FILES = 20  # in a folder: more than that nobody overlooks
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


def product_files() -> list[Path]:
    return [path for room in ("flows", "tasks", "infra") for path in files(room)]


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


def test_every_room_of_tasks_has_its_place():
    rooms = {path.name for path in (ROOT / "tasks").iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"core"} == BELOW.keys()


@pytest.mark.parametrize("room", BELOW)
def test_rooms_import_those_below_and_no_step(room):
    rooms = {f"tasks.{other}" for other in BELOW}
    allowed = {f"tasks.{other}" for other in BELOW[room] | {room}}
    steps = {f"tasks.{step}" for step in STEPS}
    for path in files(f"tasks/{room}"):
        behind = {".".join(name.split(".")[:2]) for name in imported(path)}
        assert not behind & (rooms - allowed | steps), f"{path} imports {behind & (rooms - allowed | steps)}"


def test_no_file_of_a_room_uses_what_is_private_in_another():
    for path in product_files():
        private = {name for name in imported(path) if name.rpartition(".")[2].startswith("_")} - {"__future__"}
        ours = {name for name in private if name.split(".")[0] in OURS}
        assert not ours, f"{path} imports {ours}"


def test_no_folder_has_more_files_than_one_overlooks():
    folders = {path.parent for room in ("flows", "tasks", "infra", "tests") for path in files(room)}
    full = {folder: count for folder in folders if (count := len(list(folder.glob("*.py")))) > MOST_FILES}
    assert not full


def test_no_file_imports_itself_by_others():
    """Each file's imports are taken away with it, those first that import nothing of ours: circles are left over."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in product_files()}
    behind = {name: imported(path) & modules.keys() for name, path in modules.items()}
    while free := [name for name, needed in behind.items() if not needed]:
        behind = {name: needed - set(free) for name, needed in behind.items() if needed}
    assert not behind
