/** The map: the grid's cells as tiles of the worker's, coastlines, marks; globe or flat. */

import * as Comlink from "comlink";
import * as maplibre from "maplibre-gl";
import { mesh } from "topojson-client";
import type { Engine } from "./engine";
import type { Bounds, Place } from "./layers";

const FINER_COASTS = 3.5; // zoom from which the finer coastlines are read
const SOURCE = "cells";
const NARROW = 640; // pixels; a narrower page has its panel below, as style.css says

export interface Point {
  at: Place;
  colour: string;
  text: string;
}

export class WorldMap {
  readonly map: maplibre.Map;
  private markers: maplibre.Marker[] = [];
  private coasts = "";
  private refreshing = 0;

  constructor(container: HTMLElement, engine: Comlink.Remote<Engine>, onClick: (at: Place) => void) {
    maplibre.setWorkerUrl(new URL("map-worker.js", document.baseURI).href);
    maplibre.addProtocol("cells", async (request) => {
      const [z, x, y] = request.url.replace("cells://", "").split("/").map(Number);
      return { data: await engine.tile(z, x, y) };
    });
    this.map = new maplibre.Map({ container, style: style(), zoom: fitting(), center: [12, 22], maxZoom: 9, attributionControl: false });
    this.map.addControl(new maplibre.NavigationControl({ visualizePitch: false }), "bottom-right");
    this.map.addControl(new maplibre.ScaleControl({}), "bottom-right");
    this.map.touchZoomRotate.disableRotation();
    if (innerWidth > NARROW) this.map.setPadding({ left: 345, right: 0, top: 0, bottom: 0 });
    this.map.on("click", (event) => onClick(wrapped(event.lngLat)));
    this.map.on("load", () => this.coast("land-110m.json"));
    this.map.on("zoom", () => this.map.getZoom() > FINER_COASTS && this.coast("land-50m.json"));
    this.map.getCanvas().setAttribute("aria-label", "Map of the grid. Arrow keys move it, plus and minus zoom; Enter takes the middle.");
    this.map.getCanvas().addEventListener("keydown", (event) => {
      if (event.key === "Enter") onClick(wrapped(this.map.getCenter()));
    });
  }

  /** Shows what the worker has now; many calls in a row count as one. */
  refresh(): void {
    if (this.refreshing) return;
    this.refreshing = window.setTimeout(() => {
      this.refreshing = 0;
      if (this.map.getSource(SOURCE)) this.map.refreshTiles(SOURCE);
    }, 60);
  }

  set globe(on: boolean) {
    this.map.setProjection({ type: on ? "globe" : "mercator" });
  }

  get view(): Bounds {
    const bounds = this.map.getBounds();
    return [bounds.getWest(), bounds.getSouth(), bounds.getEast(), bounds.getNorth()];
  }

  /** Replaces the marks. */
  mark(points: Point[]): void {
    this.markers.forEach((marker) => marker.remove());
    this.markers = points.map(({ at, colour, text }) => {
      const marker = new maplibre.Marker({ color: colour, scale: 0.7 }).setLngLat(at).addTo(this.map);
      marker.getElement().setAttribute("aria-label", text);
      marker.getElement().title = text;
      return marker;
    });
  }

  private async coast(name: string): Promise<void> {
    if (this.coasts === name) return;
    this.coasts = name;
    const topology = await (await fetch(new URL(name, document.baseURI))).json();
    const lines = mesh(topology, topology.objects.land).coordinates.flatMap(unbroken);
    (this.map.getSource("coast") as maplibre.GeoJSONSource).setData({ type: "MultiLineString", coordinates: lines });
  }

  /** Takes the colours of the page, which may be light or dark. */
  themed(): void {
    for (const [layer, property, name] of [["space", "background-color", "--sea"], ["coast", "line-color", "--coast"]]) {
      this.map.setPaintProperty(layer, property as "line-color", colour(name));
    }
  }
}

/** Returns the zoom at which the globe fills what the panel leaves of the page. */
function fitting(): number {
  const room = innerWidth > NARROW ? Math.min(innerWidth - 345, innerHeight) : Math.min(innerWidth, innerHeight * 0.46);
  return Math.log2((room * 0.92 * Math.PI) / 512);
}

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function style(): maplibre.StyleSpecification {
  return {
    version: 8,
    projection: { type: "globe" },
    sources: {
      [SOURCE]: { type: "raster", tiles: ["cells://{z}/{x}/{y}"], tileSize: 256, maxzoom: 9 },
      coast: { type: "geojson", data: { type: "FeatureCollection", features: [] } },
    },
    layers: [
      { id: "space", type: "background", paint: { "background-color": colour("--sea") } },
      { id: SOURCE, type: "raster", source: SOURCE, paint: { "raster-resampling": "nearest", "raster-fade-duration": 0 } },
      { id: "coast", type: "line", source: "coast", paint: { "line-color": colour("--coast"), "line-width": 0.8 } },
    ],
  };
}

/** Returns the pieces of a line between its jumps across 180 degrees and along the south pole, which are no coasts. */
function unbroken(line: number[][]): number[][][] {
  const pieces: number[][][] = [[]];
  line.forEach((point, n) => {
    const jumps = n > 0 && (Math.abs(point[0] - line[n - 1][0]) > 180 || Math.abs(point[0]) > 179.99 || point[1] < -89.9);
    if (jumps) pieces.push([]);
    pieces[pieces.length - 1].push(point);
  });
  return pieces.filter((piece) => piece.length > 1);
}

export function wrapped({ lng, lat }: { lng: number; lat: number }): Place {
  return [((((lng + 180) % 360) + 360) % 360) - 180, lat];
}
