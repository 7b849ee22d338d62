/** The lines of Python that give the same as the page. */

import type { State } from "./link";

export function lines(url: string, state: State): string {
  const opened = `import numpy as np, xarray as xr
url = "${url}"
root = xr.open_zarr(url, zarr_format=3)
level = xr.open_zarr(url, group=root.attrs.get("rangegrid:shown"), zarr_format=3)  # in degrees
cells = (level.embedding[:128] * root.scale[:128]).values
def at(lon, lat):  # the numbers of the cell that holds a place
    j, i = abs(level.lon.values - lon).argmin(), abs(level.lat.values - lat).argmin()
    return cells[:, i, j]
`;
  if (state.mode === "classes" && state.marks.length) {
    const marks = state.marks.map(({ at, name }) => [...at.map((n) => +n.toFixed(4)), name]);
    const model = state.method === "ridge"
      ? "from sklearn.linear_model import RidgeClassifier\nmodel = RidgeClassifier(alpha=0.1)"
      : "from sklearn.neighbors import KNeighborsClassifier\nmodel = KNeighborsClassifier(3)";
    return `${opened}${model}
marks = ${JSON.stringify(marks)}
model.fit([at(lon, lat) for lon, lat, _ in marks], [name for *_, name in marks])
land = np.isfinite(cells[0])
classes = model.predict(cells[:, land].T)`;
  }
  const [lon, lat] = state.at ?? [2.35, 48.86];
  return `${opened}a = at(${+lon.toFixed(4)}, ${+lat.toFixed(4)})[:64]
likeness = np.einsum("cyx,c->yx", cells[:64], a) / np.linalg.norm(cells[:64], axis=0) / np.linalg.norm(a)`;
}
