// The masks that are kept: what an export holds.

import { make, renderKept, toCount } from "./lists.js";
import { clearPrompts, forgetPrompts, showMasks } from "./prompts.js";
import { $, isPrompting, labels, say, stage, state } from "./session.js";
import { buildLayers, light } from "./view.js";

/** The class name that is typed, or null, having asked for one. */
function typedName() {
  const name = $("name").value.trim();
  if (name) return name;
  say("Choose or type a class name first.", true);
  $("name").focus();
  return null;
}

/** Keeps the chosen candidate, in the place of the mask that is corrected, if there is one. */
export function keepMask() {
  const mask = state.masks[state.chosen];
  if (!mask?.area) return say("There is no mask to keep; point at something first.", true);
  const name = typedName();
  if (!name) return;
  const { kept } = state.image;
  const place = state.correcting ? kept.indexOf(state.correcting) : kept.length;
  kept.splice(place, 1, labels.toKept(mask, name));
  clearPrompts();
  keptChanged(`Kept ${name}, ${toCount(mask.area)} px.`);
  renderKeptMasks();
}

/** Keeps segments of an answer; those of no class have the name that is typed. */
export function keepSegments(segments) {
  const { kept } = state.image;
  const fresh = segments.filter(({ segmentation }) => !kept.some((mask) => mask.segmentation === segmentation));
  const name = fresh.some(({ isNameless }) => isNameless) ? typedName() : "";
  if (name === null) return;
  kept.push(...fresh.map((segment) => labels.toKept(segment, segment.isNameless ? name : segment.name)));
  keptChanged(fresh.length ? `Kept ${fresh.length} of ${segments.length}.` : "That is kept already.");
  renderKeptMasks();
}

function keptChanged(text) {
  state.isSaved = false;
  say(text);
  renderNames();
  buildLayers();
}

const keptActions = {
  light,
  colourOf: (name) => labels.colourOf(name),
  rename(mask, name) {
    mask.name = name.trim() || mask.name;
    keptChanged(`It is ${mask.name} now.`);
  },
  remove(mask) {
    state.image.kept.splice(state.image.kept.indexOf(mask), 1);
    if (mask === state.correcting) clearPrompts();
    keptChanged(`Deleted ${mask.name}.`);
    renderKeptMasks();
  },
  correct(mask) {
    if (!isPrompting()) {
      $("model-a").value = state.cards.find(({ kind }) => kind === "prompt").name;
      $("model-a").dispatchEvent(new Event("change"));
    }
    forgetPrompts();
    state.correcting = mask;
    $("name").value = mask.name;
    showMasks([mask]);
    stage.canvases[0].focus();
    say(`Correcting ${mask.name}: add points, then keep what replaces it. Esc leaves it as it is.`);
  },
};

export function renderKeptMasks() {
  const kept = state.image?.kept ?? [];
  renderKept($("kept"), kept, { ...keptActions, canCorrect: state.cards.some(({ kind }) => kind === "prompt") });
  const number = state.images.filter((image) => image.kept.length).length;
  $("kept-count").textContent = `${kept.length}${number > 1 ? ` here, ${labels.numKept()} in ${number} images` : ""}`;
  $("save-png").disabled = !kept.length;
  for (const id of ["save-coco", "save-classes"]) $(id).disabled = !number;
}

export function renderNames() {
  $("names").replaceChildren(...labels.categories().map(({ name }) => make("option", { value: name })));
}
