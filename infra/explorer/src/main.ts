/** Starts the page: finds the grid, wires map, worker and panel, and keeps the address in step. */

import * as Comlink from "comlink";
import { type Version, versions } from "./catalog";
import { CLASSES } from "./colours";
import type { About, Engine, Shown } from "./engine";
import type { Bounds, Layer, Place } from "./layers";
import { parsed, type State, written } from "./link";
import { type Point, WorldMap } from "./map";
import { Panel } from "./panel";
import type { Labels } from "./labels";

const CATALOG = "../grids/collection.json";

class Page {
  state: State = parsed(location.hash);
  labels: Labels | null = null;
  within: Bounds | null = null;
  found: Version[] = [];
  version!: Version;
  about!: About;
  shown: Shown | null = null;
  next: "at" | "other" = "at";
  readonly engine = Comlink.wrap<Engine>(new Worker(new URL("engine.js", document.baseURI), { type: "module" }));
  readonly map = new WorldMap(document.getElementById("map") as HTMLElement, this.engine, (at) => this.clicked(at));
  readonly panel = new Panel(document.getElementById("panel") as HTMLElement, this);
  private readonly status = document.getElementById("status") as HTMLElement;

  async start(): Promise<void> {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.map.themed());
    this.map.map.on("moveend", () => this.moved());
    addEventListener("hashchange", () => location.hash !== written(this.state) && location.reload());
    await this.trying(async () => {
      if (location.protocol === "file:") {
        throw new Error("Browsers let no page read files of the disk. Run `rangegrid explore GRID`, which serves it.");
      }
      this.found = await versions(new URL(CATALOG, document.baseURI).href);
      await this.open(this.found.find(({ id }) => id === this.state.grid) ?? this.found[0]);
    });
  }

  /** Opens a version, and shows the layer of the address on it. */
  async open(version: Version): Promise<void> {
    this.version = version;
    this.state.grid = version.id;
    this.tell("Opening the grid …");
    const listener = { progress: this.progress, changed: () => this.map.refresh(), failed: (text: string) => this.tell(text, true) };
    this.about = await this.engine.open(`${version.home}compact.zarr/`, Comlink.proxy(listener));
    if (this.about.beta === undefined) this.state.beta = null; // of an address of another grid
    this.look();
    await this.show();
  }

  private look(): void {
    const [west, south, east, north] = this.about.box;
    this.map.globe = !this.state.flat;
    const { view } = this.state;
    if (view) this.map.map.jumpTo({ zoom: view[0], center: [view[1], view[2]] });
    else if (this.state.at) this.map.map.jumpTo({ center: this.state.at });
    else if (east - west < 350) this.map.map.fitBounds([[west, Math.max(-85, south)], [east, Math.min(85, north)]], { animate: false, padding: 40 });
  }

  private readonly progress = (done: number, total: number) => {
    const failed = this.status.classList.contains("error"); // parts that come after must not hide it
    if (total > 2 && !failed) this.tell(done < total ? `Reading the grid, part ${done} of ${total} …` : "");
  };

  /** Shows a line at the bottom: progress, or an error that stays. */
  tell(text: string, wrong = false): void {
    this.status.textContent = text;
    this.status.classList.toggle("error", wrong);
  }

  async trying(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      this.tell((error as Error).message, true);
      this.panel.draw();
    }
  }

  /** Changes what is shown. */
  set(change: Partial<State>): void {
    Object.assign(this.state, change);
    void this.trying(() => this.show());
  }

  /** Shows the layer of the state. */
  async show(): Promise<void> {
    history.replaceState(null, "", written(this.state));
    this.map.mark(this.points());
    this.panel.draw();
    const layer = this.layer();
    if (!layer) return;
    this.tell("Computing …");
    const shown = await this.engine.show(layer);
    if (!shown) return;
    this.shown = shown;
    this.tell("");
    document.body.dataset.shown = layer.kind; // for those who wait for it
    this.panel.draw();
  }

  /** Returns the layer of the state; nothing while a person has more to choose, and the map stays as it is. */
  private layer(): Layer | null {
    const { mode, components, at, other, shares, beta, marks, method, least, clusters, against } = this.state;
    if (mode === "likeness" && at) return { kind: "likeness", at, shares, beta };
    if (mode === "classes" && new Set(marks.map((mark) => mark.name)).size > 1) return { kind: "classes", method, marks, least };
    if (mode === "clusters") return { kind: "clusters", count: clusters };
    if (mode === "compare" && against) {
      const to = this.found.find(({ id }) => id === against);
      if (to) return { kind: "change", other: `${to.home}compact.zarr/` };
    }
    if (mode === "compare" && at && other) return { kind: "between", at, other, shares, beta };
    if (mode === "labels" && this.labels) return this.labelled(this.labels, method, least);
    if (mode === "colours" || !this.shown) return { kind: "colours", components, within: this.within };
    return null;
  }

  private labelled({ numeric, places, values }: Labels, method: State["method"], least: number): Layer {
    if (numeric) return { kind: "probe", places, values: values as number[] };
    const marks = places.map((at, n) => ({ at, name: values[n] as string }));
    return { kind: "classes", method, marks, least };
  }

  /** Returns the names of classes, in the order of their colours. */
  get classes(): string[] {
    return [...new Set(this.state.marks.map((mark) => mark.name))];
  }

  private points(): Point[] {
    const { mode, at, other, marks } = this.state;
    if (mode === "classes") {
      return marks.map((mark) => ({ at: mark.at, text: mark.name, colour: CLASSES[this.classes.indexOf(mark.name) % CLASSES.length] }));
    }
    const chosen: Point[] = [];
    if (at && (mode === "likeness" || mode === "compare")) chosen.push({ at, colour: "#0b5fa5", text: "A" });
    if (other && mode === "compare") chosen.push({ at: other, colour: "#d97706", text: "B" });
    return chosen;
  }

  /** Takes a place that a person chose on the map or from a list. */
  clicked(at: Place): void {
    const { mode, marks } = this.state;
    if (mode === "classes") return this.set({ marks: [...marks, { at, name: this.panel.className }] });
    if (mode === "compare") {
      const change = this.next === "at" ? { at, against: "" } : { other: at, against: "" };
      this.next = this.next === "at" ? "other" : "at";
      return this.set(change);
    }
    this.set({ mode: "likeness", at });
  }

  fly(at: Place): void {
    this.map.map.flyTo({ center: at, zoom: Math.max(this.map.map.getZoom(), 4) });
  }

  private moved(): void {
    const { lng, lat } = this.map.map.getCenter();
    this.state.view = [this.map.map.getZoom(), lng, lat];
    if (this.version) history.replaceState(null, "", written(this.state));
  }
}

export type { Page };

const page = new Page();
Object.assign(window, { explorer: page });
void page.start();
