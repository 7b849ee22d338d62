/** What the page shows, as the part of its address after #: who opens the address sees the same. */

import type { Mark, Place } from "./layers";
import type { Shares } from "./measure";

export interface State {
  grid: string;
  mode: "colours" | "likeness" | "classes" | "clusters" | "compare" | "labels";
  components: [number, number, number];
  at: Place | null;
  other: Place | null;
  /** What parts count for likeness, where it is not 1. */
  shares: Shares;
  /** Share of the semantic half of RANGE+, where it is not the grid's. */
  beta: number | null;
  marks: Mark[];
  method: "ridge" | "knn";
  least: number;
  clusters: number;
  against: string;
  flat: boolean;
  /** Zoom, longitude, latitude. */
  view: [number, number, number] | null;
}

export const START: State = {
  grid: "", mode: "colours", components: [0, 1, 2], at: null, other: null, shares: {}, beta: null, marks: [], method: "ridge", least: 0.3,
  clusters: 8, against: "", flat: false, view: null,
};

const MODES = ["colours", "likeness", "classes", "clusters", "compare", "labels"];

export function written(state: State): string {
  const told = new URLSearchParams();
  if (state.grid) told.set("grid", state.grid);
  told.set("mode", state.mode);
  if (String(state.components) !== String(START.components)) told.set("rgb", state.components.map((c) => c + 1).join(","));
  if (state.at) told.set("at", place(state.at));
  if (state.other) told.set("other", place(state.other));
  const shares = Object.entries(state.shares).filter(([, share]) => share !== 1);
  if (shares.length) told.set("parts", shares.map((each) => each.join(":")).join(";"));
  if (state.beta !== null) told.set("beta", String(state.beta));
  if (state.marks.length) told.set("marks", state.marks.map((mark) => `${place(mark.at)},${mark.name}`).join(";"));
  if (state.method !== START.method) told.set("method", state.method);
  if (state.least !== START.least) told.set("least", String(state.least));
  if (state.clusters !== START.clusters) told.set("clusters", String(state.clusters));
  if (state.against) told.set("against", state.against);
  if (state.flat) told.set("flat", "1");
  if (state.view) told.set("map", state.view.map((n) => n.toFixed(2)).join("/"));
  return `#${told}`;
}

export function parsed(hash: string): State {
  const told = new URLSearchParams(hash.replace(/^#/, ""));
  const text = (name: string) => told.get(name) ?? "";
  const rgb = numbers(text("rgb"), ",").map((c) => c - 1);
  const view = numbers(text("map"), "/");
  const mode = text("mode");
  return {
    ...START,
    grid: text("grid"),
    mode: (MODES.includes(mode) ? mode : START.mode) as State["mode"],
    components: rgb.length === 3 && rgb.every((c) => c >= 0 && c < 64) ? (rgb as State["components"]) : START.components,
    at: placed(text("at")),
    other: placed(text("other")),
    shares: Object.fromEntries(text("parts").split(";").flatMap(shared)),
    beta: share(text("beta")),
    marks: text("marks").split(";").flatMap(marked),
    method: text("method") === "knn" ? "knn" : "ridge",
    least: Math.min(1, Math.max(-1, Number(told.get("least") ?? START.least) || 0)),
    clusters: Math.min(16, Math.max(2, Math.round(Number(text("clusters")) || START.clusters))),
    against: text("against"),
    flat: text("flat") === "1",
    view: view.length === 3 ? (view as State["view"]) : null,
  };
}

function place([lon, lat]: Place): string {
  return `${+lon.toFixed(4)},${+lat.toFixed(4)}`;
}

function numbers(text: string, by: string): number[] {
  const found = text ? text.split(by).map(Number) : [];
  return found.every(Number.isFinite) ? found : [];
}

function placed(text: string): Place | null {
  const found = numbers(text, ",");
  return found.length === 2 && Math.abs(found[1]) <= 90 ? (found as Place) : null;
}

function share(text: string): number | null {
  return /^[\d.]+$/.test(text) && Number(text) <= 1 ? Number(text) : null;
}

function shared(text: string): [string, number][] {
  const [, name, share] = /^(.+):([\d.]+)$/.exec(text) ?? [];
  return name && Number(share) <= 1 ? [[name, Number(share)]] : [];
}

function marked(text: string): Mark[] {
  const [lon, lat, ...name] = text.split(",");
  const at = placed(`${lon},${lat}`);
  return at && name.length ? [{ at, name: name.join(",").slice(0, 60) }] : [];
}
