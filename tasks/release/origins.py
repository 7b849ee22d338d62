"""Writes what a grid's item leads to, beside it: the model, as an Item of STAC's extension for these, and the source.

A grid's readers see its own directory alone: checkpoints, databases and patches are their producer's. So what they may
know of these is told here, at addresses that go with the grid.
"""

from datetime import UTC, datetime
from typing import Any

import pystac
from shapely import box
from shapely.geometry import mapping

from infra import storage
from tasks.cards import find_card
from tasks.grid.conventions import COPERNICUS, LEGAL_NOTICE, MODEL, SENTINEL_2, SOURCE
from tasks.products import CheckpointCard, GridCard

MODEL_CARD = "model-card.json"
CATALOG = "../collection.json"
WORLD = (-180.0, -90.0, 180.0, 90.0)
SCIENTIFIC = "https://stac-extensions.github.io/scientific/v1.0.0/schema.json"
EXTENSIONS = ["https://stac-extensions.github.io/mlm/v1.5.2/schema.json", SCIENTIFIC]
ARCHITECTURES = {
    "harmonics": "SIREN on spherical harmonics",
    "tessellation": "Learned spherical tessellation",
}
PUBLIC = {"kind", "fingerprint", "attribution", "architecture", "encoder", "metrics", "history", "members"}
RANGE = {
    "doi": "10.48550/arXiv.2502.19781",
    "citation": "Dhakal et al., RANGE: Retrieval Augmented Neural Fields for Multi-Resolution Geo-Embeddings, 2025",
}
SATCLIP = {
    "doi": "10.48550/arXiv.2311.17179",
    "citation": "Klemmer et al., SatCLIP: Global, General-Purpose Location Embeddings with Satellite Imagery, 2023",
}
MOSAIKS = {
    "doi": "10.1038/s41467-021-24638-z",
    "citation": "Rolf et al., A generalizable and accessible approach to machine learning with global satellite "
    "imagery, Nature Communications 12, 4392, 2021",
}


def write_origins(home: str, attribution: str, images: tuple[str | None, str | None]) -> None:
    """Writes the source of a grid, and its model where the checkpoint can be read.

    Args:
        home: URL of the grid's directory.
        attribution: What the grid tells of its source.
        images: First and last time of the source's images.
    """
    storage.write_json(storage.join(home, SOURCE), source(attribution, images))
    grid = find_card(home, GridCard)
    card = grid and grid.checkpoint and find_card(grid.checkpoint, CheckpointCard)
    if not (grid and card):
        return
    trained = storage.modified(storage.join(grid.checkpoint, "card.json")).astimezone(UTC)
    storage.write_json(storage.join(home, MODEL_CARD), card.model_dump(mode="json", include=PUBLIC, exclude_unset=True))
    storage.write_json(storage.join(home, MODEL), model(card, trained))


def source(attribution: str, images: tuple[str | None, str | None]) -> dict[str, Any]:
    """Returns the Collection of the images that a grid was made of, as far as its readers may know them."""
    links = [{"rel": "root", "href": CATALOG, "type": pystac.MediaType.JSON}]
    if COPERNICUS in attribution:
        links += [{"rel": "license", "href": LEGAL_NOTICE, "title": "Terms of Copernicus Sentinel data"}]
        links += [{"rel": "via", "href": SENTINEL_2, "type": pystac.MediaType.HTML, "title": "Sentinel-2"}]
    return {
        "type": "Collection",
        "stac_version": "1.1.0",
        "id": "source",
        "title": "Images that the grid was made of",
        "description": f"Satellite images that the grid's vectors stand for: {attribution or 'which ones is not told'}",
        "license": "other",
        "extent": {"spatial": {"bbox": [list(WORLD)]}, "temporal": {"interval": [list(images)]}},
        "links": links,
    }


def model(card: CheckpointCard, trained: datetime) -> dict[str, Any]:
    """Returns the Item of the location encoder, which a grid's vectors were retrieved by.

    Args:
        card: The checkpoint's card.
        trained: When it was written.
    """
    papers = publications(card)
    item = pystac.Item(
        id=f"model-{card.fingerprint}",
        geometry=mapping(box(*WORLD)),
        bbox=list(WORLD),
        datetime=trained.replace(microsecond=0),
        properties=described(card) | {"sci:publications": papers},
        stac_extensions=EXTENSIONS,
    )
    what = "What the encoder is and how it was trained. Its weights are with the producer of the grid."
    role = {"mlm:artifact_type": "safetensors.torch.save_file"}
    asset = pystac.Asset(f"./{MODEL_CARD}", "Model card", what, pystac.MediaType.JSON, ["mlm:model", "metadata"], role)
    item.add_asset("model", asset)
    item.add_link(pystac.Link("root", CATALOG, pystac.MediaType.JSON))
    item.add_link(pystac.Link("derived_from", f"./{SOURCE}", pystac.MediaType.JSON, "Images that it was trained on"))
    item.add_links(cited(papers))
    return item.to_dict(include_self_link=False, transform_hrefs=False) | {"stac_version": "1.1.0"}


def described(card: CheckpointCard) -> dict[str, Any]:
    """Returns the properties of a location encoder in the words of the machine learning extension."""
    architecture = card.architecture.model_dump(mode="json", exclude_none=True)
    settings = {name: value for name, value in card.made_of.items() if isinstance(value, int | float)}
    place = {"shape": [-1, 2], "dim_order": ["batch", "coordinate"], "data_type": "float64"}
    vector = {"shape": [-1, card.architecture.dim], "dim_order": ["batch", "embedding"], "data_type": "float32"}
    origin = (card.model_extra or {}).get("source") or card.attribution
    return {
        "title": "Location encoder",
        "description": f"A network that turns longitude and latitude into {card.architecture.dim} numbers, trained to "
        "agree with satellite images of the same places.",
        "license": "other",
        "mlm:name": f"RANGE location encoder {card.fingerprint}",
        "mlm:architecture": ARCHITECTURES[card.architecture.kind],
        "mlm:tasks": ["similarity-search"],
        "mlm:framework": "PyTorch",
        "mlm:accelerator": None,
        "mlm:accelerator_constrained": False,
        "mlm:accelerator_summary": "None is needed: a CPU will do.",
        "mlm:pretrained": True,
        **({"mlm:pretrained_source": origin} if origin else {}),
        "mlm:input": [{"name": "Longitude and latitude in degrees, WGS84", "bands": [], "input": place}],
        "mlm:output": [{"name": "Location embedding", "tasks": ["similarity-search"], "result": vector}],
        "mlm:hyperparameters": settings | architecture,
    }


def publications(card: CheckpointCard) -> list[dict[str, str]]:
    """Returns the papers that describe a location encoder and the image encoder that it was trained beside."""
    papers = []
    if card.architecture.kind == "harmonics":
        papers.append(SATCLIP)
    if card.encoder and card.encoder.name == "rcf":
        papers.append(MOSAIKS)
    return papers or [RANGE]


def cited(papers: list[dict[str, str]]) -> list[pystac.Link]:
    """Returns the links to papers, which the scientific extension asks for."""
    return [pystac.Link("cite-as", f"https://doi.org/{paper['doi']}", title=paper["citation"]) for paper in papers]
