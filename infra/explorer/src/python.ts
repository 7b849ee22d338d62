/** The lines of Python that give the same numbers as the page. */

import type { Shown } from "./engine";
import type { Place } from "./layers";
import type { State } from "./link";

/** What the lines are of: addresses of companions, what is asked for, and what was found. */
export interface Asked {
  url: string;
  /** The companion that it is compared with. */
  other: string;
  state: State;
  shown: Shown | null;
  /** The name of labels, where some were given. */
  label: string;
}

const OPENED = `import numpy as np, xarray as xr

def read(url, name=None):
    root = xr.open_zarr(url, zarr_format=3)
    level = xr.open_zarr(url, group=name or root.attrs.get("rangegrid:shown"), zarr_format=3)  # in degrees
    cells = (level.embedding[:128] * root.scale[:128]).values
    return root, level.lon.values, level.lat.values, cells  # NaN where there is no data

def at(x, y):  # the numbers of the cells that hold places
    i = [abs((lon - each + 180) % 360 - 180).argmin() for each in np.ravel(x)]
    return cells[:, [abs(lat - each).argmin() for each in np.ravel(y)], i].T

`;
const LIKENESS = `def likeness(a, cells):
    return np.einsum("cyx,c->yx", cells, a) / np.linalg.norm(cells, axis=0) / np.linalg.norm(a)

`;

/** Returns lines whose last variable is what is shown. */
export function lines(asked: Asked): string {
  const { state, url } = asked;
  const opened = `${OPENED}root, lon, lat, cells = read("${url}")\n`;
  const mixed = opened + another(url, state);
  if (state.mode === "classes" && state.marks.length) return opened + classes(state);
  if (state.mode === "clusters") return opened + clusters(state.clusters);
  if (state.mode === "labels" && asked.label) return opened + labelled(asked);
  if (state.mode === "compare" && state.against) return OPENED + LIKENESS + turned(asked);
  if (state.mode === "compare" && state.at && state.other) {
    return `${mixed}${measure(state)}between = likeness(${numbers(state.other)}, cells[:64]) - likeness(${numbers(state.at)}, cells[:64])`;
  }
  if (state.mode === "likeness" && state.at) return `${mixed}${measure(state)}likeness = likeness(${numbers(state.at)}, cells[:64])`;
  return `${opened}components = cells[[${state.components}]]`;
}

/** Returns what makes the first components those of another beta. */
function another(url: string, { beta }: State): string {
  if (beta === null) return "";
  return `level = xr.open_zarr("${url}", group=root.attrs.get("rangegrid:shown"), zarr_format=3)
slopes = (level.beta * root.beta_scale).values  # what components gain where beta is larger by 1
cells[:len(slopes)] += (${beta} - root.attrs["rangegrid:beta"]) * slopes
`;
}

function numbers([lon, lat]: Place): string {
  return `at(${+lon.toFixed(4)}, ${+lat.toFixed(4)})[0, :64]`;
}

/** Returns the cosine, to which parts count by their shares where they do not count alike. */
function measure({ shares }: State): string {
  if (!Object.values(shares).some((share) => share !== 1)) return LIKENESS;
  return `shares = ${JSON.stringify(shares)}  # what parts count; the others 1
parts = {name: root.axes.values[slice(*part), :64] for name, part in root.attrs["rangegrid:parts"].items()}
grams = {name: axes.T @ axes for name, axes in parts.items()}  # of each part but for its factor: together they are one
factors = np.linalg.lstsq(np.stack([gram.ravel() for gram in grams.values()], 1), np.eye(len(cells[:64])).ravel(), rcond=None)[0]
matrix = sum(shares.get(name, 1) * factor * grams[name] for name, factor in zip(grams, factors))

def likeness(a, cells):
    turned = np.einsum("dc,cyx->dyx", matrix, cells)
    return np.einsum("cyx,c->yx", turned, a) / np.sqrt((turned * cells).sum(0)) / np.sqrt(a @ matrix @ a)

`;
}

function classes({ marks, method }: State): string {
  const model = method === "ridge"
    ? "from sklearn.linear_model import RidgeClassifier\nmodel = RidgeClassifier(alpha=0.1)"
    : "from sklearn.neighbors import KNeighborsClassifier\nmodel = KNeighborsClassifier(3)";
  return `${model}
marks = ${JSON.stringify(marks.map(({ at, name }) => [...at.map((n) => +n.toFixed(4)), name]))}
x, y, names = zip(*marks)
rows = at(x, y)
land, known = np.isfinite(cells[0]), np.isfinite(rows[:, 0])
classes = np.full(land.shape, "", object)
classes[land] = model.fit(rows[known], np.array(names)[known]).predict(cells[:, land].T)`;
}

function clusters(count: number): string {
  return `from sklearn.cluster import KMeans
land = np.isfinite(cells[0])
area = np.broadcast_to(np.cos(np.radians(lat))[:, None], land.shape)[land]
clusters = np.full(land.shape, -1)  # the page begins elsewhere and by a sample: alike, not the same
clusters[land] = KMeans(${count}, random_state=0).fit_predict(cells[:64, land].T, sample_weight=area)`;
}

function labelled({ label, shown }: Asked): string {
  const model = shown?.alpha ? `Ridge(${shown.alpha})` : "RidgeClassifier(alpha=0.1)";
  return `import pandas as pd
from sklearn.linear_model import ${model.split("(")[0]}
table = pd.read_csv("labels.csv").dropna(subset=[${JSON.stringify(label)}])  # your file, with lon and lat
rows = at(table.lon, table.lat)
land, known = np.isfinite(cells[0]), np.isfinite(rows[:, 0])
model = ${model}.fit(rows[known], table[${JSON.stringify(label)}][known])
prediction = np.full(land.shape, np.nan, object)
prediction[land] = model.predict(cells[:, land].T)`;
}

function turned({ url, other, shown }: Asked): string {
  const { places = [], level = "" } = shown?.compared ?? {};
  return `places = np.array(${JSON.stringify(places.map((place) => place.map((n) => +n.toFixed(4))))})

def profiles(url, name, x, y):  # likeness of the cells at places x, y to those that both are compared by
    global lon, lat, cells
    _, lon, lat, cells = read(url, name)
    grid = at(*np.meshgrid(x, y)).T.reshape(-1, len(y), len(x))[:64]
    return np.stack([likeness(a, grid) for a in at(*places.T)[:, :64]])

_, x, y, _ = read("${url}")
a, b = profiles("${url}", None, x, y), profiles("${other}", "${level}", x, y)
a, b = a - a.mean(0), b - b.mean(0)
turned = 1 - (a * b).sum(0) / np.sqrt((a * a).sum(0) * (b * b).sum(0))`;
}
