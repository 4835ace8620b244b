// The models' answers and the list of their classes.

import { latest } from "./api.js";
import { keepSegments, renderKeptMasks, renderNames } from "./kept.js";
import { hueColour } from "./layers.js";
import { renderClasses, toEntries } from "./lists.js";
import { clearPrompts, forgetPrompts, runPrompt } from "./prompts.js";
import { $, api, cardOf, fillSelect, isComparing, isPrompting, labels, say, state, tell } from "./session.js";
import { checkSize, onUploaded, timed, upload } from "./uploads.js";
import { buildLayers, hasScore, light, passes } from "./view.js";

const runModels = [latest(), latest()];

export async function loadModels() {
  say("Asking for models …");
  const cards = await tell(api.models());
  if (!cards) return;
  state.cards = cards;
  const segmenters = cards.filter(({ kind }) => kind === "segment").map(({ name }) => name);
  fillSelect($("model-a"), cards.map(({ name }) => name));
  fillSelect($("model-b"), ["", ...segmenters], "", "none");
  fillSelect($("class-list"), segmenters);
  $("list-field").hidden = segmenters.length < 2;
  chooseModels();
  if (!cards.length) say("The server has no models; add some to `models` of its job.", true);
}

export function chooseModels() {
  const card = cardOf("a");
  if (card?.kind === "segment" && !labels.hasKept()) $("class-list").value = card.name;
  $("compare-field").hidden = isPrompting();
  $("mode-field").hidden = !isComparing();
  $("tools").hidden = !isPrompting();
  say("");
  forgetPrompts();
  state.hidden.clear();
  state.answers = [null, null];
  renderNames();
  renderKeptMasks();
  return askModels();
}

/** Has both models look at the image; what is under way for another image or model is given up. */
export async function askModels() {
  for (const run of runModels) run(null);
  refresh();
  const { image } = state;
  if (!image || !cardOf("a")) return;
  if (isPrompting()) await tell(upload(image, cardOf("a").name));
  else await Promise.all(["a", "b"].map((letter, place) => tell(runModels[place](segment(image, letter, place)))));
}

function segment(image, letter, place) {
  const card = isComparing() || letter === "a" ? cardOf(letter) : null;
  if (!card) return undefined;
  return async (signal) => {
    image.answers[card.name] ??= await timed(card.name, async () => {
      const answer = await api.segment(card.name, image.file, signal);
      checkSize(answer, image);
      return toSegments(answer.segments, card);
    });
    signal.throwIfAborted();
    state.answers[place] = image.answers[card.name];
    refresh();
  };
}

const toSegments = (segments, card) =>
  segments.map((found) => ({ ...found, name: found.category, colour: labels.colourOf(found.category, card) }));

export function askEverything() {
  const { image } = state;
  const model = cardOf("a").name;
  if (!image) return say("Open an image first.", true);
  clearPrompts();
  const work = async (signal) => {
    const call = () => onUploaded(image, model, signal, (hash) => api.everything(model, hash, signal));
    const answer = await timed(model, call);
    checkSize(answer, image);
    signal.throwIfAborted();
    const masks = answer.masks.sort((one, other) => other.area - one.area);
    state.answers[0] = masks.map((mask, place) => {
      return { ...mask, name: `mask ${place + 1}`, colour: hueColour(place), isNameless: true };
    });
    if (!masks.length) say("The model found nothing.");
    refresh();
  };
  return tell(runPrompt(work));
}

/** Everything that follows from the state, but for the lists of kept masks and prompts. */
export function refresh() {
  const { image } = state;
  if (!image) return;
  const answers = (isComparing() ? state.answers : state.answers.slice(0, 1)).map((segments) => segments ?? []);
  renderFound(answers.map((segments) => segments.filter(passes)), answers.flat().some(hasScore));
  buildLayers();
}

function renderFound(answers, hasScores) {
  const entries = toEntries(answers);
  const { width, height } = state.image;
  $("found").hidden = !entries.length;
  $("threshold-field").hidden = !hasScores;
  $("keep-all").hidden = isComparing();
  $("found-title").textContent = isPrompting() ? "Everything" : "Classes";
  const names = ["a", "b"].map((letter) => cardOf(letter)?.name);
  const number = `${answers[0].length} segment${answers[0].length === 1 ? "" : "s"}, ${width} × ${height} px`;
  $("found-note").textContent = isComparing() ? `A is ${names[0]}, B is ${names[1]}.` : number;
  renderClasses($("classes"), entries, width * height, {
    light,
    keep: keepSegments,
    isHidden: (key) => state.hidden.has(key),
    show(key, isOn) {
      state.hidden[isOn ? "delete" : "add"](key);
      buildLayers();
    },
  });
}
