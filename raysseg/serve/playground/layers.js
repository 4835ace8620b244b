// From segments to coloured pixels.

import { paint, toRuns } from "./rle.js";

const runsOf = new WeakMap(); // by segmentation: decoded once, however often it is painted

/** Which segment lies on top of each pixel: its place in `segments` + 1, the smallest above; 0 where there is none. */
export function toIndex(segments, height, width) {
  const index = new Uint16Array(height * width);
  const places = segments.map((_, place) => place).sort((a, b) => segments[b].area - segments[a].area);
  for (const place of places) {
    const { segmentation } = segments[place];
    if (!runsOf.has(segmentation)) runsOf.set(segmentation, toRuns(segmentation.counts));
    paint(index, runsOf.get(segmentation), height, width, place + 1);
  }
  return index;
}

/**
 * A layer of segments, {segments, index, height, width, surface}, the last one where that is the same; `surface` is
 * coloured by `colourLayer`, and null where there are no segments.
 */
export function reuseLayer(last, segments, { height, width }) {
  const isOfSize = last?.height === height && last.width === width && last.segments.length === segments.length;
  if (isOfSize && segments.every((segment, place) => segment === last.segments[place])) return last;
  const layer = { segments, height, width, index: [], surface: null };
  if (!segments.length) return layer;
  return { ...layer, index: toIndex(segments, height, width), surface: new OffscreenCanvas(width, height) };
}

/** Paints a layer in its segments' colours, a light line around each; what is not lit, if anything is, steps back. */
export function colourLayer(layer, isLit) {
  const { segments, index, height, width, surface } = layer;
  if (!surface) return;
  const anyLit = isLit !== null && segments.some(isLit);
  const fills = new Uint32Array(segments.length + 1);
  const lines = new Uint32Array(segments.length + 1);
  segments.forEach((segment, place) => {
    const alpha = anyLit && !isLit(segment) ? 70 : 255;
    fills[place + 1] = toPixel(segment.colour, alpha);
    lines[place + 1] = toPixel(segment.colour.map((part) => 0.4 * part + 153), alpha);
  });
  const pixels = new Uint32Array(height * width);
  for (let row = 0, place = 0; row < height; row++) {
    for (let column = 0; column < width; column++, place++) {
      const value = index[place];
      const isEdge =
        (column + 1 < width && index[place + 1] !== value) || (row + 1 < height && index[place + width] !== value);
      pixels[place] = isEdge ? lines[value] : fills[value];
    }
  }
  const data = new ImageData(new Uint8ClampedArray(pixels.buffer), width, height);
  surface.getContext("2d").putImageData(data, 0, 0);
}

/** The segment on top at a pixel, or null. */
export function segmentAt(layer, { x, y }) {
  return layer?.segments[layer.index[Math.floor(y) * layer.width + Math.floor(x)] - 1] ?? null;
}

/** Any number of colours, each far from the one before. */
export function hueColour(number) {
  const hue = (number * 137.508 + 20) % 360;
  const light = (offset) => {
    const k = (offset + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.36 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [light(0), light(8), light(4)];
}

const toPixel = ([red, green, blue], alpha) => (alpha << 24) | (blue << 16) | (green << 8) | red; // little-endian RGBA
