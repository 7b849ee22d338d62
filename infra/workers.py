"""Checks workers that were started elsewhere: are they like this process, and do they reach the storage?

What they lack shows before any work, in one sentence that names the worker.
"""

import hashlib
import resource
import secrets
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed import Client

from infra import storage
from infra.errors import UserError

SAME = ("rangegrid", "torch", "numpy", "zarr", "xarray", "obstore", "dask", "distributed", "cloudpickle")
ROOMS = ("infra", "tasks")  # packages that workers run
NAMED = 3  # unfit workers named in one message


def check(client: Client, storage_url: str) -> None:
    """Refuses workers of other versions or other code than this process, or without the same storage.

    Args:
        client: The cluster.
        storage_url: Root of the products, which every worker must read and write.

    Raises:
        UserError: It names the workers, what they lack and the way out.
    """
    for differing in (_other_versions, _other_code):
        _refuse(client, list(differing(client)), "install what constraints.txt says, and start them again")
    without = list(_without_storage(client, storage_url))
    _refuse(client, without, f"give them what reaches {storage_url}: the same RANGEGRID_ and AWS_ variables, or disk")


def _refuse(client: Client, lacking: list[tuple[str, str]], way_out: str) -> None:
    if not lacking:
        return
    names = {address: worker["id"] for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()}
    told = "; ".join(f"worker {names.get(address, '?')} at {address} {lack}" for address, lack in lacking[:NAMED])
    if len(lacking) > NAMED:
        more = f", and {len(lacking) - NAMED} more"
    else:
        more = ""
    raise UserError(f"{told}{more}: {way_out}")


def _other_versions(client: Client) -> Iterator[tuple[str, str]]:
    """Yields (address, what differs); asks without our code, which a worker may lack."""
    found: Any = client.get_versions(packages=list(SAME))
    ours = _versions(found["client"])
    for address, worker in found["workers"].items():
        theirs = _versions(worker)
        unlike = [f"{name} {theirs[name]} and not {ours[name]}" for name in ours if theirs[name] != ours[name]]
        if unlike:
            yield address, "has " + ", ".join(unlike)


def _everywhere(client: Client, *call: Any) -> dict[str, Any]:
    """Returns the result or error of a call on each worker, by its address."""
    found: Any = client.run(*call, on_error="return")
    return found


def _versions(info: dict[str, Any]) -> dict[str, str]:
    """Returns versions by package; for Python the first two parts, without the suffixes of CPU and GPU builds."""
    packages = info["packages"]
    known = {name: str(packages.get(name)).partition("+")[0] for name in SAME}
    return {"python": ".".join(packages["python"].split(".")[:2])} | known


def _other_code(client: Client) -> Iterator[tuple[str, str]]:
    """Returns the version of the release before, for a checkout between two releases."""
    ours = code()
    for address, theirs in _everywhere(client, code).items():
        if theirs != ours:
            yield address, f"runs other rangegrid code ({theirs}) than this process ({ours})"


@lru_cache
def code() -> str:
    """Returns the digest of the sources that a worker runs, as first read, since a worker runs what it loaded."""
    digest = hashlib.sha256()
    for room in ROOMS:
        folder = Path(str(find_spec(room).origin)).parent  # type: ignore[union-attr]
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _without_storage(client: Client, url: str) -> Iterator[tuple[str, str]]:
    """Checks that every worker reads what this process writes, and has no other disk under the same name."""
    token = secrets.token_hex(8)
    probe = storage.join(url, f".rangegrid-workers-{token}")
    storage.write(storage.join(probe, "client"), token.encode())
    try:
        for address, lack in _everywhere(client, reach, probe, token).items():
            if lack:
                yield address, f"cannot use the storage ({lack})"
    finally:
        storage.delete(probe)


def reach(probe: str, token: str) -> str:
    """Reads the client's object and writes one beside it, on a worker; tells what is wrong, or nothing."""
    try:
        found = storage.read(storage.join(probe, "client")).decode()
        storage.write(storage.join(probe, secrets.token_hex(8)), token.encode())
    except FileNotFoundError:
        return "it sees another one under the same URL"
    except UserError as error:
        return str(error)
    if found == token:
        return ""
    return "it sees another one under the same URL"


def peak(client: Client) -> tuple[int, int]:
    """Returns the memory limit of a worker in bytes, 0 without one, and the largest peak of a worker."""
    limits = [worker["memory_limit"] or 0 for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    return min(limits, default=0), max(client.run(_peak, on_error="ignore").values(), default=0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def room(client: Client) -> float:
    """Returns the bytes of memory for one thread of the smallest worker; infinite without limits."""
    found = client.scheduler_info(n_workers=-1)["workers"].values()
    return min((w["memory_limit"] / w["nthreads"] for w in found if w["memory_limit"]), default=float("inf"))
