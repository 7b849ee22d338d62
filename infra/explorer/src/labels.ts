/** Reads labelled places from CSV or GeoJSON that a person gives; nothing of it leaves the page. */

import type { Place } from "./layers";
import { Told } from "./told";

export interface Labels {
  name: string;
  places: Place[];
  /** Numbers, or names of classes. */
  values: number[] | string[];
  numeric: boolean;
}

const LON = ["lon", "lng", "longitude", "decimallongitude", "x"];
const LAT = ["lat", "latitude", "decimallatitude", "y"];

/** Returns the labels of a file: a CSV with columns of longitude, latitude and label, or a GeoJSON of points. */
export function labels(file: string, text: string, column = ""): Labels {
  const rows = /json$/i.test(file) || text.trimStart().startsWith("{") ? geojson(text) : csv(text);
  const usable = rows.filter(({ at, of }) => sound(at) && Object.keys(of).length > 0);
  if (!usable.length) throw new Told(`${file} has no row with a place and a label: give lon, lat and one more column.`);
  const name = column || Object.keys(usable[0].of)[0];
  const kept = usable.filter(({ of }) => of[name] !== undefined && of[name] !== "");
  const texts = kept.map(({ of }) => of[name]);
  const numbers = texts.map(Number);
  const numeric = numbers.every(Number.isFinite) && new Set(texts).size > 2;
  return { name, places: kept.map(({ at }) => at), values: numeric ? numbers : texts, numeric };
}

interface Row {
  at: Place;
  of: Record<string, string>;
}

function sound([lon, lat]: Place): boolean {
  return Number.isFinite(lon) && Number.isFinite(lat) && Math.abs(lat) <= 90 && lon >= -180 && lon <= 360;
}

function geojson(text: string): Row[] {
  let told: any;
  try {
    told = JSON.parse(text);
  } catch {
    throw new Told("The file is no GeoJSON: its text cannot be read.");
  }
  return (told.features ?? []).flatMap((feature: any) => {
    if (feature?.geometry?.type !== "Point") return [];
    const of = Object.fromEntries(Object.entries(feature.properties ?? {}).map(([key, value]) => [key, String(value ?? "")]));
    return [{ at: feature.geometry.coordinates.slice(0, 2), of }];
  });
}

function csv(text: string): Row[] {
  const [head, ...lines] = records(text.replace(/^\ufeff/, ""));
  const find = (names: string[]) => head?.findIndex((name) => names.includes(name.trim().toLowerCase())) ?? -1;
  const [lon, lat] = [find(LON), find(LAT)];
  if (lon < 0 || lat < 0) throw new Told("The CSV needs columns lon and lat in its first line, in degrees.");
  return lines
    .filter((line) => line.length >= head.length)
    .map((line) => {
      const of = Object.fromEntries(head.flatMap((name, n) => (n === lon || n === lat ? [] : [[name.trim(), line[n].trim()]])));
      return { at: [number(line[lon]), number(line[lat])] as Place, of };
    });
}

function number(text: string): number {
  return text.trim() ? Number(text) : NaN;
}

/** Returns the fields of each line, as RFC 4180 has them; a separator is a comma, semicolon or tab. */
function records(text: string): string[][] {
  const first = text.split("\n", 1)[0];
  const by = [",", ";", "\t"].reduce((a, b) => (first.split(b).length > first.split(a).length ? b : a));
  const found: string[][] = [[""]];
  let quoted = false;
  for (let n = 0; n < text.length; n++) {
    const sign = text[n];
    const row = found[found.length - 1];
    if (quoted && sign === '"' && text[n + 1] === '"') row[row.length - 1] += text[n++];
    else if (sign === '"') quoted = !quoted;
    else if (!quoted && sign === by) row.push("");
    else if (!quoted && sign === "\n") found.push([""]);
    else if (quoted || sign !== "\r") row[row.length - 1] += sign;
  }
  return found.filter((row) => row.length > 1 || row[0]);
}

/** Returns marks as GeoJSON. */
export function asGeojson(marks: { at: Place; name: string }[]): string {
  const features = marks.map(({ at, name }) => ({
    type: "Feature", properties: { class: name }, geometry: { type: "Point", coordinates: at },
  }));
  return JSON.stringify({ type: "FeatureCollection", features }, null, 1);
}
