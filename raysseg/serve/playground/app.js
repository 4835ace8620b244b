// The playground: images come in, and what the user does goes to the parts of the page.

import { download, toClassList, toCoco, toMaskPng, voidId } from "./export.js";
import { keepMask, keepSegments, renderKeptMasks, renderNames } from "./kept.js";
import { askEverything, askModels, chooseModels, loadModels, refresh } from "./models.js";
import { addPrompt, choose, clearPrompts, forgetPrompts, undoPrompt } from "./prompts.js";
import { $, fillSelect, isPrompting, labels, say, stage, state, tell } from "./session.js";
import { colour, isShown, point } from "./view.js";

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
  return state.cards.length ? askModels() : loadModels(); // which a token may have been missing for
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
