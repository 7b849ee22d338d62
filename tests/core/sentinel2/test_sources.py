"""Which asset of an item is a band: the original and not a copy, in a format that is read; of real items and others."""

import json

import pytest

from tasks.core.sentinel2.items import NAMES, band_sources, unread
from tests import providers

ZARR = "application/vnd.zarr"
ARCHIVES = (
    "cdse_shape_S2C_T33UWP_20250330",
    "eodc_zarr3_reduced",
    "eopf_eodc_v2_S2A_T32TNQ_20251113",
    "eopf_explorer_S2A_T31TFL_20250831",
    "zarr_best_practice_S2A_T32TQM_20251008",
    "deafrica_c1_S2B_T37MGP_20240710",
)
PIXELS = {"B01": 60, "B02": 10, "B04": 10, "B05": 20, "B8A": 20, "B09": 60, "SCL": 20}


def item(**assets):
    return {"id": "a", "assets": {key: {"href": f"https://h/{key}"} | asset for key, asset in assets.items()}}


def chosen(band, **assets):
    return band_sources(item(**assets))[band].key


@pytest.mark.parametrize("name", ARCHIVES)
def test_each_archive_gives_every_band_in_the_pixels_it_was_taken_in(fixtures_dir, name):
    """By the address of the file or array, which tells them."""
    real = json.loads((fixtures_dir / "stac_items/other_archives" / f"{name}.json").read_text())
    real = real.get("features", [real])[0]
    found = band_sources(real)
    assert list(found) == list(NAMES)
    for band, size in PIXELS.items():
        assert band.lower() in found[band].href.lower().rpartition("/")[2]
        if "deafrica" in name:
            assert next(a["gsd"] for a in real["assets"].values() if a["href"] == found[band].href) == size
        else:
            assert f"{size}m" in found[band].href
    assert {source.format[:4] for source in found.values()} == {"" if name.startswith(("cdse", "deaf")) else "zarr"}


def test_made_up_items_of_copernicus_too():
    found = band_sources(providers.copernicus(providers.NEW))
    assert {band: found[band].key for band in PIXELS} == {band: f"{band}_{size}m" for band, size in PIXELS.items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"gsd": 60}, {"gsd": 20}),
        ({"roles": ["gsd:60m"], "gsd": 10}, {"roles": ["gsd:20m"], "gsd": 10}),
        ({"proj:transform": [60, 0, 0, 0, -60, 0], "gsd": 60}, {"proj:transform": [20, 0, 0, 0, -20, 0], "gsd": 60}),
        ({"bands": [{"name": "B01"}], "raster:spatial_resolution": 60}, {"raster:bands": [{"spatial_resolution": 20}]}),
        ({"roles": ["sampling:original"], "gsd": 20}, {"roles": ["data"], "gsd": 60}),
        ({"gsd": 60}, {"roles": ["sampling:upsampled"], "gsd": 60}),
        ({"type": "image/jp2", "gsd": 60}, {"type": "image/tiff", "gsd": 20}),
        ({"type": "image/tiff", "gsd": 60}, {"type": ZARR, "gsd": 60}),
        ({"type": "image/jp2", "gsd": 20}, {"type": "application/x-netcdf", "gsd": 60}),
    ],
)
def test_the_original_goes_before_its_copies(one, other):
    """In both orders, and whichever of the two has the plainer key."""
    assert chosen("B01", B01=one, coastal=other) == chosen("B01", coastal=other, B01=one) == "B01"
    assert chosen("B01", B01=other, coastal=one) == chosen("B01", coastal=one, B01=other) == "coastal"


@pytest.mark.parametrize(
    ("kind", "format_"),
    [
        ("image/tiff; application=geotiff; profile=cloud-optimized", ""),
        ("image/vnd.stac.geotiff; cloud-optimized=true", ""),
        ("image/jp2", ""),
        ("IMAGE/JP2", ""),
        (None, ""),
        ("application/octet-stream", ""),
        ("application/vnd.zarr", "zarr"),
        ("application/vnd+zarr", "zarr"),
        ("application/vnd.zarr; version=2", "zarr2"),
        ('application/vnd.zarr; version="3"; profile=multiscales', "zarr3"),
        ("application/x-netcdf", None),
        ("application/x-hdf5", None),
        ("application/vnd.zarr+zip", None),
        ("image/png", None),
        ("image/jpeg", None),
    ],
)
def test_the_media_type_tells_what_is_read(kind, format_):
    made = item(B02={"type": kind})
    if format_ is None:
        assert band_sources(made) == {}
        assert unread(made) == {"B02": kind}
    else:
        assert band_sources(made)["B02"].format == format_
        assert unread(made) == {}


def test_a_picture_of_three_bands_is_no_group():
    picture = {"type": ZARR, "roles": ["data"], "bands": [{"name": name} for name in ("B04", "B03", "B02")]}
    assert band_sources(item(TCI_10m=picture)) == {}
    assert band_sources(item(TCI_10m=picture | {"zarr:node_type": "array"})) == {}
    assert set(band_sources(item(any=picture | {"zarr:node_type": "group"}))) == {"B04", "B03", "B02"}


def test_a_query_signs_what_is_below_a_group_too():
    group = {"type": ZARR, "href": "https://h/a.zarr/measurements/reflectance?sig=x", "bands": [{"name": "b02"}] * 2}
    found = band_sources(item(reflectance=group | {"zarr:node_type": "group"}))
    assert found["B02"].href == "https://h/a.zarr/measurements/reflectance/r10m/b02?sig=x"
    assert found["SCL"].href == "https://h/a.zarr/conditions/mask/l2a_classification/r20m/scl?sig=x"
