/** The panel: what to show, what was found, and what to take away. */

import { CLASSES } from "./colours";
import { download, h, swatch } from "./dom";
import type { Found } from "./compute";
import { asGeojson, labels } from "./labels";
import type { Place } from "./layers";
import type { State } from "./link";
import type { Page } from "./main";
import { type City, cities, near } from "./places";
import { lines } from "./python";

const TABS: [State["mode"], string][] = [
  ["colours", "Colours"], ["likeness", "Likeness"], ["classes", "Classes"],
  ["clusters", "Clusters"], ["compare", "Compare"], ["labels", "Labels"],
];

export class Panel {
  className = "class 1";
  private known: City[] = [];
  private code = false;

  constructor(private readonly root: HTMLElement, private readonly page: Page) {}

  draw(): void {
    const kept = document.activeElement?.id;
    this.root.replaceChildren(this.head(), this.search(), this.tabs(), this.body(), this.away());
    if (kept) document.getElementById(kept)?.focus();
  }

  private head(): HTMLElement {
    const { found, version } = this.page;
    const fold = h("button", { id: "fold", "aria-label": "Fold the panel", onclick: () => document.body.classList.toggle("folded") }, "▾");
    const choose = h("select", { id: "version", "aria-label": "Version of the grid", onchange: (event: Event) => this.choose(event) },
      ...found.map((each) => h("option", { value: each.id, selected: each === version }, each.title + (each.latest ? " (latest)" : ""))));
    return h("div", {}, fold, h("h1", {}, "rangegrid explorer"), found.length > 0 && choose);
  }

  private choose(event: Event): void {
    const { page } = this;
    const to = page.found.find(({ id }) => id === (event.target as HTMLSelectElement).value);
    page.shown = null;
    if (to) void page.trying(() => page.open(to));
  }

  private search(): HTMLElement {
    const list = h("ul", { class: "suggestions" });
    const field = h("input", {
      id: "search", type: "search", placeholder: "Find a place …", "aria-label": "Find a place", autocomplete: "off",
      onfocus: async () => (this.known = await cities()),
      oninput: () => list.replaceChildren(...this.matching(field.value).map((city) => h("li", {}, this.cityButton(city)))),
      onkeydown: (event: KeyboardEvent) => event.key === "Enter" && list.querySelector("button")?.click(),
    });
    return h("div", {}, field, list);
  }

  private matching(text: string): City[] {
    const plain = simple(text);
    if (plain.length < 2) return [];
    return this.known.filter(([name]) => simple(name).startsWith(plain)).slice(0, 6);
  }

  private cityButton([name, country, lon, lat]: City): HTMLElement {
    return h("button", { onclick: () => { this.page.fly([lon, lat]); this.page.clicked([lon, lat]); } }, `${name}, ${country}`);
  }

  private tabs(): HTMLElement {
    const { mode } = this.page.state;
    return h("div", { class: "tabs", role: "tablist" },
      ...TABS.map(([name, title]) =>
        h("button", { role: "tab", id: `tab-${name}`, "aria-selected": String(name === mode), onclick: () => this.page.set({ mode: name }) }, title)));
  }

  private body(): HTMLElement {
    return this[this.page.state.mode]();
  }

  private colours(): HTMLElement {
    const { page } = this;
    const { components } = page.state;
    const choose = components.map((own, n) =>
      h("input", {
        id: `component-${n}`, type: "number", min: 1, max: 64, value: own + 1, "aria-label": ["Lightness", "Blue to yellow", "Green to pink"][n],
        onchange: (event: Event) => {
          const next = [...components] as State["components"];
          next[n] = Math.min(64, Math.max(1, Math.round(Number((event.target as HTMLInputElement).value) || 1))) - 1;
          page.set({ components: next });
        },
      }));
    const here = h("button", { id: "here", onclick: () => { page.within = page.map.view; page.set({}); } }, "Colours of here");
    const all = h("button", { onclick: () => { page.within = null; page.set({}); } }, "Of the world");
    return h("div", {},
      h("p", {}, "Three components of the embedding as lightness, blue to yellow, and green to pink: what looks alike is alike. Click a place to see what is like it."),
      h("div", { class: "row" }, "Components", ...choose), h("div", { class: "row" }, here, all));
  }

  private likeness(): HTMLElement {
    const { shown, state } = this.page;
    if (!state.at || !shown?.likest) return h("p", {}, "Click a place: the map shows how alike every other is to it.");
    return h("div", {},
      h("p", {}, `Likeness to ${told(state.at)}, the cosine of the first 64 components.`),
      this.legend("sequential", ["0 or less", "1"]), this.shares(), this.evidence(), h("h2", {}, "Likest, 1,500 km apart"), this.found(shown.likest),
      h("p", { class: "faint", id: "took" }, `${shown.took?.toFixed(0)} ms; ${(shown.bytes / 1e6).toFixed(1)} MB in ${shown.requests} requests until now.`));
  }

  /** What each part of the vectors counts for the likeness. */
  private shares(): HTMLElement | false {
    const { page } = this;
    const parts = page.about?.parts ?? []; // none where the grid could not be opened
    const sliders = parts.map((name) => {
      const set = (share: number) => page.set({ shares: { ...page.state.shares, [name]: share } });
      return this.slider(name, page.state.shares[name] ?? 1, 0.05, set);
    });
    return parts.length > 1 && h("div", { id: "shares" }, ...sliders, this.beta());
  }

  /** How much of the visual part is the semantic half, where sums were kept. */
  private beta(): HTMLElement | false {
    const { page } = this;
    const own = page.about.beta;
    if (own === undefined) return false;
    const set = (beta: number) => page.set({ beta: Math.abs(beta - own) < 0.005 ? null : beta });
    return this.slider("beta", page.state.beta ?? own, 0.01, set);
  }

  private slider(name: string, value: number, step: number, set: (value: number) => void): HTMLElement {
    const slider = h("input", { id: `share-${name}`, type: "range", min: 0, max: 1, step, value, "aria-label": name, onchange: () => set(Number(slider.value)) });
    return h("label", { class: "part" }, h("span", {}, name), slider, h("output", {}, value.toFixed(2)));
  }

  private evidence(): HTMLElement | false {
    const evidence = this.page.shown?.evidence ?? {};
    const rows = [
      ["distance_km", (km: number) => `nearest image ${km.toFixed(0)} km away`],
      ["effective_images", (count: number) => `rests on about ${count < 10 ? count.toFixed(1) : Math.round(count)} images`],
    ] as const;
    const known = rows.filter(([name]) => Number.isFinite(evidence[name]));
    if (!known.length) return h("p", { class: "faint" }, "This grid was published without evidence (--evidence true).");
    return h("p", { id: "evidence" }, `Evidence: ${known.map(([name, say]) => say(evidence[name])).join("; ")}.`);
  }

  private found(places: Found[]): HTMLElement {
    const items = places.map(({ lonlat, likeness }) => {
      const button = h("button", { onclick: () => this.page.fly(lonlat) }, `${likeness.toFixed(3)}  ${told(lonlat)}`);
      void cities().then((all) => (button.textContent = `${likeness.toFixed(3)}  ${near(all, lonlat) ?? told(lonlat)}`));
      return h("li", {}, button);
    });
    return h("ol", { class: "found" }, ...items);
  }

  private classes(): HTMLElement {
    const { page } = this;
    const name = h("input", { id: "class-name", type: "text", maxlength: 40, value: this.className, "aria-label": "Class of the next mark", oninput: () => (this.className = name.value || "class 1") });
    const another = h("button", { onclick: () => { this.className = `class ${page.classes.length + 1}`; this.draw(); } }, "Next class");
    const undo = h("button", { disabled: !page.state.marks.length, onclick: () => page.set({ marks: page.state.marks.slice(0, -1) }) }, "Undo");
    const clear = h("button", { disabled: !page.state.marks.length, onclick: () => { page.shown = null; page.set({ marks: [] }); } }, "Clear");
    return h("div", {},
      h("p", {}, "Name a class, click places of it, then the next class. From two classes on, every cell gets the class that its embedding tells."),
      h("div", { class: "row" }, name), h("div", { class: "row" }, another, undo, clear), this.how(),
      this.names(page.classes), this.scores());
  }

  private how(): HTMLElement {
    const { page } = this;
    const { method, least } = page.state;
    const choose = h("select", { id: "method", "aria-label": "Method", onchange: () => page.set({ method: choose.value as State["method"] }) },
      h("option", { value: "ridge", selected: method === "ridge" }, "Ridge classifier"), h("option", { value: "knn", selected: method === "knn" }, "Three nearest marks"));
    const slider = h("input", { id: "least", type: "range", min: -0.5, max: 0.95, step: 0.05, value: least, "aria-label": "Least likeness", onchange: () => page.set({ least: Number(slider.value) }) });
    return h("div", {}, h("div", { class: "row" }, choose), h("label", { class: "faint" }, `Hatched where no mark is alike by ${least}:`, slider));
  }

  private names(names: string[]): HTMLElement | false {
    if (!names.length) return false;
    const { marks } = this.page.state;
    return h("ul", { class: "names" }, ...names.map((name, n) => {
      const count = marks.filter((mark) => mark.name === name).length;
      return h("li", {}, swatch(CLASSES[n % CLASSES.length]), count ? `${name} (${count})` : name);
    }));
  }

  private scores(): HTMLElement | false {
    const { scores, names } = this.page.shown ?? {};
    if (!scores) return false;
    const [how, score] = Object.entries(scores)[0];
    const what = names ? `accuracy ${(100 * score).toFixed(0)} %` : `R² ${score.toFixed(3)}`;
    const held = how === "marks" ? "each mark held out in turn" : "blocks of 10 degrees held out";
    const doubt = names && this.page.state.marks.length < 10 && how === "marks" ? " Few marks: this says little." : "";
    return h("p", { id: "scores" }, `Held out: ${what}, ${held}.${doubt}`);
  }

  private clusters(): HTMLElement {
    const { page } = this;
    const count = h("input", { id: "count", type: "number", min: 2, max: 16, value: page.state.clusters, "aria-label": "Number of clusters", onchange: () => page.set({ clusters: Math.min(16, Math.max(2, Math.round(Number(count.value) || 8))) }) });
    return h("div", {}, h("p", {}, "k-means of the first 64 components, every km² of land alike."), h("div", { class: "row" }, "Clusters", count), this.names(page.shown?.names ?? []));
  }

  private compare(): HTMLElement {
    const { page } = this;
    const { at, other, against } = page.state;
    const others = page.found.filter(({ id }) => id !== page.version?.id);
    const choose = h("select", { id: "against", "aria-label": "Other version", onchange: () => page.set({ against: choose.value }) },
      h("option", { value: "" }, "two places of this grid"), ...others.map(({ id, title }) => h("option", { value: id, selected: id === against }, title)));
    const said = against ? this.turned() : this.pair(at, other);
    return h("div", {}, h("div", { class: "row" }, "Compare with", choose), said);
  }

  private pair(at: Place | null, other: Place | null): HTMLElement {
    if (!at || !other) return h("p", {}, "Click place A, then place B: the map shows to which of them every cell is more alike.");
    const { value } = this.page.shown ?? {};
    return h("div", {}, h("p", { id: "pair" }, `A ${told(at)} and B ${told(other)}: likeness ${value?.toFixed(3) ?? "…"}.`),
      this.legend("diverging", ["more like A", "more like B"]), this.shares());
  }

  private turned(): HTMLElement {
    const { value, range } = this.page.shown ?? {};
    if (value === undefined || !range) return h("p", {}, "Comparing …");
    return h("div", {}, h("p", { id: "turned" }, `How far each cell turned: 1 - correlation of its likeness to 64 places, in the one grid and in the other. Median ${value.toFixed(3)}.`),
      this.legend("sequential", ["0", range[1].toFixed(2)]));
  }

  private labelsOf(file: File): void {
    const { page } = this;
    void page.trying(async () => {
      page.labels = labels(file.name, await file.text());
      page.shown = null;
      await page.show();
    });
  }

  private labels(): HTMLElement {
    const { page } = this;
    const file = h("input", { id: "file", type: "file", accept: ".csv,.json,.geojson", "aria-label": "Labels", onchange: () => file.files?.[0] && this.labelsOf(file.files[0]) });
    const { range, scores, value } = page.shown ?? {};
    return h("div", {},
      h("p", {}, "A CSV with lon, lat and a label, or a GeoJSON of points. Numbers give a ridge regression, texts a map of classes. The file stays in your browser."), file,
      page.labels && h("p", {}, `${page.labels.name}: ${page.labels.places.length} places${value !== undefined && scores ? `, ${value} on land` : ""}.`),
      page.labels && !page.labels.numeric && this.names(page.shown?.names ?? []),
      page.labels && range && this.legend("sequential", range.map((end) => end.toPrecision(3)) as [string, string]), page.labels && this.scores());
  }

  private legend(kind: "sequential" | "diverging", ends: [string, string]): HTMLElement {
    return h("div", {}, h("div", { class: `legend ${kind}` }), h("div", { class: "ends" }, h("span", {}, ends[0]), h("span", {}, ends[1])));
  }

  private away(): HTMLElement {
    const { page } = this;
    const globe = h("button", { id: "globe", "aria-pressed": String(!page.state.flat), onclick: () => { page.state.flat = !page.state.flat; page.map.globe = !page.state.flat; page.set({}); } }, "Globe");
    const save = (name: string, make: () => Promise<void>) => h("button", { disabled: !page.shown, onclick: () => void page.trying(make) }, name);
    const [tiff, png] = [save("GeoTIFF", () => this.raster()), save("PNG", () => this.picture())];
    const marks = h("button", { disabled: !page.state.marks.length, onclick: () => download("marks.geojson", asGeojson(page.state.marks), "application/geo+json") }, "Marks");
    const code = h("button", { "aria-pressed": String(this.code), onclick: () => { this.code = !this.code; this.draw(); } }, "Python");
    const link = h("button", { onclick: () => void navigator.clipboard?.writeText(location.href).then(() => page.tell("The address of this view was copied.")) }, "Link");
    return h("div", {}, h("div", { class: "row" }, globe, link, tiff, png, marks, code), this.code && h("pre", {}, this.lines()),
      h("p", { class: "faint" }, String(page.about?.attributes?.attribution ?? "")));
  }

  private lines(): string {
    const { version, state, shown, found, labels } = this.page;
    const url = (of?: { home: string }) => (of ? `${of.home}compact.zarr` : "");
    return lines({ url: url(version), other: url(found.find(({ id }) => id === state.against)), state, shown, label: labels?.name ?? "" });
  }

  /** Saves the map of the world, and the world file that places it for a GIS. */
  private async picture(): Promise<void> {
    const { picture, world } = await this.page.engine.picture(this.page.map.view);
    download(`${this.name}.png`, picture);
    download(`${this.name}.pgw`, world);
    this.page.tell("");
  }

  /** Saves the numbers behind the map. */
  private async raster(): Promise<void> {
    const { page } = this;
    const said = { GRID: page.version.home, PAGE: location.href, ATTRIBUTION: String(page.about.attributes.attribution ?? "") };
    download(`${this.name}.tif`, await page.engine.tiff(page.map.view, said));
    page.tell("");
  }

  private get name(): string {
    return `${this.page.version.id.slice(0, 8)}-${document.body.dataset.shown}`;
  }
}

function told([lon, lat]: Place): string {
  return `${Math.abs(lat).toFixed(1)}° ${lat < 0 ? "S" : "N"} ${Math.abs(lon).toFixed(1)}° ${lon < 0 ? "W" : "E"}`;
}

function simple(text: string): string {
  return text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().trim();
}
