/** The page's worker: reads the grid, computes layers, and paints the map's tiles. */

import * as Comlink from "comlink";
import { type Found, likest } from "./compute";
import { type Chunk, Companion, LEADING, type Window } from "./companion";
import { ABSENT, type Band, type Bounds, FAR, type Fitted, type Layer, type Place, fitted, landOf, vectorAt } from "./layers";
import { type Raster, geotiff } from "./geotiff";
import { type Chosen, measure } from "./measure";

const MOST_CELLS = 450_000; // of the level on which all of the world is computed: half a degree is 259,200
const TILE = 256; // pixels
const COARSE = 2.9; // a level serves where its cells are at most so many pixels wide
const APART = 1500; // km between the likest places
const ASIDE = 4; // pixels of a stripe of the hatching

/** What the page is told while the worker works. */
export interface Listener {
  progress(done: number, total: number): void;
  changed(): void;
  failed(message: string): void;
}

export interface About {
  attributes: Record<string, any>;
  step: number;
  /** West, south, east, north. */
  box: [number, number, number, number];
  /** Names of the parts of the grid's vectors. */
  parts: string[];
  /** Share of the semantic half in the grid's vectors, where it can be another. */
  beta?: number;
}

export interface Shown {
  range?: [number, number];
  names?: string[];
  scores?: Record<string, number>;
  value?: number;
  /** The places by which grids were compared, and the level of the other. */
  compared?: { places: Place[]; level: string };
  /** Penalty of the probe. */
  alpha?: number;
  likest?: Found[];
  evidence?: Record<string, number>;
  /** Milliseconds to compute the likeness of all of the world once its data are there. */
  took?: number;
  bytes: number;
  requests: number;
}

class Engine {
  private companion!: Companion;
  private listener!: Listener;
  private layer: Fitted | null = null;
  private painted = new Map<string, Uint8ClampedArray>();
  private readonly others = new Map<string, Promise<Companion>>();
  private readonly known = new WeakMap<Chunk, { lon: Float32Array; lat: Float32Array }>();
  private turn = 0;

  async open(url: string, listener: Listener): Promise<About> {
    this.listener = listener;
    this.companion = await Companion.open(url);
    this.layer = null;
    const [{ west, north, wide, high, rows, columns }] = this.companion.levels;
    const box: About["box"] = [west, north - rows * high, west + columns * wide, north];
    return { attributes: this.companion.attributes, step: wide, box, parts: Object.keys(this.companion.parts), beta: this.companion.beta };
  }

  /** Fits a layer and makes it the one that tiles show; a later call overtakes an earlier one. */
  async show(layer: Layer): Promise<Shown | null> {
    const turn = ++this.turn;
    const coarsest = () => this.read(this.companion.levels.length - 1, false);
    const level = this.companion.world(MOST_CELLS);
    const world = (whole: boolean) => this.read(level, whole);
    const found = await fitted(layer, this.companion, world, coarsest, (url) => this.other(url));
    if (turn !== this.turn) return null;
    this.layer = found;
    this.painted = new Map();
    this.listener.changed();
    const chunks = layer.kind === "colours" ? await coarsest() : await world(found.whole);
    if ("beta" in layer) await this.reading(chunks.map((own) => () => this.companion.at(own, layer.beta)));
    if (turn !== this.turn) return null;
    const told = layer.kind === "likeness" ? await this.alike(layer.at, layer, chunks) : {};
    if (layer.kind !== "colours") this.listener.changed();
    const { bands: _, values: __, colour: ___, whole: ____, ...said } = found;
    return { ...said, ...told, ...this.companion.traffic };
  }

  private async alike(at: Place, { shares, beta }: Chosen, chunks: Chunk[]): Promise<Pick<Shown, "took" | "likest" | "evidence">> {
    const query = (await vectorAt(this.companion, at, LEADING, beta)) as Float32Array;
    const land = chunks.filter((chunk) => !chunk.empty);
    const where = await Promise.all(land.map(async (own) => ({ chunk: await this.companion.at(own, beta), ...this.places(own) })));
    const by = await measure(this.companion, shares);
    const began = performance.now();
    const all = where.map(({ chunk, lon, lat }) => ({ values: by.cells(chunk, query), lon, lat }));
    const took = performance.now() - began;
    const [row, column] = this.companion.cellAt(0, ...at) as [number, number];
    return { took, likest: likest(all, at, 10, APART), evidence: await this.companion.evidence(row, column) };
  }

  /** Returns longitudes and latitudes of a chunk's cells, computed once. */
  private places(chunk: Chunk): { lon: Float32Array; lat: Float32Array } {
    const there = this.known.get(chunk);
    if (there) return there;
    const [lon, lat] = [new Float32Array(chunk.cells), new Float32Array(chunk.cells)];
    for (const { i, at } of landOf(this.companion, chunk, null)) [lon[i], lat[i]] = at;
    this.known.set(chunk, { lon, lat });
    return { lon, lat };
  }

  private other(url: string): Promise<Companion> {
    const found = this.others.get(url) ?? Companion.open(url);
    this.others.set(url, found);
    found.catch(() => this.others.delete(url));
    return found;
  }

  private async read(level: number, whole: boolean): Promise<Chunk[]> {
    const { rows, columns } = this.companion.levels[level];
    const wanted = this.companion.within(0, 0, rows, columns);
    return this.reading(wanted.map(([row, column]) => () => this.companion.chunk(level, row, column, whole)));
  }

  /** Reads chunks, and tells how many are there. */
  private async reading(wanted: (() => Promise<Chunk>)[]): Promise<Chunk[]> {
    let done = 0;
    return Promise.all(
      wanted.map(async (read) => {
        const chunk = await read();
        this.listener.progress(++done, wanted.length);
        return chunk;
      }),
    );
  }

  /** Returns a tile of the map of what is there; what is missing is read, and `changed` told then. */
  async tile(z: number, x: number, y: number): Promise<ImageBitmap> {
    const image = new ImageData(TILE, TILE);
    if (this.layer) {
      const wanted = this.levelFor(z);
      for (let level = this.companion.levels.length - 1; level >= wanted; level--) {
        await this.paint(image, z, x, y, level, level === wanted);
      }
      hatch(image);
    }
    const bitmap = await createImageBitmap(image);
    return Comlink.transfer(bitmap, [bitmap]);
  }

  private levelFor(z: number): number {
    const pixel = 360 / 2 ** z / TILE;
    return this.companion.levels.reduce((best, { wide }, n) => (wide <= COARSE * pixel ? n : best), 0);
  }

  private async paint(image: ImageData, z: number, x: number, y: number, level: number, read: boolean): Promise<void> {
    const { side } = this.companion;
    const { columns: across, rows: down, wide } = this.companion.levels[level];
    const columns = Int32Array.from({ length: TILE }, (_, i) => this.column(level, (x + (i + 0.5) / TILE) / 2 ** z));
    const cells = new Uint32Array(image.data.buffer);
    const parts = new Map<string, Uint32Array | null>();
    for (let j = 0; j < TILE; j++) {
      const row = this.row(level, (y + (j + 0.5) / TILE) / 2 ** z);
      if (row < 0 || row >= down) continue;
      for (let i = 0; i < TILE; i++) {
        const column = columns[i];
        if (column < 0 || column >= across || wide <= 0) continue;
        const [r, c] = [Math.floor(row / side), Math.floor(column / side)];
        const key = `${level}/${r}/${c}`;
        if (!parts.has(key)) parts.set(key, await this.cellsOf(key, level, r, c, read));
        const part = parts.get(key);
        if (part) cells[j * TILE + i] = part[(row % side) * side + (column % side)];
      }
    }
  }

  private column(level: number, share: number): number {
    const { west, wide } = this.companion.levels[level];
    return Math.floor(((((share * 360 - 180 - west) % 360) + 360) % 360) / wide);
  }

  private row(level: number, share: number): number {
    const { north, high } = this.companion.levels[level];
    const lat = (Math.atan(Math.sinh(Math.PI * (1 - 2 * share))) * 180) / Math.PI;
    return Math.floor((north - lat) / high);
  }

  /** Returns the painted cells of a chunk if it is there, and asks for it where it is to be read. */
  private async cellsOf(key: string, level: number, row: number, column: number, read: boolean) {
    const there = this.painted.get(key);
    if (there) return new Uint32Array(there.buffer);
    const layer = this.layer as Fitted;
    const known = this.companion.loaded(level, row, column, layer.whole);
    if (known) {
      const colours = layer.colour(await layer.values(known));
      if (layer === this.layer) this.painted.set(key, colours);
      return new Uint32Array(colours.buffer);
    }
    if (read) {
      const reading = this.companion.chunk(level, row, column, layer.whole);
      reading.then(() => this.listener.changed(), (error: Error) => this.listener.failed(error.message));
    }
    return null;
  }

  /** Returns what is shown as a picture in degrees, a pixel a cell, with its world file. */
  async picture(view: Bounds): Promise<{ picture: Blob; world: string }> {
    const layer = this.layer as Fitted;
    const { bands, rows, columns, west, north, wide, high } = await this.mosaic(layer, view);
    const canvas = new OffscreenCanvas(columns, rows);
    const context = canvas.getContext("2d") as OffscreenCanvasRenderingContext2D;
    context.putImageData(new ImageData(new Uint8ClampedArray(layer.colour(bands)), columns, rows), 0, 0);
    const world = [wide, 0, 0, -high, west + wide / 2, north - high / 2].join("\n");
    return { picture: await canvas.convertToBlob({ type: "image/png" }), world };
  }

  /** Returns the numbers that are shown as GeoTIFF, with some words in its header. */
  async tiff(view: Bounds, said: Record<string, string>): Promise<Blob> {
    const layer = this.layer as Fitted;
    const names = Object.fromEntries((layer.names ?? []).map((name, n) => [`CLASS_${n}`, name]));
    return geotiff(await this.mosaic(layer, view), layer.bands, { ...said, ...names });
  }

  /** Returns a layer's numbers: of all of the grid, or where that has too many cells of what is in view. */
  private async mosaic(layer: Fitted, view: Bounds): Promise<Raster> {
    const window = this.companion.window(view, MOST_CELLS);
    const { level, row, column, rows, columns } = window;
    const { west, north, wide, high } = this.companion.levels[level];
    const wanted = this.companion.within(row, column, rows, columns);
    const chunks = await this.reading(wanted.map(([r, c]) => () => this.companion.chunk(level, r, c, layer.whole)));
    const values = await Promise.all(chunks.map(layer.values));
    const bands = layer.bands.map((_, n) => placed(chunks, values.map((own) => own[n]), window, this.companion.side));
    return { bands, rows, columns, west: west + column * wide, north: north - row * high, wide, high };
  }
}

/** Puts the numbers of chunks together, as the cells of a window have them. */
function placed(chunks: Chunk[], parts: Band[], window: Window, side: number): Band {
  const { row, column, rows, columns } = window;
  const count = rows * columns;
  const found = parts[0] instanceof Float32Array ? new Float32Array(count).fill(NaN) : new Uint8Array(count).fill(ABSENT);
  parts.forEach((band, n) => {
    const [top, left] = [chunks[n].row * side - row, chunks[n].column * side - column];
    const [first, last] = [Math.max(0, -left), Math.min(side, columns - left)];
    for (let i = Math.max(0, -top); i < Math.min(side, rows - top); i++) {
      found.set(band.subarray(i * side + first, i * side + last), (top + i) * columns + left + first);
    }
  });
  return found;
}

/** Draws stripes where a class is too far from all marks. */
function hatch(image: ImageData): void {
  const { data } = image;
  for (let n = 0; n < TILE * TILE; n++) {
    if (data[4 * n + 3] === FAR && ((n % TILE) + Math.floor(n / TILE)) % (2 * ASIDE) < ASIDE) data[4 * n + 3] = 60;
  }
}

export type { Engine };
Comlink.expose(new Engine());
