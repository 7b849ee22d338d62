"""Defines the flow `join`, which makes one database of several."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import JoinParams
from tasks.steps import join_databases


@flow(name="join", flow_run_name="join {databases}", timeout_seconds=6 * HOUR)
def join(databases: list[str], params: JoinParams = JoinParams()) -> str:
    """Joins databases of one checkpoint, such as the world's and a denser one of a region, into one.

    Args:
        databases: URLs of the databases, or newest:LINE. The first one's image stays where several have it.
        params: How to join.

    Returns:
        The URL of the joined database.
    """
    return made(join_databases(*settle(databases=databases, params=params)))
