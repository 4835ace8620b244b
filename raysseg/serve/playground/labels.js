// Class names, their ids and colours, over all images of a session.

import { hueColour } from "./layers.js";

const RESERVED = 255; // means "not labelled" in most class lists

/** What knows the classes: those of the model that is chosen for it, and the new ones that were typed. */
export function createLabels(state) {
  const newNames = []; // in the order that they came in, so that ids stay
  const select = document.getElementById("class-list");
  const baseClasses = () => state.cards.find(({ name }) => name === select.value)?.classes ?? [];
  const knownAs = (name) => state.cards.flatMap(({ classes }) => classes).find((known) => known.name === name);
  const allKept = () => state.images.flatMap(({ kept }) => kept);

  function toNewId(base, place) {
    const first = Math.max(0, ...base.map(({ id }) => id)) + 1;
    return first <= RESERVED && first + place >= RESERVED ? first + place + 1 : first + place;
  }

  function categories() {
    const base = baseClasses();
    const used = new Set(allKept().map(({ name }) => name));
    for (const name of used) {
      if (!newNames.includes(name) && !base.some((known) => known.name === name)) newNames.push(name);
    }
    const fresh = newNames
      .map((name, place) => {
        return { colour: hueColour(place), isthing: true, ...knownAs(name), name, id: toNewId(base, place) };
      })
      .filter(({ name }) => used.has(name) && !base.some((known) => known.name === name));
    return [...base, ...fresh];
  }

  /** A class's colour: the chosen list's, so that two models agree, else the card's own. */
  function colourOf(name, card = null) {
    const known = [...categories(), ...(card?.classes ?? [])].find((found) => found.name === name) ?? knownAs(name);
    return known?.colour ?? hueColour(newNames.length);
  }

  /** A mask under a class name; what it was found as stays as it is. */
  const toKept = ({ score, bbox, area, segmentation }, name) => ({ name, score, bbox, area, segmentation });

  return { categories, colourOf, toKept, hasKept: () => allKept().length > 0, numKept: () => allKept().length };
}
