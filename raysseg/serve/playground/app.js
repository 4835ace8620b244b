// The playground: state, and what ties the page's parts together.

import { createApi, latest } from "./api.js";
import { download, toClassList, toCoco, toMaskPng, voidId } from "./export.js";
import { createLabels } from "./labels.js";
import { colourLayer, hueColour, reuseLayer, segmentAt } from "./layers.js";
import { make, renderCandidates, renderClasses, renderKept, toCount, toEntries } from "./lists.js";
import { Stage } from "./stage.js";

const CANDIDATE = [255, 0, 153];
const $ = (id) => document.getElementById(id);

const state = {
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
const stage = new Stage($("stage"));
const labels = createLabels(state);
const api = createApi({ askToken, note: (text) => say(text) });
const runModels = [latest(), latest()];
const runPrompt = latest();

const cardOf = (letter) => state.cards.find(({ name }) => name === $(`model-${letter}`).value) ?? null;
const isPrompting = () => cardOf("a")?.kind === "prompt";
const isComparing = () => !isPrompting() && cardOf("b") !== null;

// --- words --------------------------------------------------------------------------------------------------------

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

/** Awaits work, and says what went wrong; work that was overtaken ends in silence. */
async function tell(work) {
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

// --- images -------------------------------------------------------------------------------------------------------

async function openFiles(files) {
  const found = [...files].filter(({ type, name }) => type.startsWith("image/") || /\.(tiff?|bmp)$/i.test(name));
  if (!found.length) return say("That holds no image; open a PNG, JPEG or WebP file.", true);
  const opened = found.map(toEntry);
  fillSelect($("image"), state.images.map(({ name }) => name));
  return showImage(opened[0]);
}

/** The entry of a file; the same file is the same entry, another of the same stem has a name of its own. */
function toEntry(file) {
  const stem = (name) => name.replace(/\.[^.]*$/, "");
  const same = ({ file: other }) =>
    other.name === file.name && other.size === file.size && other.lastModified === file.lastModified;
  let entry = state.images.find(same);
  if (entry) return entry;
  let name = file.name;
  for (let number = 2; state.images.some((image) => stem(image.name) === stem(name)); number++) {
    name = file.name.replace(/(\.[^.]*)?$/, `-${number}$1`);
  }
  entry = { file, name, width: 0, height: 0, kept: [], uploads: {}, answers: {} };
  state.images.push(entry);
  return entry;
}

async function showImage(entry) {
  say(`Opening ${entry.name} …`);
  state.opening = entry;
  const bitmap = await createImageBitmap(entry.file).catch(() => null);
  if (state.opening !== entry) return bitmap?.close();
  if (!bitmap) {
    state.images.splice(state.images.indexOf(entry), 1);
    fillSelect($("image"), state.images.map(({ name }) => name), state.image?.name);
    return say(`${entry.name} can’t be shown by this browser; save it as PNG or JPEG.`, true);
  }
  state.image?.bitmap.close();
  state.image = Object.assign(entry, { bitmap, width: bitmap.width, height: bitmap.height });
  say("");
  $("image").value = entry.name;
  $("image-field").hidden = state.images.length < 2;
  $("empty").hidden = true;
  forgetPrompts();
  state.answers = [null, null];
  stage.show(entry);
  renderKeptMasks();
  return askModels();
}

// --- models -------------------------------------------------------------------------------------------------------

async function loadModels() {
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

function chooseModels() {
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
async function askModels() {
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

async function timed(name, work) {
  say(`${name} is looking …`);
  const start = performance.now();
  const result = await work();
  say(`${name} answered in ${((performance.now() - start) / 1000).toFixed(1)} s.`);
  return result;
}

function checkSize({ height, width }, image) {
  if (height === image.height && width === image.width) return;
  const sizes = `${width} × ${height}, this browser as ${image.width} × ${image.height}`;
  throw new Error(`The server sees ${image.name} as ${sizes}; save it anew, turned upright.`);
}

const toSegments = (segments, card) =>
  segments.map((found) => ({ ...found, name: found.category, colour: labels.colourOf(found.category, card) }));

/** The image's name at a prompt model; it is sent once, until the server has forgotten it. */
function upload(image, model) {
  image.uploads[model] ??= timed(model, () => api.upload(model, image.file)).catch((error) => {
    delete image.uploads[model];
    throw error;
  });
  return image.uploads[model];
}

/** Calls work(hash) on an uploaded image, and once more where the server does not know it any more. */
async function onUploaded(image, model, signal, work) {
  const hash = await upload(image, model);
  signal.throwIfAborted();
  try {
    return await work(hash);
  } catch (error) {
    if (error.status !== 404) throw error;
    delete image.uploads[model];
    const again = await upload(image, model);
    signal.throwIfAborted();
    return work(again);
  }
}

// --- prompts ------------------------------------------------------------------------------------------------------

function forgetPrompts() {
  runPrompt(null);
  Object.assign(state, { prompts: [], masks: [], chosen: 0, correcting: null });
  renderPrompts();
}

function addPrompt(prompt) {
  if (!isPrompting() || !state.image) return;
  state.prompts.push(prompt);
  askPrompt();
}

function undoPrompt() {
  if (state.prompts.length < 2 && !state.correcting) return clearPrompts();
  state.prompts.pop();
  return askPrompt();
}

function clearPrompts() {
  stage.cancelBox();
  forgetPrompts();
  renderKeptMasks();
  refresh();
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

function showMasks(masks) {
  state.masks = masks.map((mask) => ({ ...mask, name: "", colour: CANDIDATE }));
  state.chosen = 0;
  const [best] = masks;
  say(best ? `${toCount(best.area)} px found.` : "The model found nothing there.");
  renderPrompts();
  refresh();
}

function choose(place) {
  if (place >= state.masks.length) return;
  state.chosen = place;
  renderPrompts();
  refresh();
}

function askEverything() {
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

function renderPrompts() {
  renderCandidates($("candidates"), state.masks, state.chosen, choose);
  for (const id of ["undo", "clear"]) $(id).disabled = !state.prompts.length && !state.correcting;
  $("keep").disabled = !state.masks.length;
  $("keep").textContent = state.correcting ? "Replace mask" : "Keep mask";
}

// --- kept masks ---------------------------------------------------------------------------------------------------

/** The class name that is typed, or null, having asked for one. */
function typedName() {
  const name = $("name").value.trim();
  if (name) return name;
  say("Choose or type a class name first.", true);
  $("name").focus();
  return null;
}

function keepMask() {
  const mask = state.masks[state.chosen];
  if (!mask?.area) return say("There is no mask to keep; point at something first.", true);
  const name = typedName();
  if (!name) return;
  const { kept } = state.image;
  const place = state.correcting ? kept.indexOf(state.correcting) : kept.length;
  kept.splice(place, 1, labels.toKept(mask, name));
  clearPrompts();
  keptChanged(`Kept ${name}, ${toCount(mask.area)} px.`);
}

/** Keeps segments of an answer; those of no class have the name that is typed. */
function keepSegments(segments) {
  const { kept } = state.image;
  const fresh = segments.filter(({ segmentation }) => !kept.some((mask) => mask.segmentation === segmentation));
  const name = fresh.some(({ isNameless }) => isNameless) ? typedName() : "";
  if (name === null) return;
  kept.push(...fresh.map((segment) => labels.toKept(segment, segment.isNameless ? name : segment.name)));
  keptChanged(fresh.length ? `Kept ${fresh.length} of ${segments.length}.` : "That is kept already.");
}

function keptChanged(text) {
  state.isSaved = false;
  say(text);
  renderNames();
  renderKeptMasks();
  refresh();
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
  },
  correct(mask) {
    if (!isPrompting()) {
      $("model-a").value = state.cards.find(({ kind }) => kind === "prompt").name;
      chooseModels();
    }
    forgetPrompts();
    state.correcting = mask;
    $("name").value = mask.name;
    showMasks([mask]);
    stage.canvases[0].focus();
    say(`Correcting ${mask.name}: add points, then keep what replaces it. Esc leaves it as it is.`);
  },
};

function renderKeptMasks() {
  const kept = state.image?.kept ?? [];
  renderKept($("kept"), kept, { ...keptActions, canCorrect: state.cards.some(({ kind }) => kind === "prompt") });
  const number = state.images.filter((image) => image.kept.length).length;
  $("kept-count").textContent = `${kept.length}${number > 1 ? ` here, ${labels.numKept()} in ${number} images` : ""}`;
  $("save-png").disabled = !kept.length;
  for (const id of ["save-coco", "save-classes"]) $(id).disabled = !number;
}

function renderNames() {
  $("names").replaceChildren(...labels.categories().map(({ name }) => make("option", { value: name })));
}

// --- what is shown ------------------------------------------------------------------------------------------------

const leastScore = () => $("threshold").valueAsNumber / 100;
const hasScore = ({ score }) => score !== null && score !== undefined;
const passes = (segment) => !hasScore(segment) || segment.score >= leastScore();
const isShown = (segment) => passes(segment) && !state.hidden.has(segment.name) && !state.hidden.has(segment);

/** Everything that follows from the state, but for the lists of kept masks and prompts. */
function refresh() {
  const { image } = state;
  if (!image) return;
  const answers = (isComparing() ? state.answers : state.answers.slice(0, 1)).map((segments) => segments ?? []);
  renderFound(answers.map((segments) => segments.filter(passes)), answers.flat().some(hasScore));
  buildLayers();
}

/** Layers of the answers; while prompting, of everything, what is kept, and the candidate. */
function buildLayers() {
  const { image, answers, correcting, masks, chosen, layers } = state;
  const lists = answers.map((segments) => segments?.filter(isShown) ?? []);
  if (isPrompting()) {
    for (const mask of image.kept) mask.colour = labels.colourOf(mask.name);
    lists[1] = image.kept.filter((mask) => mask !== correcting);
    lists.push(masks.slice(chosen, chosen + 1));
  }
  state.layers = lists.map((segments, place) => reuseLayer(layers[place], segments, image));
  colour();
}

function light(test) {
  state.isLit = test;
  cancelAnimationFrame(state.frame);
  state.frame = requestAnimationFrame(colour);
}

function colour() {
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

function point(at) {
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

// --- the page's events --------------------------------------------------------------------------------------------

function fillSelect(select, values, chosen = values[0], blank = "") {
  select.replaceChildren(...values.map((value) => make("option", { value, textContent: value || blank })));
  select.value = chosen ?? "";
}

const TYPED_INTO = "input:not([type=checkbox], [type=radio], [type=range]), select";
const on = (id, event, act) => $(id).addEventListener(event, act);

function typed(event) {
  if (event.target.matches(TYPED_INTO) || document.querySelector("dialog[open]")) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "?") $("help").showModal();
  else if (key === "k" && state.masks.length) keepMask();
  else if (key === "k" && state.pointed) keepSegments([state.pointed]);
  else if (!isPrompting()) return;
  else if (key === "u") undoPrompt();
  else if (key === "escape") clearPrompts();
  else if ("123456789".includes(key)) choose(Number(key) - 1);
  else return;
  event.preventDefault();
}

async function save(event) {
  const categories = labels.categories();
  const { id } = event.currentTarget;
  if (id === "save-classes") download("classes.json", toClassList(categories));
  if (id === "save-coco") {
    download("annotations.json", toCoco(state.images.filter(({ kept }) => kept.length), categories));
    state.isSaved = true;
  }
  if (id === "save-png") {
    download(state.image.name.replace(/\.[^.]*$/, "") + ".png", await toMaskPng(state.image, categories));
    say(`Pixels without a mask are ${voidId(categories)}.`);
  }
}

stage.addEventListener("point", ({ detail }) => addPrompt(detail));
stage.addEventListener("box", ({ detail }) => addPrompt({ box: detail }));
stage.addEventListener("hover", ({ detail }) => state.image && point(detail));
on("file", "change", ({ target }) => {
  tell(openFiles(target.files));
  target.value = ""; // so that the same file can be opened again
});
on("image", "change", ({ target }) => tell(showImage(state.images.find(({ name }) => name === target.value))));
for (const id of ["model-a", "model-b"]) on(id, "change", chooseModels);
on("mode", "change", colour);
on("class-list", "change", () => {
  renderNames();
  renderKeptMasks();
  refresh();
});
for (const id of ["opacity", "threshold"]) {
  const show = ({ target }) => {
    target.nextElementSibling.textContent = `${target.value} %`;
  };
  on(id, "input", show);
  show({ target: $(id) });
}
on("opacity", "input", () => stage.draw({ opacity: $("opacity").valueAsNumber / 100 }));
on("threshold", "input", refresh);
on("negative", "click", ({ currentTarget }) => {
  stage.isNegative = !stage.isNegative;
  currentTarget.ariaPressed = String(stage.isNegative);
});
on("undo", "click", undoPrompt);
on("clear", "click", clearPrompts);
on("everything", "click", askEverything);
on("keep-all", "click", () => keepSegments(state.answers[0].filter(isShown)));
on("keep-form", "submit", (event) => {
  event.preventDefault();
  keepMask();
});
on("help-button", "click", () => $("help").showModal());
for (const id of ["save-coco", "save-png", "save-classes"]) on(id, "click", (event) => tell(save(event)));
addEventListener("keydown", typed);
addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && tell(openFiles(clipboardData.files)));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  tell(openFiles(event.dataTransfer.files));
});
addEventListener("beforeunload", (event) => state.isSaved || event.preventDefault());
loadModels();
