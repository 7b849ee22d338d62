/** Names of places: Natural Earth's populated places, read when they are first asked for. */

import { kilometres } from "./compute";
import type { Place } from "./layers";

/** Name, country, longitude, latitude; the most populous first. */
export type City = [string, string, number, number];

const NEAR = 400; // km; beyond, a name would mislead

let reading: Promise<City[]> | null = null;

export function cities(): Promise<City[]> {
  reading ??= fetch(new URL("places.json", document.baseURI)).then((answer) => answer.json());
  return reading;
}

/** Returns the name of the nearest place, or null where none is near. */
export function near(all: City[], at: Place): string | null {
  let [best, least]: [City | null, number] = [null, NEAR];
  for (const city of all) {
    if (Math.abs(city[3] - at[1]) > NEAR / 111) continue;
    const km = kilometres([city[2], city[3]], at);
    if (km < least) [best, least] = [city, km];
  }
  return best && `${best[0]}, ${best[1]}`;
}
