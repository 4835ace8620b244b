// Prompts and the candidates that they bring.

import { latest } from "./api.js";
import { renderCandidates, toCount } from "./lists.js";
import { $, api, cardOf, isPrompting, say, stage, state, tell } from "./session.js";
import { checkSize, onUploaded } from "./uploads.js";
import { buildLayers } from "./view.js";

const CANDIDATE = [255, 0, 153];
export const runPrompt = latest();

export function forgetPrompts() {
  runPrompt(null);
  Object.assign(state, { prompts: [], masks: [], chosen: 0, correcting: null });
  renderPrompts();
}

export function addPrompt(prompt) {
  if (!isPrompting() || !state.image) return;
  state.prompts.push(prompt);
  askPrompt();
}

export function undoPrompt() {
  if (state.prompts.length < 2 && !state.correcting) return clearPrompts();
  state.prompts.pop();
  return askPrompt();
}

export function clearPrompts() {
  stage.cancelBox();
  forgetPrompts();
  buildLayers();
}

function askPrompt() {
  const { image, prompts, correcting } = state;
  const model = cardOf("a").name;
  stage.draw({ prompts });
  runPrompt(null);
  if (!prompts.length) return showMasks([correcting]);
  say(`${model} is looking …`);
  const points = prompts.filter(({ box }) => !box);
  const body = {
    points: points.map(({ x, y }) => [x, y]),
    labels: points.map(({ label }) => label),
    box: prompts.findLast(({ box }) => box)?.box ?? null,
    mask: correcting ? { size: correcting.segmentation.size, counts: correcting.segmentation.counts } : null,
    multimask: true,
  };
  const work = async (signal) => {
    const call = (hash) => api.prompt(model, { image: hash, ...body }, signal);
    const answer = await onUploaded(image, model, signal, call);
    checkSize(answer, image);
    signal.throwIfAborted();
    showMasks(answer.masks);
  };
  return tell(runPrompt(work));
}

export function showMasks(masks) {
  state.masks = masks.map((mask) => ({ ...mask, name: "", colour: CANDIDATE }));
  state.chosen = 0;
  const [best] = masks;
  say(best ? `${toCount(best.area)} px found.` : "The model found nothing there.");
  renderPrompts();
  buildLayers();
}

export function choose(place) {
  if (place >= state.masks.length) return;
  state.chosen = place;
  $("candidates").querySelectorAll("input")[place].checked = true;
  buildLayers();
}

function renderPrompts() {
  renderCandidates($("candidates"), state.masks, state.chosen, choose);
  for (const id of ["undo", "clear"]) $(id).disabled = !state.prompts.length && !state.correcting;
  $("keep").disabled = !state.masks.length;
  $("keep").textContent = state.correcting ? "Replace mask" : "Keep mask";
}
