// The image on its canvas: what is drawn over it, and what mouse, finger and keys say about it.

const DRAG = 5; // CSS pixels from which on a press is a box and no point
const STEP = 10; // CSS pixels that an arrow key moves the cursor by
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Fires `point` {x, y, label}, `box` [x0, y0, x1, y1] and `hover` {x, y} or null, all in the image's pixels. */
export class Stage extends EventTarget {
  constructor(root) {
    super();
    this.root = root;
    this.panes = [...root.querySelectorAll(".pane")];
    this.canvases = this.panes.map((pane) => pane.querySelector("canvas"));
    this.divider = root.querySelector("#divider");
    this.image = null;
    this.scene = { panes: [[]], isSplit: false, opacity: 0.55, prompts: [] };
    this.split = 0.5;
    this.cursor = null; // shown while keys move it
    this.corner = null; // where a box begins
    this.press = null;
    this.isPrompting = this.isNegative = false;
    for (const canvas of this.canvases) this.#listen(canvas);
    this.#listenToDivider();
    new ResizeObserver(() => this.redraw()).observe(root);
  }

  /** Takes another image, {bitmap, height, width}. */
  show(image) {
    this.image = image;
    this.cursor = this.corner = this.press = null;
    this.root.style.setProperty("--aspect", image.width / image.height);
    for (const canvas of this.canvases) canvas.ariaLabel = image.name;
  }

  /** Draws panes of layers [{surface, from, to}], the fractions of the width that each covers, and the prompts. */
  draw(scene) {
    this.scene = { ...this.scene, ...scene };
    this.panes.forEach((pane, place) => {
      pane.hidden = place >= this.scene.panes.length;
    });
    this.root.classList.toggle("beside", this.scene.panes.length > 1);
    this.root.classList.toggle("prompting", this.isPrompting);
    this.divider.hidden = !this.scene.isSplit;
    this.redraw();
  }

  redraw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      if (this.image) this.scene.panes.forEach((layers, place) => this.#paint(this.canvases[place], layers));
    });
  }

  cancelBox() {
    this.corner = this.press = null;
    this.redraw();
  }

  #paint(canvas, layers) {
    const { width, height } = canvas.getBoundingClientRect();
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(this.image.bitmap, 0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false; // a label is no mixture of its neighbours
    context.globalAlpha = this.scene.opacity;
    for (const layer of layers) if (layer.surface) this.#paintLayer(context, layer);
    context.globalAlpha = 1;
    this.#paintMarks(context, canvas.width / this.image.width);
    const percent = `${this.split * 100}%`;
    this.divider.style.left = percent;
    this.divider.setAttribute("aria-valuenow", Math.round(this.split * 100));
  }

  #paintLayer(context, { surface, from, to }) {
    const { width, height } = context.canvas;
    const edges = { start: 0, split: this.split, end: 1 };
    const left = Math.round(edges[from] * width);
    context.save();
    context.beginPath();
    context.rect(left, 0, Math.round(edges[to] * width) - left, height);
    context.clip();
    context.drawImage(surface, 0, 0, width, height);
    context.restore();
  }

  #paintMarks(context, scale) {
    for (const prompt of this.scene.prompts) {
      if (prompt.box) paintBox(context, prompt.box, scale);
    }
    const end = this.press?.at ?? this.cursor;
    const start = this.press?.isDrag ? this.press : this.corner;
    if (start && end) paintBox(context, toBox(start, end), scale);
    for (const prompt of this.scene.prompts) {
      if (!prompt.box) paintPoint(context, prompt, scale);
    }
    if (this.cursor) paintCursor(context, this.cursor, scale);
  }

  #toImage(canvas, { clientX, clientY }) {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    const x = Math.floor(((clientX - left) / width) * this.image.width);
    const y = Math.floor(((clientY - top) / height) * this.image.height);
    return this.#within({ x, y });
  }

  #within({ x, y }) {
    const { width, height } = this.image;
    return { x: Math.max(0, Math.min(x, width - 1)), y: Math.max(0, Math.min(y, height - 1)) };
  }

  #fire(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  #listen(canvas) {
    canvas.addEventListener("contextmenu", (event) => this.isPrompting && event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => this.#pressed(canvas, event));
    canvas.addEventListener("pointermove", (event) => this.#moved(canvas, event));
    canvas.addEventListener("pointerup", (event) => this.#released(canvas, event));
    canvas.addEventListener("pointercancel", () => this.cancelBox());
    canvas.addEventListener("pointerleave", () => this.#fire("hover", null));
    canvas.addEventListener("keydown", (event) => this.#typed(canvas, event));
    canvas.addEventListener("blur", () => {
      this.cursor = this.corner = null;
      this.redraw();
    });
  }

  #pressed(canvas, event) {
    if (!this.isPrompting || !event.isPrimary || event.button === 1) return;
    canvas.setPointerCapture(event.pointerId);
    const { clientX, clientY } = event;
    this.press = { ...this.#toImage(canvas, event), clientX, clientY, at: null, isDrag: false };
  }

  #moved(canvas, event) {
    if (!this.image) return;
    const at = this.#toImage(canvas, event);
    this.cursor = this.corner = null;
    if (this.press) {
      const { clientX, clientY } = this.press;
      this.press.isDrag ||= Math.hypot(event.clientX - clientX, event.clientY - clientY) > DRAG;
      this.press.at = at;
      this.redraw();
    }
    this.#fire("hover", at);
  }

  #released(canvas, event) {
    const { press } = this;
    if (!press) return;
    this.press = null;
    if (press.isDrag) this.#fireBox(press, this.#toImage(canvas, event));
    else this.#fire("point", { x: press.x, y: press.y, label: this.#label(event) });
  }

  #label(event) {
    return event.shiftKey || event.button === 2 || this.isNegative ? 0 : 1;
  }

  #fireBox(start, end) {
    this.corner = null;
    this.redraw();
    const box = toBox(start, end);
    if (box[0] < box[2] && box[1] < box[3]) this.#fire("box", box);
  }

  #typed(canvas, event) {
    if (!this.image || event.ctrlKey || event.metaKey || event.altKey) return;
    const cursor = this.cursor ?? { x: this.image.width >> 1, y: this.image.height >> 1 };
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (key in ARROWS) this.#moveCursor(canvas, cursor, ARROWS[key], event.shiftKey);
    else if (!this.isPrompting) return;
    else if (key === "Enter") this.#fire("point", { ...cursor, label: this.isNegative ? 0 : 1 });
    else if (key === "Backspace" || key === "n") this.#fire("point", { ...cursor, label: 0 });
    else if (key === "b" && this.corner) this.#fireBox(this.corner, cursor);
    else if (key === "b") this.corner = cursor;
    else return;
    this.cursor ??= cursor;
    event.preventDefault();
    this.redraw();
  }

  #moveCursor(canvas, { x, y }, [right, down], isFine) {
    const step = isFine ? 1 : Math.max(1, Math.round((STEP * this.image.width) / canvas.clientWidth));
    this.cursor = this.#within({ x: x + right * step, y: y + down * step });
    this.#fire("hover", this.cursor);
  }

  #listenToDivider() {
    const moveTo = (split) => {
      this.split = Math.max(0, Math.min(1, split));
      this.redraw();
    };
    this.divider.addEventListener("pointerdown", (event) => this.divider.setPointerCapture(event.pointerId));
    this.divider.addEventListener("pointermove", (event) => {
      if (!this.divider.hasPointerCapture(event.pointerId)) return;
      const { left, width } = this.canvases[0].getBoundingClientRect();
      moveTo((event.clientX - left) / width);
    });
    this.divider.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 1 / (this.image?.width ?? 100) : 0.05;
      const [less, more] = [this.split - step, this.split + step];
      const targets = { ArrowLeft: less, ArrowDown: less, ArrowRight: more, ArrowUp: more, Home: 0, End: 1 };
      const target = targets[event.key];
      if (target === undefined) return;
      event.preventDefault();
      moveTo(target);
    });
  }
}

/** The box between two pixels, both within it: x0, y0, x1, y1. */
function toBox(one, other) {
  const xs = [one.x, other.x].sort((a, b) => a - b);
  const ys = [one.y, other.y].sort((a, b) => a - b);
  return [xs[0], ys[0], xs[1] + 1, ys[1] + 1];
}

// Everything is drawn twice, dark and light, so that it shows on any image.
function strokeTwice(context, path) {
  for (const [colour, width] of [["rgb(0 0 0 / .75)", 4], ["#fff", 1.75]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * devicePixelRatio;
    context.stroke(path);
  }
}

function paintBox(context, [x0, y0, x1, y1], scale) {
  const path = new Path2D();
  path.rect(x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
  strokeTwice(context, path);
}

function paintPoint(context, { x, y, label }, scale) {
  const [left, top] = [(x + 0.5) * scale, (y + 0.5) * scale];
  const radius = 8 * devicePixelRatio;
  context.beginPath();
  context.arc(left, top, radius, 0, 2 * Math.PI);
  context.fillStyle = label ? "#14713a" : "#b3261e";
  context.fill();
  context.strokeStyle = "#fff";
  context.lineWidth = 2 * devicePixelRatio;
  context.stroke();
  const sign = new Path2D(`M${left - radius / 2} ${top}h${radius}`);
  if (label) sign.addPath(new Path2D(`M${left} ${top - radius / 2}v${radius}`));
  context.stroke(sign);
}

function paintCursor(context, { x, y }, scale) {
  const [left, top] = [(x + 0.5) * scale, (y + 0.5) * scale];
  const [gap, arm] = [4 * devicePixelRatio, 14 * devicePixelRatio];
  const path = new Path2D();
  for (const [right, down] of Object.values(ARROWS)) {
    path.moveTo(left + right * gap, top + down * gap);
    path.lineTo(left + right * arm, top + down * arm);
  }
  strokeTwice(context, path);
}
