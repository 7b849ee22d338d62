/** How alike cells are: the cosine of their components, to which each part of the grid's vectors may count as one likes,
 * and of RANGE+ each half of the retrieval. */

import { grams, likeness, squares, weighted, weightedCosine } from "./compute";
import { type Chunk, type Companion, LEADING } from "./companion";
import { Told } from "./told";

/** What parts count, 0 to 1, by name; those that are not named count 1. */
export type Shares = Record<string, number>;

export interface Chosen {
  shares: Shares;
  /** Share of the semantic half of RANGE+; null: the grid's own. */
  beta: number | null;
}

/** Measures chunks and numbers as they are by the beta that was chosen: `companion.at`. */
export interface Measure {
  /** Returns the likeness of every cell of a chunk to a place's numbers. */
  cells(chunk: Chunk, query: Float32Array): Float32Array;
  /** Returns the likeness of two places' numbers. */
  pair(a: Float32Array, b: Float32Array): number;
}

const matrices = new WeakMap<Companion, Promise<Float64Array[]>>();
const lengths = new WeakMap<Chunk, Float32Array[]>();

/** Returns the measure by some shares; where all parts count alike it needs the components alone. */
export async function measure(companion: Companion, shares: Shares): Promise<Measure> {
  const own = Object.keys(companion.parts).map((name) => shares[name] ?? 1);
  if (own.every((share) => share === own[0]) && own[0] !== 0) return plain(companion);
  if (!own.some((share) => share > 0)) throw new Told("No part counts: move the slider of at least one part.");
  const reading = matrices.get(companion) ?? read(companion);
  matrices.set(companion, reading);
  reading.catch(() => matrices.delete(companion));
  return byParts(companion, await reading, own);
}

function plain(companion: Companion): Measure {
  return {
    cells: (chunk, query) => likeness(chunk, chunk.norms, companion.scale, query),
    pair: (a, b) => weightedCosine(a, b, [unit(a.length)], [1]),
  };
}

function unit(count: number): Float64Array {
  return Float64Array.from({ length: count * count }, (_, n) => (n % (count + 1) ? 0 : 1));
}

function byParts(companion: Companion, found: Float64Array[], shares: number[]): Measure {
  const known = (chunk: Chunk) => {
    const there = lengths.get(chunk) ?? found.map((own) => squares(chunk, companion.scale, own));
    lengths.set(chunk, there);
    return there;
  };
  return {
    cells: (chunk, query) => weighted(chunk, known(chunk), companion.scale, query, found, shares),
    pair: (a, b) => weightedCosine(a, b, found, shares),
  };
}

async function read(companion: Companion): Promise<Float64Array[]> {
  return grams(await companion.axes(), LEADING, Object.values(companion.parts), LEADING);
}
