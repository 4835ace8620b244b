// COCO's compressed run-length encoding: runs down the columns, the first of background.

/** The lengths of the runs that a text of compressed counts stands for. */
export function toRuns(counts) {
  const runs = [];
  let value = 0;
  let shift = 0;
  for (let i = 0; i < counts.length; i++) {
    const part = counts.charCodeAt(i) - 48; // five bits, the lowest first, and a sixth where more follow
    value |= (part & 31) << shift;
    shift += 5;
    if (part & 32) continue;
    if (part & 16 && shift < 32) value |= -1 << shift;
    runs.push(runs.length > 2 ? value + runs.at(-2) : value); // from the fourth on, differences to the last but one
    value = shift = 0;
  }
  return runs;
}

/** Gives the foreground of runs a value in an image that lies along its rows. */
export function paint(pixels, runs, height, width, value) {
  let place = 0;
  for (let i = 0; i < runs.length; i++) {
    if (i % 2 === 0) {
      place += runs[i];
      continue;
    }
    let row = place % height;
    let column = (place - row) / height;
    for (let left = runs[i]; left > 0; left--) {
      pixels[row * width + column] = value;
      if (++row === height) {
        row = 0;
        column++;
      }
    }
    place += runs[i];
  }
}
