// The lists beside the image.

/** An element with properties, attributes of data-*, and children. */
export function make(tag, { dataset = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

/** A number with thin spaces between its thousands. */
export const toCount = (number) => number.toLocaleString("en").replaceAll(",", "\u202f");

const toPercent = (share) =>
  share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

const toScore = (score) => score.toFixed(2);

const areaOf = (segments) => segments.reduce((sum, { area }) => sum + area, 0);

function makeSwatch(colour) {
  const swatch = make("i", { className: "swatch" });
  setColour(swatch, colour);
  return swatch;
}

function setColour(swatch, colour) {
  swatch.style.background = `rgb(${colour.join(" ")})`;
}

/** Segments of one or two answers by class, the largest first: [{name, colour, groups: [segments, segments]}]. */
export function toEntries(answers) {
  const entries = new Map();
  answers.forEach((segments, place) => {
    for (const segment of segments) {
      const { name, colour } = segment;
      if (!entries.has(name)) entries.set(name, { name, colour, groups: answers.map(() => []) });
      entries.get(name).groups[place].push(segment);
    }
  });
  const size = ({ groups }) => Math.max(...groups.map(areaOf));
  return [...entries.values()].sort((one, other) => size(other) - size(one));
}

/**
 * The rows of the class list.
 *
 * show(key, isShown) hears the boxes, light(test) what is pointed at, keep(segments) the buttons; isHidden(key) asks,
 * where keys are class names and segments. `numPixels` are those of the image.
 */
export function renderClasses(list, entries, numPixels, actions) {
  const open = new Set([...list.querySelectorAll("details[open]")].map(({ dataset }) => dataset.name));
  list.replaceChildren(...entries.map((entry) => makeEntry(entry, numPixels, actions, open.has(entry.name))));
}

function makeEntry(entry, numPixels, actions, isOpen) {
  const { name, colour, groups } = entry;
  const isCompared = groups.length > 1;
  const numbers = groups.map((segments, place) => makeNumbers(segments, numPixels, isCompared ? "AB"[place] : ""));
  const row = make("div", { className: "row" }, makeToggle(name, name, actions, makeSwatch(colour)));
  row.append(make("span", { className: "numbers" }, ...numbers));
  if (!isCompared) row.append(makeKeep(name, groups[0], actions));
  highlightOn(row, (segment) => segment.name === name, actions);
  const item = make("li", { dataset: { name, area: areaOf(groups[0]), count: groups[0].length } }, row);
  if (isCompared) item.dataset.areaB = areaOf(groups[1]);
  else if (groups[0].length > 1) item.append(makeParts(entry, numPixels, actions, isOpen));
  return item;
}

function makeParts({ name, groups }, numPixels, actions, isOpen) {
  const rows = groups[0].map((segment, place) => {
    const title = `${name} ${place + 1}`;
    const row = make("li", { className: "row" }, makeToggle(title, segment, actions));
    row.append(make("span", { className: "numbers" }, makeNumbers([segment], numPixels, "")));
    row.append(makeKeep(title, [segment], actions));
    highlightOn(row, (other) => other === segment, actions);
    return row;
  });
  const summary = make("summary", {}, `each of ${rows.length}`);
  return make("details", { dataset: { name }, open: isOpen }, summary, make("ul", {}, ...rows));
}

function makeToggle(title, key, { isHidden, show }, ...before) {
  const box = make("input", { type: "checkbox", checked: !isHidden(key) });
  box.addEventListener("change", () => show(key, box.checked));
  return make("label", { className: "name" }, box, ...before, make("span", {}, title));
}

function makeNumbers(segments, numPixels, letter) {
  const area = areaOf(segments);
  const scores = segments.map(({ score }) => score).filter((score) => score !== null && score !== undefined);
  const details = [`${toCount(area)} px`];
  if (segments.length > 1) details.push(`×${segments.length}`);
  if (scores.length) details.push(`${scores.length > 1 ? "best " : ""}${toScore(Math.max(...scores))}`);
  const share = make("b", {}, segments.length ? toPercent(area / numPixels) : "—");
  const figures = make("span", {}, share, make("small", {}, segments.length ? details.join(", ") : "none"));
  if (letter) figures.prepend(make("i", {}, letter));
  return figures;
}

function makeKeep(title, segments, { keep }) {
  const button = make("button", { type: "button", textContent: "Keep", ariaLabel: `Keep ${title}` });
  button.addEventListener("click", () => keep(segments));
  return button;
}

function highlightOn(row, test, { light }) {
  for (const event of ["pointerenter", "focusin"]) row.addEventListener(event, () => light(test));
  for (const event of ["pointerleave", "focusout"]) row.addEventListener(event, () => light(null));
}

/** The rows of the masks that are kept; rename(mask, name), correct(mask), remove(mask), light(test). */
export function renderKept(list, masks, { rename, correct, remove, light, canCorrect, colourOf }) {
  const rows = masks.map((mask, place) => {
    const swatch = makeSwatch([0, 0, 0]);
    const name = make("input", { type: "text", maxLength: 80 });
    name.ariaLabel = `Class of mask ${place + 1}`;
    name.setAttribute("list", "names");
    const area = make("small", {}, `${toCount(mask.area)} px`);
    const edit = make("button", { type: "button", textContent: "Correct", hidden: !canCorrect });
    edit.addEventListener("click", () => correct(mask));
    const bin = make("button", { type: "button", textContent: "Delete", className: "delete" });
    bin.addEventListener("click", () => {
      remove(mask);
      (list.querySelectorAll(".delete")[Math.min(place, masks.length - 2)] ?? list).focus();
    });
    const row = make("li", { className: "row", dataset: { area: mask.area } }, swatch, name, area, edit, bin);
    const label = () => {
      row.dataset.name = name.value = mask.name;
      edit.ariaLabel = `Correct mask ${place + 1}, ${mask.name}`;
      bin.ariaLabel = `Delete mask ${place + 1}, ${mask.name}`;
      setColour(swatch, colourOf(mask.name));
    };
    label();
    name.addEventListener("change", () => {
      rename(mask, name.value);
      label(); // in place: a new row would lose the focus
    });
    highlightOn(row, (segment) => segment === mask, { light });
    return row;
  });
  list.tabIndex = -1;
  list.replaceChildren(...rows);
}

/** The candidates as radio buttons; choose(place). */
export function renderCandidates(fieldset, masks, chosen, choose) {
  const legend = fieldset.querySelector("legend");
  const options = masks.map(({ score, area }, place) => {
    const radio = make("input", { type: "radio", name: "candidate", checked: place === chosen });
    radio.addEventListener("change", () => choose(place));
    const score_ = score === null || score === undefined ? "kept" : toScore(score);
    return make("label", {}, radio, make("b", {}, score_), make("small", {}, `${toCount(area)} px`));
  });
  fieldset.replaceChildren(legend, ...options);
  fieldset.hidden = !masks.length;
}
