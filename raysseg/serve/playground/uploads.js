// Requests about an image, timed, and repeated where the server has forgotten it.

import { api, say } from "./session.js";

/** Awaits work, and says how long it took. */
export async function timed(name, work) {
  say(`${name} is looking …`);
  const start = performance.now();
  const result = await work();
  say(`${name} answered in ${((performance.now() - start) / 1000).toFixed(1)} s.`);
  return result;
}

/** Raises where server and browser don't agree on an image, whose masks would not fit. */
export function checkSize({ height, width }, image) {
  if (height === image.height && width === image.width) return;
  const sizes = `${width} × ${height}, this browser as ${image.width} × ${image.height}`;
  throw new Error(`The server sees ${image.name} as ${sizes}; save it anew, turned upright.`);
}

/** The image's name at a prompt model; it is sent once, until the server has forgotten it. */
export function upload(image, model) {
  image.uploads[model] ??= timed(model, () => api.upload(model, image.file)).catch((error) => {
    delete image.uploads[model];
    throw error;
  });
  return image.uploads[model];
}

/** Calls work(hash) on an uploaded image, and once more where the server does not know it any more. */
export async function onUploaded(image, model, signal, work) {
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
