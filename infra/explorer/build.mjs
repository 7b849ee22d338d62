/** Bundles the page into `bundle/`, which the Python package carries. */

import { build } from "esbuild";
import { cpSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const { resolve } = createRequire(import.meta.url);
const out = process.argv[2] ?? "bundle";
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
const common = { bundle: true, format: "esm", minify: true, target: "es2022", legalComments: "linked", logLevel: "warning" };
const missing = {
  // Codecs of other grids that would bring WebAssembly, which the page's policy forbids: its companion needs none.
  name: "no-wasm",
  setup: (its) => its.onResolve({ filter: /^numcodecs/ }, () => ({ path: "absent", external: true })),
};
await build({ ...common, entryPoints: { main: "src/main.ts", engine: "src/engine.ts", style: "src/style.css" }, outdir: out, plugins: [missing] });
await build({ ...common, entryPoints: { compute: "src/compute.ts", colours: "src/colours.ts" }, outdir: out });
await build({ ...common, entryPoints: { "map-worker": "node_modules/maplibre-gl/dist/maplibre-gl-worker.mjs" }, outdir: out });
cpSync("src/index.html", `${out}/index.html`);
for (const name of ["land-110m.json", "land-50m.json"]) cpSync(resolve(`world-atlas/${name}`), `${out}/${name}`);

const cities = JSON.parse(readFileSync(resolve("city-timezones/data/cityMap.json"), "utf8"));
const places = cities
  .filter(({ lat, lng }) => Number.isFinite(lat) && Number.isFinite(lng))
  .sort((a, b) => b.pop - a.pop)
  .map(({ city, country, lng, lat }) => [city, country, +lng.toFixed(2), +lat.toFixed(2)]);
writeFileSync(`${out}/places.json`, JSON.stringify(places));
