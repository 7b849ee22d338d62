/** What the map can show, and how each kind is fitted and painted on a chunk of cells. */

import {
  type Codes, NODATA, applied, blocked, classified, classifier, clustered, correlation, heldOut,
  heldOutR2, kmeans, likeness, quantile, ridge, seeded, shuffled, valuesAt,
} from "./compute";
import { CLASSES, DIVERGING_TABLE, SEQUENTIAL_TABLE, oklab, parsed } from "./colours";
import { type Chunk, type Companion, LEADING } from "./companion";
import { type Chosen, type Measure, measure } from "./measure";
import { Told } from "./told";

export type Place = [number, number];

/** West, south, east, north. */
export type Bounds = [number, number, number, number];

export interface Mark {
  at: Place;
  name: string;
}

export type Layer =
  | { kind: "colours"; components: [number, number, number]; within: Bounds | null }
  | ({ kind: "likeness"; at: Place } & Chosen)
  | ({ kind: "between"; at: Place; other: Place } & Chosen)
  | { kind: "classes"; method: "ridge" | "knn"; marks: Mark[]; least: number }
  | { kind: "clusters"; count: number }
  | { kind: "probe"; places: Place[]; values: number[] }
  | { kind: "change"; other: string };

/** A number of each cell: NaN, or of bytes ABSENT, where there is no data. */
export type Band = Float32Array | Uint8Array;

/** A layer's numbers and colours, and what it tells beside its map. */
export interface Fitted {
  /** Whether the further components are needed. */
  whole: boolean;
  /** What the numbers of a cell are. */
  bands: string[];
  /** Returns the numbers of a chunk's cells, of one kind. */
  values: (chunk: Chunk) => Band[] | Promise<Band[]>;
  /** Returns colours, four bytes a cell; opacity FAR where a class is too far from all marks. */
  colour: (values: Band[]) => Uint8ClampedArray;
  /** Least and largest value of the legend. */
  range?: [number, number];
  /** Names of classes, in the order of their colours. */
  names?: string[];
  /** Scores, by what was held out. */
  scores?: Record<string, number>;
  /** A number that the layer is about. */
  value?: number;
  /** The places by which grids were compared, and the level of the other. */
  compared?: { places: Place[]; level: string };
  /** Penalty of the probe. */
  alpha?: number;
}

export const FAR = 254;
export const ABSENT = 255;
const SAMPLE = 6000; // cells by which stretches and clusters are found
const ANCHORS = 64; // places by whose likeness two grids are compared
const MOST_LABELS = 5000;
const ALPHAS = [0.1, 1, 10];
const BLOCK = 10; // degrees of the blocks that are held out
const FOLDS = 5;

/** Returns the numbers of a place: those of the finest cell that holds it. */
export async function vectorAt(
  companion: Companion, [lon, lat]: Place, count: number, beta: number | null = null,
): Promise<Float32Array | null> {
  const cell = companion.cellAt(0, lon, lat);
  if (!cell) return null;
  const { side } = companion;
  const chunk = await companion.chunk(0, Math.floor(cell[0] / side), Math.floor(cell[1] / side), count > LEADING);
  return valuesAt(await companion.at(chunk, beta), (cell[0] % side) * side + (cell[1] % side), companion.scale, count);
}

async function vectorThere(companion: Companion, place: Place, beta: number | null): Promise<Float32Array> {
  const found = await vectorAt(companion, place, LEADING, beta);
  if (found) return found;
  throw new Told("There is no data at this place: the grid has land alone, and lakes are water. Choose a place on land.");
}

/** Fits a layer. `world` reads all chunks of the level on which all of the world is computed. */
export async function fitted(
  layer: Layer,
  companion: Companion,
  world: (whole: boolean) => Promise<Chunk[]>,
  coarsest: () => Promise<Chunk[]>,
  opened: (url: string) => Promise<Companion>,
): Promise<Fitted> {
  const shown = (chunk: Chunk) => companion.at(chunk, "beta" in layer ? layer.beta : null);
  switch (layer.kind) {
    case "colours":
      return colours(layer, companion, layer.within ? await world(false) : await coarsest());
    case "likeness":
      return alike(await vectorThere(companion, layer.at, layer.beta), await measure(companion, layer.shares), shown);
    case "between": {
      const [a, b] = await Promise.all([layer.at, layer.other].map((place) => vectorThere(companion, place, layer.beta)));
      return between(a, b, await measure(companion, layer.shares), shown);
    }
    case "classes":
      return classes(layer, companion);
    case "clusters":
      return clusters(layer.count, companion, await world(false));
    case "probe":
      return probe(layer, companion, await world(true));
    case "change":
      return change(companion, await opened(layer.other), await world(false));
  }
}

function colours(layer: Layer & { kind: "colours" }, companion: Companion, chunks: Chunk[]): Fitted {
  const rows = sampled(companion, chunks, LEADING, layer.within);
  if (!rows.length) throw new Told("There is no land in view: move the map, then take its colours again.");
  const ends = layer.components.map((c) => {
    const values = Float32Array.from(rows, (row) => row[c]);
    return [quantile(values, 0.02), quantile(values, 0.98)];
  });
  const [light, yellow, pink] = ends.map(([low, high]) => (value: number) => clamp((value - low) / (high - low || 1)));
  return {
    whole: false,
    bands: layer.components.map((c) => `component ${c + 1}`),
    values: (chunk) => layer.components.map((c) => component(chunk, c, companion.scale[c])),
    colour: ([x, y, z]) => coloured(x, (i) => oklab(light(x[i]), yellow(y[i]), pink(z[i]))),
  };
}

function alike(query: Float32Array, by: Measure, shown: (chunk: Chunk) => Promise<Chunk>): Fitted {
  const values = async (chunk: Chunk) => [by.cells(await shown(chunk), query)];
  return { whole: false, bands: ["likeness"], values, ...shades([0, 1]) };
}

function between(a: Float32Array, b: Float32Array, by: Measure, shown: (chunk: Chunk) => Promise<Chunk>): Fitted {
  const values = async (chunk: Chunk) => {
    const own = await shown(chunk);
    const [first, other] = [a, b].map((query) => by.cells(own, query));
    return [first.map((value, i) => other[i] - value)];
  };
  const bands = ["likeness to B less likeness to A"];
  return { whole: false, bands, values, value: by.pair(a, b), ...shades([-1, 1], DIVERGING_TABLE) };
}

async function classes(layer: Layer & { kind: "classes" }, companion: Companion): Promise<Fitted> {
  const found = await Promise.all(layer.marks.map((mark) => vectorAt(companion, mark.at, 2 * LEADING)));
  const kept = layer.marks.flatMap((mark, n) => (found[n] ? [{ ...mark, row: found[n] as Float32Array }] : []));
  const names = [...new Set(kept.map((mark) => mark.name))];
  if (names.length < 2) throw new Told("Mark places of at least two classes, on land.");
  if (names.length > CLASSES.length) throw new Told(`At most ${CLASSES.length} classes have a colour: mark fewer.`);
  const rows = kept.map((mark) => mark.row);
  const labels = kept.map((mark) => names.indexOf(mark.name));
  const model = classifier(layer.method, rows, labels, names.length);
  const scores = held(layer.method, rows, labels, names.length, kept.map((mark) => mark.at));
  const values = (chunk: Chunk) => [classified(chunk, companion.scale, model), close(chunk, companion, rows, layer.least)];
  return { whole: true, bands: ["class", "a mark is alike"], values, colour: ([found, near]) => grouped(found, near), names, scores };
}

/** Returns accuracies with marks held out one by one, or of many in blocks. */
function held(method: "ridge" | "knn", rows: Float32Array[], labels: number[], count: number, places: Place[]): Record<string, number> {
  if (rows.length > 100) return { blocks: heldOut(method, rows, labels, count, blocked(places, BLOCK, FOLDS)) };
  return { marks: heldOut(method, rows, labels, count, rows.map((_, n) => n)) };
}

/** Returns 1 where a mark is alike, 0 where none is. */
function close(chunk: Chunk, companion: Companion, rows: Float32Array[], least: number): Uint8Array {
  const found = new Uint8Array(chunk.cells);
  for (const row of rows) {
    const near = likeness(chunk, chunk.norms, companion.scale, row.subarray(0, LEADING));
    for (let i = 0; i < chunk.cells; i++) if (near[i] >= least) found[i] = 1;
  }
  return found.map((value, i) => (chunk.codes[i] === NODATA ? ABSENT : value));
}

function clusters(count: number, companion: Companion, chunks: Chunk[]): Fitted {
  const centres = kmeans(sampled(companion, chunks, LEADING, null), count, 0);
  const names = centres.map((_, n) => `cluster ${n + 1}`);
  const values = (chunk: Chunk) => [clustered(chunk, companion.scale, centres)];
  return { whole: false, bands: ["cluster"], values, colour: ([found]) => grouped(found), names };
}

async function probe(layer: Layer & { kind: "probe" }, companion: Companion, chunks: Chunk[]): Promise<Fitted> {
  const chosen = shuffled(layer.places.map((_, n) => n), seeded(0)).slice(0, MOST_LABELS);
  const found = await Promise.all(chosen.map((n) => vectorAt(companion, layer.places[n], 2 * LEADING)));
  const kept = chosen.flatMap((n, i) => (found[i] ? [{ n, row: found[i] as Float32Array }] : []));
  if (kept.length < 10) throw new Told(`Only ${kept.length} of the labelled places are on land of this grid: give 10.`);
  const [rows, known] = [kept.map(({ row }) => row), kept.map(({ n }) => layer.values[n])];
  const folds = blocked(kept.map(({ n }) => layer.places[n]), BLOCK, FOLDS);
  const tried = ALPHAS.map((alpha) => ({ alpha, score: heldOutR2(rows, known, alpha, folds) }));
  const best = tried.reduce((a, b) => (b.score > a.score ? b : a));
  const model = ridge(rows, [known], best.alpha);
  const all = chunks.flatMap((chunk) => [...applied(chunk, companion.scale, model, 0)].filter(Number.isFinite));
  const range: [number, number] = [quantile(Float32Array.from(all), 0.02), quantile(Float32Array.from(all), 0.98)];
  const values = (chunk: Chunk) => [applied(chunk, companion.scale, model, 0)];
  const scores = { blocks: best.score };
  return { whole: true, bands: ["prediction"], values, scores, value: kept.length, alpha: best.alpha, ...shades(range) };
}

/** How far each cell turned: 1 - correlation of its likeness to some places of the world, in either grid. */
async function change(companion: Companion, other: Companion, chunks: Chunk[]): Promise<Fitted> {
  const { places, anchors } = await anchored(companion, other, chunks);
  const turned = async (chunk: Chunk) => {
    const there = await gathered(companion, chunk, other);
    const profiles = anchors.map(([a, b]) => [
      likeness(chunk, chunk.norms, companion.scale, a),
      likeness(there, there.norms, other.scale, b),
    ]);
    return Float32Array.from({ length: chunk.cells }, (_, i) =>
      chunk.codes[i] === NODATA || there.codes[i] === NODATA
        ? NaN
        : 1 - correlation(profiles.map(([a]) => a[i]), profiles.map(([, b]) => b[i])),
    );
  };
  const some = (await Promise.all(shuffled(chunks, seeded(1)).slice(0, 6).map(turned))).flatMap((part) => [...part]);
  const known = Float32Array.from(some.filter(Number.isFinite));
  const range: [number, number] = [0, known.length ? Math.max(quantile(known, 0.98), 0.01) : 1];
  const value = known.length ? quantile(known, 0.5) : NaN;
  const values = async (chunk: Chunk) => [await turned(chunk)];
  return { whole: false, bands: ["turned"], values, value, compared: { places, level: other.levels[levelLike(companion, 0, other)].path.slice(0, -1) }, ...shades(range) };
}

async function anchored(companion: Companion, other: Companion, chunks: Chunk[]) {
  const tried = shuffled(chunks.flatMap((chunk) => landOf(companion, chunk, null)), seeded(2)).slice(0, 4 * ANCHORS);
  const found = await Promise.all(
    tried.map(async ({ at }) => ({ at, pair: await Promise.all([vectorAt(companion, at, LEADING), vectorAt(other, at, LEADING)]) })),
  );
  const both = found.filter(({ pair }) => pair.every(Boolean)).slice(0, ANCHORS);
  if (both.length < 10) throw new Told("The two grids have too little land in common to be compared.");
  return { places: both.map(({ at }) => at), anchors: both.map(({ pair }) => pair as [Float32Array, Float32Array]) };
}

/** Returns the level of another grid whose cells are about as large as those of a level. */
function levelLike(companion: Companion, level: number, other: Companion): number {
  const size = companion.levels[level].wide;
  return other.levels.reduce((best, { wide }, n) => (wide <= size * 1.01 ? n : best), 0);
}

/** Returns the codes that another grid has at the cells of a chunk. */
async function gathered(companion: Companion, chunk: Chunk, other: Companion): Promise<Codes & { norms: Float32Array }> {
  const codes = new Int8Array(LEADING * chunk.cells).fill(NODATA);
  const norms = new Float32Array(chunk.cells).fill(1);
  const level = levelLike(companion, chunk.level, other);
  for (const { i, at } of landOf(companion, chunk, null)) {
    const cell = other.cellAt(level, ...at);
    if (!cell) continue;
    const { side } = other;
    const source = await other.chunk(level, Math.floor(cell[0] / side), Math.floor(cell[1] / side), false);
    const from = (cell[0] % side) * side + (cell[1] % side);
    for (let c = 0; c < LEADING; c++) codes[c * chunk.cells + i] = source.codes[c * source.cells + from];
    norms[i] = source.norms[from];
  }
  return { codes, cells: chunk.cells, norms };
}

/** Returns the cells of a chunk that have data, with their centres. */
export function landOf(companion: Companion, chunk: Chunk, within: Bounds | null): { i: number; at: Place }[] {
  const found: { i: number; at: Place }[] = [];
  if (chunk.empty) return found;
  const { side } = companion;
  for (let i = 0; i < chunk.cells; i++) {
    if (chunk.codes[i] === NODATA) continue;
    const row = chunk.row * side + Math.floor(i / side);
    const at = companion.placeOf(chunk.level, row, chunk.column * side + (i % side));
    if (!within || inside(at, within)) found.push({ i, at });
  }
  return found;
}

function inside([lon, lat]: Place, [west, south, east, north]: Bounds): boolean {
  const across = (((lon - west) % 360) + 360) % 360;
  return lat >= south && lat <= north && (east - west >= 360 || across <= east - west);
}

/** Returns the numbers of some land cells, of smaller cells as many fewer. */
function sampled(companion: Companion, chunks: Chunk[], count: number, within: Bounds | null): Float32Array[] {
  const random = seeded(3);
  const all = chunks.flatMap((chunk) => landOf(companion, chunk, within).map((cell) => ({ chunk, ...cell })));
  const byArea = all.filter(({ at }) => random() < Math.cos((at[1] * Math.PI) / 180));
  return shuffled(byArea, random)
    .slice(0, SAMPLE)
    .map(({ chunk, i }) => valuesAt(chunk, i, companion.scale, count) as Float32Array);
}

function clamp(value: number): number {
  return Math.min(1, Math.max(0, value));
}

function component(chunk: Chunk, c: number, scale: number): Float32Array {
  const codes = chunk.codes.subarray(c * chunk.cells, (c + 1) * chunk.cells);
  return Float32Array.from(codes, (code) => (code === NODATA ? NaN : code * scale));
}

function coloured(known: Band, colour: (cell: number) => ArrayLike<number>): Uint8ClampedArray {
  const found = new Uint8ClampedArray(4 * known.length);
  for (let i = 0; i < known.length; i++) if (!Number.isNaN(known[i])) found.set(colour(i), 4 * i);
  return found;
}

/** Returns the legend's ends, and what colours a number between them. */
function shades(range: [number, number], table = SEQUENTIAL_TABLE): Pick<Fitted, "range" | "colour"> {
  const [low, high] = range;
  const colour = ([values]: Band[]) =>
    coloured(values, (i) => {
      const at = 4 * Math.round(255 * clamp((values[i] - low) / (high - low || 1)));
      return table.subarray(at, at + 4);
    });
  return { range, colour };
}

const GROUPS = CLASSES.map(parsed);
const NOTHING = [0, 0, 0, 0];

function grouped(groups: Band, near?: Band): Uint8ClampedArray {
  return coloured(groups, (i) => {
    if (groups[i] === ABSENT) return NOTHING;
    const [red, green, blue, opacity] = GROUPS[groups[i] % GROUPS.length];
    return [red, green, blue, near?.[i] === 0 ? FAR : opacity];
  });
}
