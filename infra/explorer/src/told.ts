/** Errors that the page shows to a person: what happened, where, and the way out. */

export class Told extends Error {}

/** Returns a web address's host and path, for messages. */
function shown(url: string): string {
  const { host, pathname } = new URL(url);
  return `${host}${pathname}`;
}

/** Fetches an object whole, and turns each way to fail into a sentence. */
export async function read(url: string, what: string): Promise<Response> {
  let answer: Response;
  try {
    answer = await fetch(url, { credentials: "omit" });
  } catch {
    const other = new URL(url).origin !== self.location.origin;
    throw new Told(
      other
        ? `${shown(url)} cannot be read from this page: the server is not reached, or its CORS rules do not allow ` +
          `${self.location.origin}. Allow GET from this origin (docs/explorer.md has the rule), or open the explorer ` +
          "that lies in the same bucket."
        : `${shown(url)} cannot be read: the server does not answer. Is it still running, and are you online?`,
    );
  }
  if (answer.status === 404) throw new Told(`There is no ${what} at ${shown(url)}.`);
  if (answer.status === 401 || answer.status === 403) {
    throw new Told(
      `The bucket does not let anybody read ${shown(url)} (HTTP ${answer.status}): either there is no ${what}, or ` +
        "reading without keys has to be allowed for grids/ and explorer/ (docs/explorer.md).",
    );
  }
  if (!answer.ok) throw new Told(`The server answers HTTP ${answer.status} for ${shown(url)}: try again later.`);
  return answer;
}

/** Reads JSON, and tells where it is none. */
export async function readJson(url: string, what: string): Promise<any> {
  const answer = await read(url, what);
  try {
    return await answer.json();
  } catch {
    throw new Told(`${shown(url)} is no ${what}: the address leads to another page, or the file is damaged.`);
  }
}

/** Returns the error of bytes that are not those that were written. */
export function damaged(url: string): Told {
  return new Told(
    `${shown(url)} is damaged: its bytes are not those that were written. Delete the compact.zarr it is in, and ` +
      "run `rangegrid explore` or publish again, which makes it anew.",
  );
}
