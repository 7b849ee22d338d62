"""The files by which rangegrid is installed: pools, policies, automations and the compose file agree with the code.

`make audit` lints and validates them by tools of their own.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from infra.settings import Settings

ROOT = Path(__file__).parents[2]
POLICIES = {path.stem: json.loads(path.read_text()) for path in (ROOT / "infra/policies").glob("*.json")}
COMPOSE = yaml.safe_load((ROOT / "infra/containers/compose.yaml").read_text())
ONLY_READ = {"s3:GetObject", "s3:ListBucket"}


def allowed(policy, action, key):
    """Whether a policy lets its holder do this to an object of the products."""
    return any(
        action in statement["Action"] and any(fnmatch(f"arn:aws:s3:::PRODUCTS/{key}", r) for r in statement["Resource"])
        for statement in POLICIES[policy]["Statement"]
    )


def test_policies_allow_named_actions_on_named_places_alone():
    assert set(POLICIES) == {"source", "staging", "publish", "reader"}
    for policy in POLICIES.values():
        for statement in policy["Statement"]:
            assert statement["Effect"] == "Allow"
            assert set(statement["Action"]) <= {*ONLY_READ, "s3:PutObject", "s3:DeleteObject"}
            assert all(r.split(":::")[1].rstrip("*").rstrip("/") for r in statement["Resource"])


def test_every_product_has_one_role_that_writes_it():
    kinds = {
        kind for path in (ROOT / "tasks").glob("*.py") for kind in re.findall(r'product_url\("(\w+)"', path.read_text())
    }
    assert {"patches", "grids"} <= kinds
    for kind in kinds:
        writers = [role for role in POLICIES if allowed(role, "s3:PutObject", f"{kind}/0123/card.json")]
        assert writers == (["publish"] if kind in ("grids", "reports", "ablations") else ["staging"])


def test_a_reader_sees_what_is_published_and_changes_nothing():
    actions = {action for role in ("reader", "source") for s in POLICIES[role]["Statement"] for action in s["Action"]}
    assert actions <= ONLY_READ
    assert allowed("reader", "s3:GetObject", "grids/0123/grid.zarr/zarr.json")
    assert not allowed("reader", "s3:GetObject", "databases/0123/card.json")


def test_automations_are_prefects():
    told = yaml.safe_load((ROOT / "infra/automations.yaml").read_text())["automations"]
    read = [AutomationCore.model_validate(automation) for automation in told]
    assert [automation.actions[0].type for automation in read] == [
        "change-flow-run-state",
        *["send-notification"] * 10,
    ]


@pytest.mark.parametrize("pool", ["docker", "kubernetes"])
def test_a_pool_names_no_secret_and_no_variable_that_is_not_there(pool):
    template = json.loads((ROOT / "infra/pools" / f"{pool}.json").read_text())
    known = template["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == set(known)
    env = known["env"].get("default", {})
    assert all(value.startswith("{{ prefect.blocks.secret.") for name, value in env.items() if "AWS_" in name)
    assert _known_to_settings(env)


def test_the_compose_file_sets_what_the_settings_know_and_no_secret():
    environment = {k: str(v) for s in COMPOSE["services"].values() for k, v in s.get("environment", {}).items()}
    assert _known_to_settings(environment)
    for name, value in environment.items():
        if re.search("KEY|SECRET|PASSWORD", name):
            assert value.startswith("${"), f"{name} is written down"


def _known_to_settings(environment):
    fields = {f"RANGEGRID_{name}".upper() for name in Settings.model_fields}
    return {name for name in environment if name.startswith("RANGEGRID_")} <= fields


def test_the_image_is_locked():
    locked = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    image = [line.split("==") for line in (ROOT / "infra/containers/requirements.txt").read_text().split()]
    assert all(len(pin) == 2 for pin in image)
    assert not [(name, version) for name, version in image if locked.get(name, version) != version]
    assert {"torch", "prefect", "dask-kubernetes", "dask-gateway", "prefect-docker"} <= dict(image).keys()
