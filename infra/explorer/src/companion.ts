/** Reads the first components of a grid's compact product, `compact.zarr`: levels of int8 codes in chunks, each one
 * object, and its evidence. */

import * as zarr from "zarrita";
import { type Codes, lengths, moved } from "./compute";
import type { Bounds } from "./layers";
import { Told, damaged, read, readJson } from "./told";

/** Components of a chunk. */
export const LEADING = 64;

/** One level: its cells, in degrees. */
export interface Level {
  /** Path of its arrays, with a slash at its end. */
  path: string;
  rows: number;
  columns: number;
  west: number;
  north: number;
  wide: number;
  high: number;
}

/** Some cells of a level. */
export interface Window {
  level: number;
  row: number;
  column: number;
  rows: number;
  columns: number;
}

/** A chunk of a level. */
export interface Chunk extends Codes {
  level: number;
  row: number;
  column: number;
  /** Whether the further components are there too. */
  whole: boolean;
  /** Lengths of the first 64 components. */
  norms: Float32Array;
  /** Whether no cell has data. */
  empty: boolean;
}

/** A store of Zarr objects that counts bytes, reads whole objects, and fails in sentences. */
class Store implements zarr.AsyncReadable {
  bytes = 0;
  requests = 0;

  constructor(readonly url: string) {}

  async get(key: string): Promise<Uint8Array | undefined> {
    const answer = await read(this.url + key.slice(1), "part of this grid");
    const body = new Uint8Array(await answer.arrayBuffer());
    this.bytes += body.length;
    this.requests += 1;
    return body;
  }
}

export class Companion {
  private arrays = new Map<string, Promise<zarr.Array<zarr.DataType, zarr.AsyncReadable>>>();
  private chunks = new Map<string, Promise<Chunk>>();
  private there = new Map<string, Chunk>();
  private readonly slopes = new WeakMap<Chunk, Promise<Int8Array>>();
  private readonly moves = new WeakMap<Chunk, { beta: number; chunk: Chunk }>();
  private slopeScale: Promise<Float32Array> | null = null;

  private constructor(
    readonly url: string,
    readonly levels: Level[],
    readonly side: number,
    readonly scale: Float32Array,
    private readonly blocks: number,
    readonly attributes: Record<string, any>,
    private readonly root: zarr.Location<any>,
    private readonly store: Store,
  ) {}

  /** Opens the companion at a URL that ends with a slash. */
  static async open(url: string): Promise<Companion> {
    const node = await readJson(`${url}zarr.json`, "companion of a grid");
    const metadata = node?.consolidated_metadata?.metadata;
    const shown = node?.attributes?.["rangegrid:shown"]; // of a projected grid, the group of the levels in degrees
    const base = shown ? `${shown}/` : "";
    const layout = (shown ? metadata?.[shown] : node)?.attributes?.multiscales?.layout;
    const about = metadata?.[`${base}embedding`];
    if (!layout || !about) throw new Told(`${url} is no companion of a grid: give the address of compact.zarr.`);
    const levels = layout.map((each: any) => {
      const [wide, , west, , high, north] = each["spatial:transform"];
      const [rows, columns] = each["spatial:shape"];
      const path = base + (each.asset === "." ? "" : `${each.asset}/`);
      return { path, rows, columns, west, north, wide, high: -high };
    });
    const store = new Store(url);
    const known = await zarr.withConsolidatedMetadata(new Known(store, node), { format: "v3" });
    const root = zarr.root(known);
    const scale = await scaleOf(root, "scale", 2 * LEADING);
    const blocks = Math.ceil(about.shape[0] / LEADING);
    const side = about.chunk_grid.configuration.chunk_shape[1];
    return new Companion(url, levels, side, scale, blocks, node.attributes, root, store);
  }

  /** Bytes and requests until now. */
  get traffic(): { bytes: number; requests: number } {
    return { bytes: this.store.bytes, requests: this.store.requests };
  }

  /** The parts of the grid's vectors by name: the first dimension of each, and the one after its last. */
  get parts(): Record<string, [number, number]> {
    return this.attributes["rangegrid:parts"] ?? {};
  }

  /** Share of the semantic half in the grid's vectors, where it can be another. */
  get beta(): number | undefined {
    return this.attributes["rangegrid:beta"];
  }

  /** Returns the first components of a chunk as they were by another beta; null: the grid's own. */
  async at(chunk: Chunk, beta: number | null): Promise<Chunk> {
    if (beta === null || this.beta === undefined || chunk.empty) return chunk;
    const there = this.moves.get(chunk);
    if (there?.beta === beta) return there.chunk;
    this.slopeScale ??= scaleOf(this.root, "beta_scale", LEADING);
    const [slopes, slopeScale] = await Promise.all([this.slopesOf(chunk), this.slopeScale]);
    const part = moved(chunk, this.scale, slopes, slopeScale, beta - this.beta);
    const found = { ...chunk, ...part, whole: false, norms: lengths(part, this.scale, LEADING) };
    this.moves.set(chunk, { beta, chunk: found });
    return found;
  }

  private slopesOf(chunk: Chunk): Promise<Int8Array> {
    const { level, row, column } = chunk;
    const reading = this.slopes.get(chunk) ?? (this.part(level, "beta", 0, row, column) as Promise<Int8Array>);
    this.slopes.set(chunk, reading);
    reading.catch(() => this.slopes.delete(chunk)); // a later try asks again
    return reading;
  }

  /** By which each dimension of a vector enters each of the first components, one dimension after the other. */
  async axes(): Promise<Float32Array> {
    const { data, shape } = await zarr.get(await zarr.open.v3(this.root.resolve("axes"), { kind: "array" }));
    const found = new Float32Array(shape[0] * LEADING); // 0 for components that a small grid has not
    const count = Math.min(LEADING, shape[1]);
    for (let d = 0; d < shape[0]; d++) found.set((data as Float32Array).subarray(d * shape[1], d * shape[1] + count), d * LEADING);
    return found;
  }

  /** Rows and columns of the chunks that hold some cells of a level. */
  within(row: number, column: number, rows: number, columns: number): [number, number][] {
    const span = (first: number, count: number) => {
      const [start, stop] = [Math.floor(first / this.side), Math.ceil((first + count) / this.side)];
      return Array.from({ length: stop - start }, (_, n) => start + n);
    };
    return span(row, rows).flatMap((r) => span(column, columns).map((c): [number, number] => [r, c]));
  }

  /** Returns the finest cells of the grid that are so few at most; of a grid that has more, those in view. */
  window([west, south, east, north]: Bounds, most: number): Window {
    const all = this.levels[0].rows * this.levels[0].columns <= most;
    const windows = this.levels.map((own, level) => {
      const left = mod(west - own.west) / own.wide;
      const right = left + (east - west) / own.wide;
      const across = all || east - west >= 360 || right > own.columns ? [0, own.columns] : [left, right];
      const down = all ? [0, own.rows] : [(own.north - north) / own.high, (own.north - south) / own.high];
      const [column, row] = [Math.max(0, Math.floor(across[0])), Math.max(0, Math.floor(down[0]))];
      const columns = Math.min(own.columns, Math.ceil(across[1])) - column;
      return { level, row, column, rows: Math.min(own.rows, Math.ceil(down[1])) - row, columns };
    });
    const found = windows.find(({ rows, columns }) => rows * columns <= most) ?? windows[windows.length - 1];
    if (found.rows < 1 || found.columns < 1) throw new Told("Nothing of the grid is in view: move the map.");
    return found;
  }

  /** The finest level of so few cells that all of the world is read at once. */
  world(most: number): number {
    const fits = this.levels.findIndex(({ rows, columns }) => rows * columns <= most);
    return fits < 0 ? this.levels.length - 1 : fits;
  }

  /** Returns a chunk if it was read already. */
  loaded(level: number, row: number, column: number, whole: boolean): Chunk | null {
    const found = this.there.get(`${level}/${row}/${column}`);
    return found && (!whole || found.whole) ? found : null;
  }

  /** Reads a chunk, or returns it where it is read already. */
  chunk(level: number, row: number, column: number, whole: boolean): Promise<Chunk> {
    const key = `${level}/${row}/${column}`;
    const there = this.chunks.get(key);
    const wanted = there ? there.then((own) => (whole && !own.whole ? this.load(own, level, row, column, whole) : own))
      : this.load(null, level, row, column, whole);
    this.chunks.set(key, wanted);
    wanted.then((chunk) => this.there.set(key, chunk), () => {});
    wanted.catch(() => this.chunks.get(key) === wanted && this.chunks.delete(key)); // a later try asks again
    return wanted;
  }

  private async load(there: Chunk | null, level: number, row: number, column: number, whole: boolean): Promise<Chunk> {
    const cells = this.side * this.side;
    const [first, further] = await Promise.all([
      there ? there.codes : this.part(level, "embedding", 0, row, column),
      whole ? this.further(level, row, column) : new Int8Array(0),
    ]);
    const codes = new Int8Array(first.length + further.length);
    codes.set(first as Int8Array);
    codes.set(further as Int8Array, first.length);
    const part = { codes, cells };
    const norms = there ? there.norms : lengths(part, this.scale, LEADING);
    const empty = codes.subarray(0, cells).every((code) => code === -128);
    return { ...part, level, row, column, whole, norms, empty };
  }

  private async further(level: number, row: number, column: number): Promise<Int8Array | Float32Array> {
    return this.blocks > 1 ? this.part(level, "embedding", 1, row, column) : new Int8Array(LEADING * this.side ** 2);
  }

  private async part(level: number, name: string, n: number, row: number, column: number): Promise<Int8Array | Float32Array> {
    const path = `${this.levels[level].path}${name}`;
    const opened = this.arrays.get(path) ?? zarr.open.v3(this.root.resolve(path), { kind: "array" });
    this.arrays.set(path, opened);
    const array = await opened;
    try {
      const { data, shape } = await array.getChunk([n, row, column]);
      if ((data as Int8Array).length !== shape.reduce((a, b) => a * b)) throw new Error("a chunk of another length");
      return data as Int8Array;
    } catch (error) {
      if (error instanceof Told) throw error;
      throw damaged(`${this.url}${path}/${n}/${row}/${column}`);
    }
  }

  /** Row and column of the cell that holds a place, or null where the level has none. */
  cellAt(level: number, lon: number, lat: number): [number, number] | null {
    const { west, north, wide, high, rows, columns } = this.levels[level];
    const column = Math.floor(mod(lon - west) / wide);
    const row = Math.floor((north - lat) / high);
    return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
  }

  /** The centre of a cell. */
  placeOf(level: number, row: number, column: number): [number, number] {
    const { west, north, wide, high } = this.levels[level];
    const lon = west + (column + 0.5) * wide;
    return [mod(lon + 180) - 180, north - (row + 0.5) * high];
  }

  /** Evidence of a cell of the finest level by name; nothing where the grid has none. */
  async evidence(row: number, column: number): Promise<Record<string, number>> {
    const names: string[] = this.attributes["rangegrid:evidence"] ?? [];
    if (!names.length) return {};
    const { side } = this;
    const layers = await this.part(0, "evidence", 0, Math.floor(row / side), Math.floor(column / side));
    const at = (row % side) * side + (column % side);
    return Object.fromEntries(names.map((name, n) => [name, layers[n * side * side + at]]));
  }
}

/** Reads the scales of the first components; 0 for those that a small grid has not. */
async function scaleOf(root: zarr.Location<any>, name: string, count: number): Promise<Float32Array> {
  const { data } = await zarr.get(await zarr.open.v3(root.resolve(name), { kind: "array" }));
  const found = new Float32Array(count);
  found.set((data as Float32Array).subarray(0, count));
  return found;
}

/** Returns degrees between 0 and 360. */
function mod(degrees: number): number {
  return ((degrees % 360) + 360) % 360;
}

/** A store whose root's metadata were read already. */
class Known implements zarr.AsyncReadable {
  constructor(private readonly store: Store, private readonly node: unknown) {}

  async get(key: string): Promise<Uint8Array | undefined> {
    return key === "/zarr.json" ? new TextEncoder().encode(JSON.stringify(this.node)) : this.store.get(key);
  }
}
