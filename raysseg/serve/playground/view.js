// What is drawn: the segments, the kept masks and the candidate, and what is pointed at.

import { colourLayer, reuseLayer, segmentAt } from "./layers.js";
import { $, cardOf, isComparing, isPrompting, labels, stage, state } from "./session.js";

const leastScore = () => $("threshold").valueAsNumber / 100;
export const hasScore = ({ score }) => score !== null && score !== undefined;
export const passes = (segment) => !hasScore(segment) || segment.score >= leastScore();
export const isShown = (segment) => passes(segment) && !state.hidden.has(segment.name) && !state.hidden.has(segment);

/** Layers of the answers; while prompting, of everything, what is kept, and the candidate. */
export function buildLayers() {
  const { image, answers, correcting, masks, chosen, layers } = state;
  if (!image) return;
  const lists = answers.map((segments) => segments?.filter(isShown) ?? []);
  if (isPrompting()) {
    for (const mask of image.kept) mask.colour = labels.colourOf(mask.name);
    lists[1] = image.kept.filter((mask) => mask !== correcting);
    lists.push(masks.slice(chosen, chosen + 1));
  }
  state.layers = lists.map((segments, place) => reuseLayer(layers[place], segments, image));
  colour();
}

/** Has what passes a test stand out; null: nothing. */
export function light(test) {
  state.isLit = test;
  cancelAnimationFrame(state.frame);
  state.frame = requestAnimationFrame(colour);
}

/** Draws, where layers are as before. */
export function colour() {
  if (!state.layers.length) return;
  const [candidate] = state.layers[2]?.segments ?? [];
  const isLit = state.isLit ?? (candidate ? (segment) => segment === candidate : null);
  state.layers.forEach((layer) => colourLayer(layer, isLit));
  stage.isPrompting = isPrompting();
  stage.draw({ ...toScene(), opacity: $("opacity").valueAsNumber / 100, prompts: state.prompts });
}

function toScene() {
  const over = ({ surface }, from = "start", to = "end") => ({ surface, from, to });
  const [a, b] = state.layers;
  if (isPrompting()) return { panes: [state.layers.map((layer) => over(layer))], isSplit: false };
  if (!isComparing()) return { panes: [[over(a)]], isSplit: false };
  if ($("mode").value === "beside") return { panes: [[over(a)], [over(b)]], isSplit: false };
  return { panes: [[over(a, "start", "split"), over(b, "split", "end")]], isSplit: true };
}

/** Says what is at a pixel, and lights it; null: nowhere. */
export function point(at) {
  const found = at ? state.layers.map((layer) => segmentAt(layer, at)) : [];
  const names = found.map((segment) => segment && (segment.name || "candidate"));
  const [a, b] = names.map((name) => name ?? "nothing");
  const words = isComparing() ? `A ${a}, B ${b}` : (names.findLast(Boolean) ?? "nothing");
  $("readout").ariaLive = stage.cursor ? "polite" : "off"; // a mouse would have it read all the time
  $("readout").textContent = at ? `x ${at.x}, y ${at.y}: ${words}` : "";
  state.pointed = found.findLast(Boolean) ?? null;
  if (isPrompting()) return;
  const isSemantic = cardOf("a")?.task === "semantic";
  const lit = new Set(found.map((segment) => (isSemantic ? segment?.name : segment)));
  light(at && state.pointed ? (segment) => lit.has(isSemantic ? segment.name : segment) : null);
}
