// What explorer.js is made of: numbers, elements and colours, which know nothing of its state.
const WARM = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10],
  [249, 201, 50], [252, 255, 164]];
const SIGNED = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];

// a row is low + step * byte
async function unpack(maps, prefix) {
  const packed = Uint8Array.from(atob(maps.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const width = prefix + maps.keys[0] * maps.keys[1];
  const queries = buffer.byteLength / (maps.heads * (width + 4));
  const rows = maps.heads * queries;
  maps.ready = { width, queries, steps: new Float32Array(buffer, 0, rows), bytes: new Uint8Array(buffer, 4 * rows) };
}

function rowOf(maps, head, query) {
  const { width, queries, steps, bytes } = maps.ready;
  const values = new Float32Array(width);
  const heads = head ? [head - 1] : [...Array(maps.heads).keys()]; // 0 is the mean
  let step = 0;
  for (const each of heads) {
    const at = each * queries + query;
    step += steps[at] / heads.length;
    for (let j = 0; j < width; j++) values[j] += (maps.low + steps[at] * bytes[at * width + j]) / heads.length;
  }
  return { values, step };
}

const cellOf = ([u, v], [rows, columns]) => [Math.min(rows - 1, Math.floor(v * rows)), Math.min(columns - 1, Math.floor(u * columns))];
const peakOf = (values, prefix) => {
  let peak = 1e-9;
  for (let i = prefix; i < values.length; i++) peak = Math.max(peak, values[i]);
  return peak;
};

const number = (value, step) => value.toFixed(Math.max(2, Math.min(8, Math.ceil(-Math.log10(step)) + 1)));
const whereIs = ([row, column]) => `row ${row + 1}, column ${column + 1}`;

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function greyed(image) {
  const canvas = make("canvas", { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [red, green, blue] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(0.3 * red + 0.59 * green + 0.11 * blue, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function colour(stops, t) {
  const at = Math.max(0, Math.min(0.999999, t)) * (stops.length - 1), i = Math.floor(at), part = at - i;
  return stops[i].map((from, k) => from + part * (stops[i + 1][k] - from));
}

const tables = new Map([WARM, SIGNED].map((stops) => [stops, Array.from({ length: 256 }, (_, i) => colour(stops, i / 255))]));
const small = document.createElement("canvas");

function paint(values, prefix, [rows, columns], peak, signed, lift) {
  const table = tables.get(signed ? SIGNED : WARM);
  small.width = columns;
  small.height = rows;
  const pixels = small.getContext("2d").createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    let t = signed ? (values[prefix + i] + 1) / 2 : Math.max(0, values[prefix + i] / peak);
    if (lift && !signed) t = Math.sqrt(t);
    const [red, green, blue] = table[Math.max(0, Math.min(255, Math.round(255 * t)))];
    pixels.data.set([red, green, blue, 255], 4 * i);
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  return small;
}

function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  return context;
}

function frame(context, [row, column], [rows, columns], width, height, colour) {
  const box = [(column * width) / columns, (row * height) / rows, width / columns, height / rows];
  for (const [stroke, thick] of [["#0009", 4.5], [colour, 2.5]]) {
    context.strokeStyle = stroke;
    context.lineWidth = thick;
    context.strokeRect(...box);
  }
}

// the photo in grey, lifted so that its black does not swallow the colours, times the map
function shade(context, photo, map, width, height, strength, trace) {
  const coloured = Math.min(1, 2 * strength), alone = Math.max(0, 2 * strength - 1);
  const smooth = context.imageSmoothingEnabled;
  context.globalAlpha = coloured;
  context.drawImage(photo.grey, 0, 0, width, height);
  context.globalAlpha = coloured * (0.5 + 0.5 * alone);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.globalAlpha = coloured;
  context.globalCompositeOperation = "multiply";
  context.imageSmoothingEnabled = false;
  context.drawImage(map, 0, 0, width, height);
  context.globalCompositeOperation = "lighter"; // what is not looked at keeps a trace of the photo
  context.globalAlpha = trace * coloured * (1 - alone);
  context.drawImage(photo.grey, 0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = smooth;
}
