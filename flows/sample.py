"""Defines the flow `sample`, which makes patches of Sentinel-2 from a STAC catalog."""

from prefect import flow

from flows.deployed import HOUR, made
from flows.inputs import settle
from tasks.params import SampleParams
from tasks.steps import sample_patches


@flow(
    name="sample",
    flow_run_name="sample {params.patches} patches, latitude {params.south:g} to {params.north:g}, {params.datetime}",
    timeout_seconds=48 * HOUR,
)
def sample(params: SampleParams = SampleParams()) -> str:
    """Samples Sentinel-2 image patches on land and stores them with their manifest.

    Args:
        params: Where, when and how many.

    Returns:
        The URL of the patches.
    """
    return made(sample_patches(settle(params=params)))
