// What is known at the moment, and what all parts of the page use.

import { createApi } from "./api.js";
import { createLabels } from "./labels.js";
import { make } from "./lists.js";
import { Stage } from "./stage.js";

export const $ = (id) => document.getElementById(id);

export const state = {
  cards: [],
  images: [], // {file, name, width, height, kept, uploads: {model: promise}, answers: {model: segments}}
  image: null, // the one that is shown, which has a bitmap
  opening: null, // the one that was last asked for
  answers: [null, null], // segments of the models to compare; of a prompt model, everything
  prompts: [], // {x, y, label} or {box}
  masks: [], // candidates
  chosen: 0,
  correcting: null, // the kept mask that the next one replaces
  hidden: new Set(), // class names, and segments
  isLit: null, // which segments are pointed at
  layers: [],
  isSaved: true,
};
export const stage = new Stage($("stage"));
export const labels = createLabels(state);
export const api = createApi({ askToken, note: (text) => say(text) });

export const cardOf = (letter) => state.cards.find(({ name }) => name === $(`model-${letter}`).value) ?? null;
export const isPrompting = () => cardOf("a")?.kind === "prompt";
export const isComparing = () => !isPrompting() && cardOf("b") !== null;

export function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

/** Awaits work, and says what went wrong; work that was overtaken ends in silence. */
export async function tell(work) {
  try {
    return await work;
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
    return undefined;
  }
}

async function askToken(isWrong) {
  const dialog = $("ask");
  $("ask-note").textContent = isWrong ? "It did not take the last one." : "It is kept until this tab is closed.";
  $("token").value = dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "send" ? $("token").value.trim() : null;
}

/** Gives a select other options. */
export function fillSelect(select, values, chosen = values[0], blank = "") {
  select.replaceChildren(...values.map((value) => make("option", { value, textContent: value || blank })));
  select.value = chosen ?? "";
}
