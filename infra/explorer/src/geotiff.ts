/** Writes GeoTIFF: numbers of cells in degrees, bands one after the other, deflated by rows of strips. */

import type { Band } from "./layers";

export interface Raster {
  /** All of one kind. */
  bands: Band[];
  rows: number;
  columns: number;
  /** West, north, width and height of a cell, in degrees. */
  west: number;
  north: number;
  wide: number;
  high: number;
}

const STRIP = 128; // rows
const [BYTE, ASCII, SHORT, LONG, DOUBLE] = [1, 2, 3, 4, 12];
const SIZE: Record<number, number> = { [BYTE]: 1, [ASCII]: 1, [SHORT]: 2, [LONG]: 4, [DOUBLE]: 8 };
const FLOATS = 3; // of SampleFormat
const KEYS = [1, 1, 0, 3, 1024, 0, 1, 2, 1025, 0, 1, 1, 2048, 0, 1, 4326]; // geographic, a pixel is an area, EPSG:4326

/** Returns the file. What each band is and what else is said goes where GDAL looks for it. */
export async function geotiff(raster: Raster, named: string[], said: Record<string, string>): Promise<Blob> {
  const { bands, rows, columns } = raster;
  const strips = await Promise.all(bands.flatMap((band) => cut(band, rows, columns).map(deflated)));
  const floats = bands[0] instanceof Float32Array;
  const each = <T>(value: T) => bands.map(() => value);
  const sizes = strips.map((strip) => strip.length);
  const tags: [number, number, number[] | string][] = [
    [256, LONG, [columns]], [257, LONG, [rows]], [258, SHORT, each(floats ? 32 : 8)], [259, SHORT, [8]], [262, SHORT, [1]],
    [273, LONG, sizes], [277, SHORT, [bands.length]], [278, LONG, [STRIP]], [279, LONG, sizes], [284, SHORT, [2]],
    ...(bands.length > 1 ? [[338, SHORT, each(0).slice(1)] as [number, number, number[]]] : []),
    [339, SHORT, each(floats ? FLOATS : 1)], [33550, DOUBLE, [raster.wide, raster.high, 0]],
    [33922, DOUBLE, [0, 0, 0, raster.west, raster.north, 0]], [34735, SHORT, KEYS],
    [42112, ASCII, metadata(named, said)], [42113, ASCII, floats ? "nan" : "255"],
  ];
  return new Blob([header(tags, sizes), ...strips], { type: "image/tiff" });
}

function cut(band: Band, rows: number, columns: number): Band[] {
  return Array.from({ length: Math.ceil(rows / STRIP) }, (_, n) => band.slice(n * STRIP * columns, (n + 1) * STRIP * columns));
}

async function deflated(band: Band): Promise<Uint8Array<ArrayBuffer>> {
  const packed = new Blob([band as Band & { buffer: ArrayBuffer }]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(packed).arrayBuffer());
}

/** Returns header, directory and what does not fit into it; the strips follow, and 273 gets their places. */
function header(tags: [number, number, number[] | string][], sizes: number[]): ArrayBuffer {
  const bytes = (kind: number, value: number[] | string) => SIZE[kind] * (value.length + (kind === ASCII ? 1 : 0));
  const start = 8 + 2 + 12 * tags.length + 4;
  const beside = tags.map(([, kind, value]) => (bytes(kind, value) > 4 ? 8 * Math.ceil(bytes(kind, value) / 8) : 0));
  const end = start + beside.reduce((sum, size) => sum + size, 0);
  const places = sizes.map((_, n) => end + sizes.slice(0, n).reduce((sum, size) => sum + size, 0));
  const out = new DataView(new ArrayBuffer(end));
  [0x49, 0x49, 42, 0, 8].forEach((value, n) => out.setUint8(n, value));
  out.setUint16(8, tags.length, true);
  let far = start;
  tags.forEach(([tag, kind, value], n) => {
    const at = 10 + 12 * n;
    out.setUint16(at, tag, true);
    out.setUint16(at + 2, kind, true);
    out.setUint32(at + 4, value.length + (kind === ASCII ? 1 : 0), true);
    if (beside[n]) out.setUint32(at + 8, far, true);
    put(out, beside[n] ? far : at + 8, kind, tag === 273 ? places : value);
    far += beside[n];
  });
  return out.buffer as ArrayBuffer;
}

function put(out: DataView, at: number, kind: number, value: number[] | string): void {
  const numbers = typeof value === "string" ? [...value].map((sign) => sign.charCodeAt(0)) : value;
  numbers.forEach((number, n) => {
    const place = at + n * SIZE[kind];
    if (kind === DOUBLE) out.setFloat64(place, number, true);
    else if (kind === LONG) out.setUint32(place, number, true);
    else if (kind === SHORT) out.setUint16(place, number, true);
    else out.setUint8(place, number);
  });
}

/** Returns GDAL's XML, in ASCII: other signs are entities. */
function metadata(named: string[], said: Record<string, string>): string {
  const item = (about: string, text: string) => `<Item ${about}>${escaped(text)}</Item>`;
  const bands = named.map((name, n) => item(`name="DESCRIPTION" sample="${n}" role="description"`, name));
  const all = Object.entries(said).map(([name, text]) => item(`name="${escaped(name)}"`, text));
  return `<GDALMetadata>${[...bands, ...all].join("")}</GDALMetadata>`;
}

function escaped(text: string): string {
  return text.replace(/[^ -~]|[<>&"]/gu, (sign) => `&#${sign.codePointAt(0)};`);
}
