/** The versions of grids that lie beside the page, from their STAC Collection. */

import { Told, readJson } from "./told";

export interface Version {
  /** Fingerprint. */
  id: string;
  /** What a person reads. */
  title: string;
  /** Address of the version's directory, with a slash at its end. */
  home: string;
  latest: boolean;
}

/** Returns the versions that a Collection lists, those in force first. */
export async function versions(collection: string): Promise<Version[]> {
  const told = await readJson(collection, "catalog of grids (collection.json)");
  const links: any[] = Array.isArray(told?.links) ? told.links : [];
  const hrefs = (rel: string) => links.filter((link) => link.rel === rel);
  const inForce = [...hrefs("latest-version"), ...hrefs("item").filter((link) => link["rangegrid:state"] === "latest")];
  const latest = new Set(inForce.map((link) => new URL(link.href, collection).href));
  const found = hrefs("item").map((link) => {
    const item = new URL(link.href, collection).href;
    const home = item.slice(0, item.lastIndexOf("/") + 1);
    const id = decodeURIComponent(home.split("/").at(-2) as string);
    return { id, home, title: id === "grid" ? (link.title ?? id) : `${id.slice(0, 8)}: ${link.title ?? "grid"}`, latest: latest.has(item) };
  });
  if (!found.length) throw new Told(`${collection} lists no grid yet: publish one with \`rangegrid publish\`.`);
  return found.sort((a, b) => Number(b.latest) - Number(a.latest));
}
