// The server's HTTP interface: a token where it wants one, patience where it is busy, its own words where it refuses.

const TRIES = 5;
const TOKEN = "raysseg-token";

class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Runs one piece of work at a time: what is started aborts what went before. */
export function latest() {
  let controller = null;
  return (work) => {
    controller?.abort();
    controller = new AbortController();
    return work?.(controller.signal);
  };
}

/**
 * Sends requests.
 *
 * askToken(isWrong) resolves to a token, or to null where the user has none; note(text) hears why it takes longer.
 */
export function createApi({ askToken, note }) {
  let asking = null; // one question for all requests that are refused meanwhile

  async function send(path, options = {}) {
    for (let number = 1; ; number++) {
      const token = sessionStorage.getItem(TOKEN);
      const response = await attempt(path, options, token);
      if (response.ok) return response.json();
      if (response.status === 401) {
        if (sessionStorage.getItem(TOKEN) === token && !(await renewToken(token))) throw await toError(response);
        options.signal?.throwIfAborted();
        continue;
      }
      if (response.status !== 503 || number >= TRIES) throw await toError(response);
      const seconds = Math.min(Number(response.headers.get("Retry-After")) || 1, 30);
      note(`The server is busy, retrying in ${seconds} s (${number} of ${TRIES - 1}).`);
      await sleep(seconds * 1000, options.signal);
    }
  }

  async function renewToken(old) {
    asking ??= askToken(old !== null).finally(() => {
      asking = null;
    });
    const token = await asking;
    if (token) sessionStorage.setItem(TOKEN, token);
    return Boolean(token);
  }

  const post = (path, body, signal) => send(path, { method: "POST", body, signal });
  const headers = { "Content-Type": "application/json" };
  const postJson = (path, value, signal) => send(path, { method: "POST", body: JSON.stringify(value), headers, signal });
  const at = (model, verb) => `v1/models/${encodeURIComponent(model)}/${verb}`;

  return {
    models: async () => (await send("v1/models")).models,
    segment: (model, file, signal) => post(at(model, "segment"), toForm(file), signal),
    upload: async (model, file) => (await post(at(model, "images"), toForm(file))).image,
    prompt: (model, body, signal) => postJson(at(model, "prompt"), body, signal),
    everything: (model, image, signal) => postJson(at(model, "everything"), { image }, signal),
  };
}

async function attempt(path, options, token) {
  const headers = { Accept: "application/json", ...options.headers };
  if (token !== null) headers.Authorization = `Bearer ${token}`;
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server can’t be reached; see whether it is running, then try again.");
  }
}

async function toError(response) {
  const problem = await response.json().catch(() => ({}));
  const detail = typeof problem.detail === "string" ? problem.detail : problem.title;
  return new ApiError(response.status, detail || `The server answered ${response.status} and did not say why.`);
}

function toForm(file) {
  const form = new FormData();
  form.append("image", file, file.name);
  return form;
}

function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
