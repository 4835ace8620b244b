// What leaves the page: COCO JSON, masks as PNG, the class list.

import { toIndex } from "./layers.js";

const UNLABELLED = 255; // the ignore index of class lists that name none
const BACKGROUND = /^(background|void|unlabel+ed|nothing)$/i;

/** COCO instances of images, [{name, height, width, kept}]; categories is [{id, name, colour, isthing}]. */
export function toCoco(images, categories) {
  const idOf = new Map(categories.map(({ id, name }) => [name, id]));
  const annotations = images.flatMap((image, place) =>
    image.kept.map(({ name, area, bbox, segmentation: { size, counts } }) => ({
      image_id: place + 1,
      category_id: idOf.get(name),
      segmentation: { size, counts },
      area,
      bbox,
      iscrowd: 0,
    })),
  );
  return {
    images: images.map(({ name, height, width }, place) => ({ id: place + 1, file_name: name, height, width })),
    annotations: annotations.map((annotation, place) => ({ id: place + 1, ...annotation })),
    categories: categories.map(({ colour, ...category }) => ({ ...toPlain(category), color: colour })),
  };
}

/** The file that `classes` of a job may name. */
export function toClassList(categories) {
  const classes = categories.map(({ colour, ...category }) => ({ ...toPlain(category), colour }));
  return { classes, ignore_index: categories.some(({ id }) => id === 0) ? UNLABELLED : 0 };
}

const toPlain = ({ id, name, isthing }) => ({ id, name, isthing: Number(isthing) });

/** The id of pixels without a mask: 0, unless 0 means a class that is there to be seen. */
export function voidId(categories) {
  const zero = categories.find(({ id }) => id === 0);
  return zero && !BACKGROUND.test(zero.name) ? UNLABELLED : 0;
}

/** A grey PNG of class ids, of 8 bits a pixel, or 16 where ids need them; a canvas would make RGBA of it. */
export async function toMaskPng(image, categories) {
  const { height, width, kept } = image;
  const idOf = new Map(categories.map(({ id, name }) => [name, id]));
  const ids = [voidId(categories), ...kept.map(({ name }) => idOf.get(name))];
  const numBytes = Math.max(...ids) > 255 ? 2 : 1;
  const stride = 1 + width * numBytes; // each row begins with its filter: 0, none
  const rows = new Uint8Array(height * stride);
  toIndex(kept, height, width).forEach((value, place) => {
    const at = Math.floor(place / width) * stride + 1 + (place % width) * numBytes;
    if (numBytes === 2) rows[at] = ids[value] >> 8;
    rows[at + numBytes - 1] = ids[value] & 255;
  });
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8 * numBytes); // colour type, compression, filter and interlace follow: all 0
  const signature = Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10);
  const parts = [chunk("IHDR", new Uint8Array(header.buffer)), chunk("IDAT", await deflate(rows)), chunk("IEND", [])];
  return new Blob([signature, ...parts], { type: "image/png" });
}

async function deflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(kind, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, number) => {
  for (let bit = 0; bit < 8; bit++) number = number & 1 ? 0xedb88320 ^ (number >>> 1) : number >>> 1;
  return number;
});

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** Hands the user a file. */
export function download(name, content) {
  const toJson = () => new Blob([JSON.stringify(content)], { type: "application/json" });
  const blob = content instanceof Blob ? content : toJson();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
