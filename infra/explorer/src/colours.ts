/** Colours of cells: OKLab for components, and palettes that do not rest on telling red from green. */

/** Red, green, blue, opacity. */
export type Colour = [number, number, number, number];

const BRIGHT = [0.36, 0.95];
const CHROMA = 0.13;

/** Returns the colour of three components stretched to 0..1: lightness, blue to yellow, green to pink. */
export function oklab(light: number, yellow: number, pink: number): Colour {
  const L = BRIGHT[0] + (BRIGHT[1] - BRIGHT[0]) * light;
  const [a, b] = [(2 * pink - 1) * CHROMA * 0.8, (2 * yellow - 1) * CHROMA];
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    gamma(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
    gamma(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    gamma(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s),
    255,
  ];
}

function gamma(linear: number): number {
  const value = linear <= 0.0031308 ? 12.92 * linear : 1.055 * Math.max(linear, 0) ** (1 / 2.4) - 0.055;
  return Math.round(255 * Math.min(1, Math.max(0, value)));
}

/** Okabe and Ito's eight colours, then such as are as far as can be from all before to whoever sees no red, green or blue. */
export const CLASSES = [
  "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000",
  "#784b00", "#0000c3", "#c3b4a5", "#9678ff", "#5a0078", "#8700ff", "#a51e69", "#96d2ff",
];

/** Cividis, and a diverging scale from blue to orange. */
const SEQUENCE = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const DIVERGING = ["#053061", "#2b7bba", "#92c5de", "#f2f2f2", "#fdb863", "#d97706", "#7f3b08"];

export function parsed(hex: string): Colour {
  const value = parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255, 255];
}

function between(palette: Colour[], share: number): Colour {
  const at = Math.min(1, Math.max(0, share)) * (palette.length - 1);
  const low = Math.min(Math.floor(at), palette.length - 2);
  const rest = at - low;
  return palette[low].map((value, n) => Math.round(value + rest * (palette[low + 1][n] - value))) as Colour;
}

/** Returns 256 colours of a palette, four bytes each. */
function table(palette: string[]): Uint8ClampedArray {
  const colours = palette.map(parsed);
  return new Uint8ClampedArray(Array.from({ length: 256 }, (_, n) => between(colours, n / 255)).flat());
}

export const SEQUENTIAL_TABLE = table(SEQUENCE);
export const DIVERGING_TABLE = table(DIVERGING);

export const CSS = { sequential: `linear-gradient(90deg, ${SEQUENCE})`, diverging: `linear-gradient(90deg, ${DIVERGING})` };
