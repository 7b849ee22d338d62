"""Validates the Kubernetes objects and the compose file against their published schemas: run by `make audit`.

The schemas come with packages that are too large for every installation: kubernetes-validate, dask-kubernetes for
its own resource, compose-spec. Nothing here has run in a container or on a Kubernetes cluster.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import compose_spec
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.33"
VARIABLE = r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}"


def dask_cluster() -> None:
    """The DaskCluster: its resource's own schema, and its pods and service as Kubernetes has them."""
    cluster = yaml.safe_load((ROOT / "infra/kubernetes/daskcluster.yaml").read_text())
    for part in ("worker", "scheduler"):
        for container in cluster["spec"][part]["spec"]["containers"]:
            container["image"] = "rangegrid:latest"
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": part}, "spec": cluster["spec"][part]["spec"]})
    service = cluster["spec"]["scheduler"]["service"]
    validate({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "scheduler"}, "spec": service})
    charts = files("dask_kubernetes") / "operator/deployment/helm/dask-kubernetes-operator/crds"
    definition = yaml.safe_load((charts / "daskcluster.yaml").read_text())
    (version,) = definition["spec"]["versions"]
    jsonschema.validate(cluster, version["schema"]["openAPIV3Schema"])


def job() -> None:
    """The Job that the pool's template makes with its own defaults."""
    template = json.loads((ROOT / "infra/pools/kubernetes.json").read_text())
    defaults = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    defaults |= {"name": "rangegrid", "command": ["prefect", "flow-run", "execute"], "env": [], "labels": {}}
    defaults |= {"annotations": {}}
    validate(fill(template["job_configuration"]["job_manifest"], defaults))


def compose() -> None:
    """The compose file, its variables and anchors resolved."""
    text = (ROOT / "infra/containers/compose.yaml").read_text()
    told = yaml.safe_load(re.sub(VARIABLE, lambda found: found[2] or "given", text))
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(told)).validate()


def fill(value: Any, defaults: dict[str, Any]) -> Any:
    """The template with its variables' defaults."""
    if isinstance(value, dict):
        return {key: fill(inner, defaults) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, defaults) for inner in value]
    if not isinstance(value, str) or "{{" not in value:
        return value
    name = value.split()[1]
    return defaults[name] if value.endswith("}}") else value.replace(f"{{{{ {name} }}}}", defaults[name])


def validate(thing: dict[str, Any]) -> None:
    """Refuses what Kubernetes would, and what it would silently drop."""
    kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    print(f"ok    {thing['kind']} {thing['metadata'].get('name', '')}")


if __name__ == "__main__":
    dask_cluster()
    print("ok    DaskCluster")
    job()
    compose()
    print("ok    compose.yaml")
