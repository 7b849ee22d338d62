/** Makes elements: `h("button", { onclick }, "text")`. */

type Child = Node | string | null | undefined | false;

export function h<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  about: Record<string, unknown> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value as EventListener);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (name === "value") (made as HTMLInputElement).value = String(value);
    else made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child): child is Node | string => child !== null && child !== undefined && child !== false));
  return made;
}

/** A square of a colour; its fill is an attribute, since the page's policy forbids inline styles. */
export function swatch(colour: string): SVGSVGElement {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const square = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of [["width", "100%"], ["height", "100%"], ["rx", "3"], ["fill", colour]]) square.setAttribute(name, value);
  made.append(square);
  return made;
}

/** Offers text or bytes as a file. */
export function download(name: string, content: Blob | string, type = "text/plain"): void {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
