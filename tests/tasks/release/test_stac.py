"""What lies beside a grid: the STAC item and collection against their schemas, previews that open."""

import json
import posixpath
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from io import BytesIO
from urllib.parse import urljoin

import numpy as np
import pystac
import pytest
import rasterio
import torch
from PIL import Image
from pystac.validation import JsonSchemaSTACValidator, validate_dict

from infra import clusters, storage
from tasks.cards import write_card
from tasks.core.encoders.location import LocationEncoder
from tasks.grid.store import open_vectors
from tasks.model.checkpoint import save_checkpoint
from tasks.params import PublishParams, SampleParams
from tasks.products import PatchesCard
from tasks.publish import publish_grid
from tasks.release.stac import write_collection, write_item
from tests.tasks.test_publish import DIM, STEP, VALUES, images, store
from tests.test_architecture import ROOT

SCHEMAS = ROOT / "tests/schemas"
HOUR = timedelta(hours=1)
CORE = "https://schemas.stacspec.org/v1.0.0"


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The directories of two grids of one database, in float32 and in int8 with evidence."""
    folder = tmp_path_factory.mktemp("stac")
    torch.manual_seed(0)
    checkpoint = f"{folder.as_uri()}/checkpoints/one"
    save_checkpoint(checkpoint, LocationEncoder(6, hidden=16, dim=DIM))
    database = store(folder, "databases/one", images(np.arange(200)), checkpoint=read_space(checkpoint))
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        params = PublishParams(**STEP), PublishParams(**STEP, dtype="int8", evidence=True)
        grids = [publish_grid(client, checkpoint, database, each) for each in params]
        yield [posixpath.dirname(grid) for grid in grids]


def read_space(checkpoint):
    return storage.read_json(f"{checkpoint}/card.json")["fingerprint"]


@pytest.fixture(scope="module")
def validator():
    return schemas()


def schemas():
    """pystac's validator, which finds every schema in the repository."""
    found = JsonSchemaSTACValidator()
    projjson = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}  # in no item: all say EPSG
    found.schema_cache["https://proj.org/schemas/v0.7/projjson.schema.json"] = projjson
    for path in (SCHEMAS / "stac").glob("*.json"):
        kind = "collection" if path.stem == "collection" else "item"
        found.schema_cache[f"{CORE}/{kind}-spec/json-schema/{path.stem}.json"] = json.loads(path.read_text())
    for path in (SCHEMAS / "extensions").glob("*.json"):
        name, version = path.stem.rsplit("-", 1)
        url = f"https://stac-extensions.github.io/{name}/{version}/schema.json"
        found.schema_cache[url] = json.loads(path.read_text())
    return found


def check(told, validator):
    """The object is valid by the schema of its version and by that of each of its extensions."""
    assert len(validate_dict(told, validator=validator)) == 1 + len(told.get("stac_extensions", []))


def read(home, name):
    return storage.read_json(f"{home}/{name}")


@pytest.mark.parametrize("which", [0, 1])
def test_the_item_is_valid(homes, validator, which):
    item = read(homes[which], "item.json")
    check(item, validator)
    del item["assets"]["embeddings"]
    with pytest.raises(pystac.STACValidationError):
        validate_dict(item, validator=validator)


WINDOWS = {  # by what `--datetime` takes: what the item tells; an end that is open is when the grid was begun
    "2021-01-01/2022-12-31": ("2021-01-01T00:00:00Z", "2022-12-31T23:59:59Z"),
    "2021-06-30": ("2021-06-30T00:00:00Z", "2021-06-30T23:59:59Z"),
    "2020-02": ("2020-02-01T00:00:00Z", "2020-02-29T23:59:59Z"),
    "2021": ("2021-01-01T00:00:00Z", "2021-12-31T23:59:59Z"),
    "2021-06-30t12:00:00.5+02:00/2022": ("2021-06-30T10:00:00.500000Z", "2022-12-31T23:59:59Z"),
    "2021-01-01/..": ("2021-01-01T00:00:00Z", None),
    "/2021": ("2015-06-27T00:00:00Z", "2021-12-31T23:59:59Z"),
    "1999": ("1999-01-01T00:00:00Z", "1999-12-31T23:59:59Z"),
}


@pytest.fixture(scope="module")
def windowed(homes, tmp_path_factory):
    """The directory of a grid of images whose sample is there, of 2021 or later."""
    folder, checkpoint = (
        tmp_path_factory.mktemp("windows"),
        f"{posixpath.dirname(posixpath.dirname(homes[0]))}/checkpoints/one",
    )
    made_of = {"datetime": SampleParams(datetime="2021-01-01/..").datetime}
    with pytest.MonkeyPatch.context() as patch, clusters.connect("threads", 2) as client:
        patch.setenv("RANGEGRID_STORAGE_URL", folder.as_uri())
        write_card(f"{folder.as_uri()}/patches/sample", PatchesCard(fingerprint="sample", made_of=made_of))
        arrays, space = images(np.arange(20)), read_space(checkpoint)
        database = store(folder, "databases/one", arrays, checkpoint=space, patches="sample")
        yield posixpath.dirname(publish_grid(client, checkpoint, database, PublishParams(step=30.0, tile_cells=3)))


def test_an_item_tells_the_window_of_the_images(windowed, validator):
    """However it is written; an end that is open is when the grid was begun."""
    published = read(windowed, "item.json")
    assert published["properties"]["start_datetime"] == WINDOWS["2021-01-01/.."][0]
    zarr = read(windowed, "grid.zarr/zarr.json")
    for window, (start, end) in WINDOWS.items():
        zarr["attributes"]["rangegrid:datetime"] = SampleParams(datetime=window).datetime
        storage.write_json(f"{windowed}/grid.zarr/zarr.json", zarr)
        item = write_item(windowed)
        check(item, validator)
        told = pystac.Item.from_dict(item).common_metadata
        assert item["properties"]["start_datetime"] == start
        assert item["properties"]["end_datetime"] == end or told.end_datetime > datetime.now(UTC) - HOUR
        assert told.start_datetime <= told.end_datetime
        collection = write_collection(posixpath.dirname(windowed))
        check(collection, validator)
        assert collection["extent"]["temporal"]["interval"][0][0] == start
    zarr["attributes"]["rangegrid:datetime"] = "2021-01-01/.."
    storage.write_json(f"{windowed}/grid.zarr/zarr.json", zarr)


def test_the_collection_is_valid_and_leads_to_every_item(homes, validator):
    grids = posixpath.dirname(homes[0])
    ids = [posixpath.basename(home) for home in homes]
    written = write_collection(grids, ids[0])
    collection = read(grids, "collection.json")
    assert written == collection
    check(collection, validator)
    assert collection["data_type"] == "float32"
    assert collection["summaries"]["data_type"] == ["float32", "int8"]
    assert collection["emb:dimensions"] == VALUES + DIM
    links = {link["href"] for link in collection["links"] if link["rel"] == "item"}
    assert {storage.read_json(urljoin(f"{grids}/", link))["id"] for link in links} == set(ids)
    (model,) = [link["href"] for link in collection["links"] if link["rel"] == "emb:model"]
    assert storage.read_json(urljoin(f"{grids}/", model))["properties"]["mlm:framework"] == "PyTorch"


BOXES = {"one": [170.0, -20.0, -170.0, 10.0], "two": [-5.0, 40.0, 10.0, 50.0]}


def test_the_collection_of_a_grid_across_180_degrees_goes_around_the_globe(homes, tmp_path):
    item = read(homes[0], "item.json")
    moments = {"one": "2020-05-01T00:00:00Z", "two": "2021-05-01T00:00:00Z"}
    for name, box in BOXES.items():
        about = {"id": name, "bbox": box, "properties": item["properties"] | {"datetime": moments[name]}}
        storage.write_json(f"{tmp_path.as_uri()}/{name}/item.json", item | about)
    extent = write_collection(tmp_path.as_uri())["extent"]
    assert extent["spatial"]["bbox"] == [[-180.0, -20.0, 180.0, 50.0]]
    assert extent["temporal"]["interval"] == [list(moments.values())]


def test_the_item_tells_the_scales_and_the_layers(homes):
    properties = read(homes[1], "item.json")["properties"]
    variables = read(homes[1], "grid.zarr/zarr.json")["consolidated_metadata"]["metadata"]
    expected = [variables[name]["attributes"]["scale_factor"] for name in ("visual", "location")]
    assert properties["emb:quantization"]["scale"] == expected
    assert properties["cube:dimensions"]["visual_dim"]["extent"] == [0, VALUES - 1]
    assert properties["cube:variables"]["distance_km"] == {
        "dimensions": ["lat", "lon"],
        "unit": "km",
        "variable_type": "data",
    }


def test_every_asset_is_there(homes):
    for home in homes:
        for asset in read(home, "item.json")["assets"].values():
            url = urljoin(f"{home}/", asset["href"])
            assert storage.exists(url) or storage.names(url), url


def test_a_score_card_beside_the_grid_is_an_asset(homes):
    home = homes[0]
    assert "score-card" not in write_item(home)["assets"]
    storage.write_json(card := storage.join(home, "scorecard.json"), {})
    assert urljoin(f"{home}/", write_item(home)["assets"]["score-card"]["href"]) == card
    storage.delete(card)


def test_the_map_lies_where_the_grid_does(homes):
    home = homes[0]
    land = np.isfinite(open_vectors(f"{home}/grid.zarr")[0])
    with rasterio.open(BytesIO(storage.read(f"{home}/world.tif"))) as picture:
        assert picture.crs == "EPSG:4326"
        assert picture.bounds == (-180, -90, 180, 90)
        np.testing.assert_array_equal(picture.read(4) > 0, land)


def test_the_page_shows_what_is_there(homes):
    page = storage.read(f"{homes[1]}/index.html").decode()
    for name in set(re.findall(r'(?:src|href)="([^"]+)"', page)):
        assert storage.exists(f"{homes[1]}/{name}"), name
    assert 'xr.open_zarr("grid.zarr", zarr_format=3)' in page  # from where the page lies
    assert "cosine with float32" in page
    picture = np.asarray(Image.open(BytesIO(storage.read(f"{homes[1]}/evidence.png"))).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # of the scale: cells differ in their evidence
    body = re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", page.split("<h1>")[1].split("<table>")[0])
    ET.fromstring(f"<page><h1>{body}</page>")
