/** The page's numerics: likeness, classifiers, clusters, colours. No browser is needed: tests run them under Node. */

/** Code of a cell without data. */
export const NODATA = -128;

/** Components of cells, component first: int8 as a chunk of the companion holds them, or of another beta between codes. */
export interface Codes {
  /** `codes[c * cells + i]`. */
  codes: Int8Array | Float32Array;
  /** Number of cells. */
  cells: number;
}

/** Returns the values of one cell's components: code * scale; null where it has no data. */
export function valuesAt(part: Codes, cell: number, scale: Float32Array, count: number): Float32Array | null {
  const found = new Float32Array(count);
  if (part.codes[cell] === NODATA) return null;
  for (let c = 0; c < count; c++) found[c] = part.codes[c * part.cells + cell] * scale[c];
  return found;
}

/** Returns cells whose components are further by `by` times their slopes, which have codes of a scale of their own. */
export function moved(part: Codes, scale: Float32Array, slopes: Int8Array, slopeScale: Float32Array, by: number): Codes {
  const { cells } = part;
  const codes = new Float32Array(slopes.length);
  for (let c = 0; c * cells < codes.length; c++) {
    const factor = scale[c] ? (by * slopeScale[c]) / scale[c] : 0;
    for (let n = c * cells; n < (c + 1) * cells; n++) codes[n] = part.codes[n] + factor * slopes[n];
  }
  for (let i = 0; i < cells; i++) if (part.codes[i] === NODATA) codes[i] = NODATA;
  return { codes, cells };
}

/** Adds to `out` the products of cells with a vector: `out[i] += sum_c weights[c] * code[c, i]`. */
function accumulate(part: Codes, weights: ArrayLike<number>, count: number, out: Float32Array): void {
  const { codes, cells } = part;
  for (let c = 0; c < count; c++) {
    const weight = weights[c];
    if (weight === 0) continue;
    const row = codes.subarray(c * cells, (c + 1) * cells);
    for (let i = 0; i < cells; i++) out[i] += weight * row[i];
  }
}

/** Returns the lengths of all cells' vectors. */
export function lengths(part: Codes, scale: Float32Array, count: number): Float32Array {
  const { codes, cells } = part;
  const found = new Float32Array(cells);
  for (let c = 0; c < count; c++) {
    const weight = scale[c] * scale[c];
    const row = codes.subarray(c * cells, (c + 1) * cells);
    for (let i = 0; i < cells; i++) found[i] += weight * row[i] * row[i];
  }
  for (let i = 0; i < cells; i++) found[i] = Math.sqrt(found[i]);
  return found;
}

/** Returns the cosine of every cell's components with a vector's; NaN where there is no data. */
export function likeness(part: Codes, norms: Float32Array, scale: Float32Array, query: Float32Array): Float32Array {
  const length = Math.sqrt(query.reduce((sum, value) => sum + value * value, 0)) || 1;
  return compared(part, norms, scale, query, length);
}

/** Returns the product of every cell's components with a vector, by the cell's length and a further one. */
function compared(part: Codes, norms: Float32Array, scale: Float32Array, vector: ArrayLike<number>, length: number): Float32Array {
  const found = new Float32Array(part.cells);
  accumulate(part, Float64Array.from(vector, (value, c) => (value * scale[c]) / length), vector.length, found);
  for (let i = 0; i < part.cells; i++) found[i] = part.codes[i] === NODATA ? NaN : found[i] / (norms[i] || 1);
  return found;
}

/**
 * Returns for each part of the grid's vectors the matrix G by which z' G z is the squared length of what the first
 * components z tell of that part.
 *
 * A companion's axes are orthonormal but for a factor of each part, so that the matrices add to one with ones on its
 * diagonal; by that the factors are found.
 *
 * @param axes `axes[d * columns + c]`: by which dimension d of a vector enters component c.
 * @param parts First dimension of each part, and the one after its last.
 * @param count Components.
 */
export function grams(axes: Float32Array, columns: number, parts: [number, number][], count: number): Float64Array[] {
  const products = parts.map(([start, stop]) => {
    const found = new Float64Array(count * count);
    for (let d = start; d < stop; d++) {
      const row = axes.subarray(d * columns, d * columns + count);
      for (let c = 0; c < count; c++) for (let e = 0; e < count; e++) found[c * count + e] += row[c] * row[e];
    }
    return found;
  });
  const normal = Float64Array.from(products.flatMap((a) => products.map((b) => dot(a, b))));
  const traces = Float64Array.from(products, (own) => own.reduce((sum, value, n) => sum + (n % (count + 1) ? 0 : value), 0));
  factorise(normal, parts.length);
  const factors = solved(normal, parts.length, traces);
  return products.map((own, n) => own.map((value) => value * factors[n]));
}

function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let n = 0; n < a.length; n++) sum += a[n] * b[n];
  return sum;
}

/** Returns a matrix times a vector. */
function times(matrix: Float64Array, vector: ArrayLike<number>): Float64Array {
  const count = vector.length;
  return Float64Array.from(vector, (_, c) => dot(matrix.subarray(c * count, (c + 1) * count), vector));
}

/** Returns the squared length of every cell's part of which a matrix tells. */
export function squares(part: Codes, scale: Float32Array, gram: Float64Array): Float32Array {
  const count = Math.sqrt(gram.length);
  const found = new Float32Array(part.cells);
  const row = new Float64Array(count);
  for (let i = 0; i < part.cells; i++) {
    if (part.codes[i] === NODATA) continue;
    for (let c = 0; c < count; c++) row[c] = part.codes[c * part.cells + i] * scale[c];
    found[i] = squaredBy(gram, row);
  }
  return found;
}

/** Returns z' G z of a symmetric G. */
function squaredBy(gram: Float64Array, z: Float64Array): number {
  let [twice, once] = [0, 0];
  for (let c = 0; c < z.length; c++) {
    let sum = 0;
    for (let e = 0; e < c; e++) sum += gram[c * z.length + e] * z[e];
    twice += sum * z[c];
    once += gram[c * z.length + c] * z[c] * z[c];
  }
  return Math.max(0, 2 * twice + once);
}

/**
 * Returns the cosine of every cell with a vector, to which each part of both counts by its share.
 *
 * @param lengths Squared lengths of the cells, by part.
 * @param shares What each part counts, 0 or more; cells without the parts that count are like nothing.
 */
export function weighted(
  part: Codes, lengths: Float32Array[], scale: Float32Array, query: Float32Array, found: Float64Array[], shares: number[],
): Float32Array {
  const matrix = summed(found, shares);
  const norms = Float32Array.from(lengths[0], (_, i) => Math.sqrt(shares.reduce((sum, own, n) => sum + own * lengths[n][i], 0)));
  return compared(part, norms, scale, times(matrix, query), Math.sqrt(squaredBy(matrix, Float64Array.from(query))) || 1);
}

/** Returns the cosine of two vectors, to which each part counts by its share. */
export function weightedCosine(a: Float32Array, b: Float32Array, found: Float64Array[], shares: number[]): number {
  const matrix = summed(found, shares);
  const length = (own: Float32Array) => squaredBy(matrix, Float64Array.from(own));
  return dot(times(matrix, a), b) / (Math.sqrt(length(a) * length(b)) || 1);
}

function summed(matrices: Float64Array[], shares: number[]): Float64Array {
  return matrices[0].map((_, n) => shares.reduce((sum, share, k) => sum + share * matrices[k][n], 0));
}

/** A linear model of several outputs: `weights[k] . x + offsets[k]`. */
export interface Linear {
  /** Weights of each output. */
  weights: Float64Array[];
  /** Constant of each output. */
  offsets: number[];
}

/** Returns the ridge regression of rows to several outputs with a constant that is not penalised, as scikit-learn's. */
export function ridge(rows: Float32Array[], outputs: number[][], alpha: number): Linear {
  const count = rows[0].length;
  const mean = new Float64Array(count);
  for (const row of rows) for (let c = 0; c < count; c++) mean[c] += row[c] / rows.length;
  const means = outputs.map((values) => values.reduce((sum, value) => sum + value, 0) / values.length);
  const normal = new Float64Array(count * count);
  const sides = outputs.map(() => new Float64Array(count));
  const centred = new Float64Array(count);
  rows.forEach((row, n) => {
    for (let c = 0; c < count; c++) centred[c] = row[c] - mean[c];
    for (let c = 0; c < count; c++) {
      const value = centred[c];
      for (let d = 0; d <= c; d++) normal[c * count + d] += value * centred[d];
      sides.forEach((side, k) => (side[c] += value * (outputs[k][n] - means[k])));
    }
  });
  for (let c = 0; c < count; c++) normal[c * count + c] += alpha;
  factorise(normal, count);
  const weights = sides.map((side) => solved(normal, count, side));
  const offsets = weights.map((own, k) => means[k] - own.reduce((sum, value, c) => sum + value * mean[c], 0));
  return { weights, offsets };
}

/** Replaces the lower triangle of a positive matrix by its Cholesky factor. */
function factorise(matrix: Float64Array, count: number): void {
  for (let i = 0; i < count; i++) {
    for (let j = 0; j <= i; j++) {
      let sum = matrix[i * count + j];
      for (let k = 0; k < j; k++) sum -= matrix[i * count + k] * matrix[j * count + k];
      matrix[i * count + j] = i === j ? Math.sqrt(Math.max(sum, 1e-12)) : sum / matrix[j * count + j];
    }
  }
}

/** Solves a system by its Cholesky factor. */
function solved(factor: Float64Array, count: number, side: Float64Array): Float64Array {
  const found = Float64Array.from(side);
  for (let i = 0; i < count; i++) {
    for (let k = 0; k < i; k++) found[i] -= factor[i * count + k] * found[k];
    found[i] /= factor[i * count + i];
  }
  for (let i = count - 1; i >= 0; i--) {
    for (let k = i + 1; k < count; k++) found[i] -= factor[k * count + i] * found[k];
    found[i] /= factor[i * count + i];
  }
  return found;
}

/** Returns one output of a linear model for every cell; NaN where there is no data. */
export function applied(part: Codes, scale: Float32Array, model: Linear, output: number): Float32Array {
  const weights = model.weights[output];
  const found = new Float32Array(part.cells).fill(model.offsets[output]);
  accumulate(part, weights.map((value, c) => value * scale[c]), weights.length, found);
  for (let i = 0; i < part.cells; i++) if (part.codes[i] === NODATA) found[i] = NaN;
  return found;
}

/** A classifier of places: what it takes from marked rows, and how it names a row's class. */
export interface Classifier {
  /** Classes are 0 to `classes` - 1. */
  classes: number;
  /** Ridge: one output a class, or one alone for two classes; kNN: none. */
  linear?: Linear;
  /** kNN: the marked rows. */
  rows?: Float32Array[];
  /** kNN: their classes. */
  labels?: number[];
}

/** Penalty of the ridge classifier, and the number of nearest marks that vote. */
export const ALPHA = 0.1;
export const NEAREST = 3;

/** Fits scikit-learn's RidgeClassifier(alpha=0.1), or KNeighborsClassifier(n_neighbors=3), to marked rows. */
export function classifier(kind: "ridge" | "knn", rows: Float32Array[], labels: number[], classes: number): Classifier {
  if (kind === "knn") return { classes, rows, labels };
  const outputs = Array.from({ length: classes }, (_, k) => labels.map((label) => (label === k ? 1 : -1)));
  return { classes, linear: ridge(rows, classes === 2 ? [outputs[1]] : outputs, ALPHA) };
}

/** Returns the class of every cell; 255 where there is no data. */
export function classified(part: Codes, scale: Float32Array, model: Classifier): Uint8Array {
  const found = new Uint8Array(part.cells);
  if (model.rows && model.labels) {
    const count = model.rows[0].length;
    const row = new Float32Array(count);
    for (let i = 0; i < part.cells; i++) {
      if (part.codes[i] === NODATA) continue;
      for (let c = 0; c < count; c++) row[c] = part.codes[c * part.cells + i] * scale[c];
      found[i] = voted(row, model.rows, model.labels, model.classes);
    }
  } else {
    const linear = model.linear as Linear;
    const scores = linear.weights.map((_, k) => applied(part, scale, linear, k));
    for (let i = 0; i < part.cells; i++) found[i] = largest(scores.map((score) => score[i]));
  }
  for (let i = 0; i < part.cells; i++) if (part.codes[i] === NODATA) found[i] = 255;
  return found;
}

/** Returns the class of one row. */
export function classOf(row: Float32Array, model: Classifier): number {
  if (model.rows && model.labels) return voted(row, model.rows, model.labels, model.classes);
  const linear = model.linear as Linear;
  return largest(linear.weights.map((own, k) => own.reduce((sum, w, c) => sum + w * row[c], linear.offsets[k])));
}

/** Returns the class of scores: the largest, or of a single score its sign. */
function largest(scores: number[]): number {
  if (scores.length === 1) return scores[0] > 0 ? 1 : 0;
  return scores.indexOf(Math.max(...scores));
}

/** Returns the class that most of the nearest marks have; of a tie the first. */
function voted(row: Float32Array, rows: Float32Array[], labels: number[], classes: number): number {
  const far = rows.map((other) => squared(row, other));
  const votes = new Array<number>(classes).fill(0);
  for (let n = 0; n < Math.min(NEAREST, rows.length); n++) {
    let best = 0;
    for (let k = 1; k < far.length; k++) if (far[k] < far[best]) best = k;
    votes[labels[best]]++;
    far[best] = Infinity;
  }
  return votes.indexOf(Math.max(...votes));
}

/** Returns the share of rows that are classified right by a model of the other folds' rows. */
export function heldOut(
  kind: "ridge" | "knn",
  rows: Float32Array[],
  labels: number[],
  classes: number,
  folds: number[],
): number {
  let right = 0;
  for (const fold of new Set(folds)) {
    const kept = folds.flatMap((own, n) => (own === fold ? [] : [n]));
    if (kept.length === 0) continue;
    const model = classifier(kind, kept.map((n) => rows[n]), kept.map((n) => labels[n]), classes);
    folds.forEach((own, n) => (right += own === fold && classOf(rows[n], model) === labels[n] ? 1 : 0));
  }
  return right / rows.length;
}

/** Returns R² of held-out rows, each predicted by a ridge regression of the other folds' rows. */
export function heldOutR2(rows: Float32Array[], values: number[], alpha: number, folds: number[]): number {
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  let left = 0;
  for (const fold of new Set(folds)) {
    const kept = folds.flatMap((own, n) => (own === fold ? [] : [n]));
    const { weights, offsets } = ridge(kept.map((n) => rows[n]), [kept.map((n) => values[n])], alpha);
    folds.forEach((own, n) => {
      if (own !== fold) return;
      left += (values[n] - weights[0].reduce((sum, w, c) => sum + w * rows[n][c], offsets[0])) ** 2;
    });
  }
  return 1 - left / values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
}

/** Returns a fold for each place: blocks of so many degrees, dealt out evenly, so that neighbours share one. */
export function blocked(places: [number, number][], degrees: number, folds: number): number[] {
  const names = places.map(([lon, lat]) => `${Math.floor(lat / degrees)} ${Math.floor(lon / degrees)}`);
  const order = new Map([...new Set(names)].map((name, n) => [name, n]));
  const random = seeded(0);
  const dealt = shuffled(Array.from({ length: order.size }, (_, n) => n % folds), random);
  return names.map((name) => dealt[order.get(name) as number]);
}

/** Returns random numbers between 0 and 1, the same ones for the same seed (mulberry32). */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

/** Returns the items in a random order. */
export function shuffled<T>(items: T[], random: () => number): T[] {
  const found = [...items];
  for (let i = found.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [found[i], found[j]] = [found[j], found[i]];
  }
  return found;
}

/** Returns centres of k-means of some rows, begun by k-means++. */
export function kmeans(rows: Float32Array[], k: number, seed: number, rounds = 30): Float32Array[] {
  const random = seeded(seed);
  let centres = [rows[Math.floor(random() * rows.length)]];
  const far = rows.map((row) => squared(row, centres[0]));
  while (centres.length < Math.min(k, rows.length)) {
    let draw = random() * far.reduce((sum, d) => sum + d, 0);
    const next = far.findIndex((d) => (draw -= d) <= 0);
    centres.push(rows[next < 0 ? rows.length - 1 : next]);
    rows.forEach((row, n) => (far[n] = Math.min(far[n], squared(row, centres[centres.length - 1]))));
  }
  for (let round = 0; round < rounds; round++) {
    const moved = means(rows, rows.map((row) => nearest(row, centres)), centres);
    const still = moved.every((centre, n) => squared(centre, centres[n]) < 1e-10);
    centres = moved;
    if (still) break;
  }
  return centres;
}

function means(rows: Float32Array[], groups: number[], before: Float32Array[]): Float32Array[] {
  const counts = new Array<number>(before.length).fill(0);
  const sums = before.map((centre) => new Float64Array(centre.length));
  rows.forEach((row, n) => {
    counts[groups[n]]++;
    for (let c = 0; c < row.length; c++) sums[groups[n]][c] += row[c];
  });
  return before.map((centre, n) => (counts[n] ? Float32Array.from(sums[n], (sum) => sum / counts[n]) : centre));
}

function squared(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let c = 0; c < a.length; c++) sum += (a[c] - b[c]) ** 2;
  return sum;
}

function nearest(row: Float32Array, centres: Float32Array[]): number {
  let best = 0;
  let least = Infinity;
  centres.forEach((centre, n) => {
    const d = squared(row, centre);
    if (d < least) [least, best] = [d, n];
  });
  return best;
}

/** Returns the nearest centre of every cell; 255 where there is no data. As a linear model: |x|² is the same for all. */
export function clustered(part: Codes, scale: Float32Array, centres: Float32Array[]): Uint8Array {
  const weights = centres.map((centre) => Float64Array.from(centre, (value) => 2 * value));
  const offsets = centres.map((centre) => -centre.reduce((sum, value) => sum + value * value, 0));
  const scores = centres.map((_, k) => applied(part, scale, { weights, offsets }, k));
  const found = new Uint8Array(part.cells).fill(255);
  for (let i = 0; i < part.cells; i++) {
    if (part.codes[i] !== NODATA) found[i] = nearestScore(scores, i);
  }
  return found;
}

function nearestScore(scores: Float32Array[], cell: number): number {
  let best = 0;
  for (let k = 1; k < scores.length; k++) if (scores[k][cell] > scores[best][cell]) best = k;
  return best;
}

/** Returns the great-circle distance of two places, in km. */
export function kilometres(a: [number, number], b: [number, number]): number {
  const [lon, lat, other, up] = [a[0], a[1], b[0], b[1]].map((degrees) => (degrees * Math.PI) / 180);
  const half = Math.sin((up - lat) / 2) ** 2 + Math.cos(lat) * Math.cos(up) * Math.sin((other - lon) / 2) ** 2;
  return 2 * 6371.0088 * Math.asin(Math.sqrt(Math.min(1, half)));
}

/** A place and its likeness. */
export interface Found {
  lonlat: [number, number];
  likeness: number;
}

/** Cells with data of a part of the world, and where they are. */
export interface Cells {
  values: Float32Array;
  lon: Float32Array;
  lat: Float32Array;
}

/** Returns the likest places, each so many km from all before it and from the asked one. NaN is no place. */
export function likest(parts: Cells[], from: [number, number], count: number, apart: number): Found[] {
  const chosen: Found[] = [];
  while (chosen.length < count) {
    const best = farthestBest(parts, [from, ...chosen.map((other) => other.lonlat)], apart);
    if (!best) break;
    chosen.push(best);
  }
  return chosen;
}

/** Returns the likest place so far from all others; distances are looked at where a place would be the best. */
function farthestBest(parts: Cells[], others: [number, number][], apart: number): Found | null {
  let best: Found | null = null;
  let most = -Infinity;
  for (const { values, lon, lat } of parts) {
    for (let i = 0; i < values.length; i++) {
      if (!(values[i] > most)) continue;
      const lonlat: [number, number] = [lon[i], lat[i]];
      if (others.some((other) => kilometres(other, lonlat) < apart)) continue;
      most = values[i];
      best = { lonlat, likeness: most };
    }
  }
  return best;
}

/** Returns Pearson's correlation of two profiles. */
export function correlation(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const n = a.length;
  let [sumA, sumB, squareA, squareB, product] = [0, 0, 0, 0, 0];
  for (let i = 0; i < n; i++) {
    sumA += a[i];
    sumB += b[i];
    squareA += a[i] * a[i];
    squareB += b[i] * b[i];
    product += a[i] * b[i];
  }
  const spread = Math.sqrt((squareA - (sumA * sumA) / n) * (squareB - (sumB * sumB) / n));
  return spread > 0 ? (product - (sumA * sumB) / n) / spread : 1;
}

/** Returns a quantile of numbers, by linear interpolation as NumPy's. */
export function quantile(values: Float32Array, share: number): number {
  const sorted = Float32Array.from(values).sort();
  const at = share * (sorted.length - 1);
  const low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}
