const root = document.querySelector(".explorer");
const data = JSON.parse(document.getElementById("attention-data").textContent);
const KINDS = { attention: "Attention", rollout: "Rollout", prior: "Average query", keys: "Key similarity" };
const FRAME = "#35d0ba";
const kinds = Object.keys(KINDS).filter((kind) => data.models.some((model) => model.views[kind]));
const state = {
  image: 0, kind: kinds[0], layer: 0, head: 0, query: -1, held: false, shared: false, lift: false, strength: 0.55,
  place: [0.5, 0.5], probe: [0.5, 0.5],
};

const viewsOf = (model) => model.views[state.kind] || [];
const deepest = () => Math.max(1, ...data.models.map((model) => viewsOf(model).length));
const mostHeads = () => Math.max(1, ...data.models.flatMap((model) => viewsOf(model).map((view) => view.maps[0].heads)));
const mapsOf = (view) => view.maps[state.image % view.maps.length];
const headOf = (maps) => (maps.heads === 1 ? 0 : Math.min(state.head, maps.heads));

function viewIndex(model) {
  const own = viewsOf(model).length, all = deepest();
  return all === 1 ? 0 : Math.round((state.layer * (own - 1)) / (all - 1));
}

function queryOf(view, maps) {
  if (state.kind === "prior") return 0;
  if (state.query >= 0 && state.query < view.prefix) return state.query;
  const [row, column] = cellOf(state.place, maps.queries);
  return view.prefix + row * maps.queries[1] + column;
}

function choices(title, names, chosen, choose, content = (name) => name) {
  const buttons = names.map((name, i) => make("button", { type: "button", onclick: () => choose(i) }, content(name, i)));
  const set = make("fieldset", {}, make("legend", {}, title), ...buttons);
  set.refresh = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(chosen(i))));
  return set;
}

function slider(title, name, most, words) {
  const shown = make("output");
  const input = make("input", { type: "range", min: 0, step: 1, "aria-label": title,
    oninput: () => change({ [name]: Number(input.value) }) });
  const label = make("label", {}, title, input, shown);
  label.refresh = () => {
    input.max = most();
    input.value = state[name];
    shown.textContent = words();
    input.setAttribute("aria-valuetext", words());
    label.hidden = most() === 0;
  };
  return label;
}

function tick(title, name) {
  const input = make("input", { type: "checkbox", onchange: () => change({ [name]: input.checked }) });
  const label = make("label", { class: "check" }, input, title);
  label.refresh = () => { input.checked = state[name]; };
  return label;
}

const pictures = data.pictures.map((source) => {
  const image = new Image();
  image.onload = () => { image.grey = greyed(image); schedule(); };
  image.src = source;
  return image;
});

const prefixNames = data.models.map((model) => model.prefix).reduce((a, b) => (b.length > a.length ? b : a), []);

const querySelect = make("select", { "aria-label": "Query", onchange: () => change({ query: Number(querySelect.value) }) },
  make("option", { value: -1 }, "the place under the pointer"),
  ...prefixNames.map((name, i) => make("option", { value: i }, name)));
const queryLabel = make("label", { hidden: prefixNames.length === 0 }, "Query", querySelect);
queryLabel.refresh = () => { querySelect.value = state.query; };
const hold = make("button", { type: "button", onclick: () => change({ held: !state.held }) }, "Hold the query");
hold.refresh = () => hold.setAttribute("aria-pressed", String(state.held));
const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme:dark)").matches ? "dark" : "light")) === "dark";
const theme = make("button", { type: "button", class: "theme", onclick: () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  change({});
} });
theme.refresh = () => {
  theme.textContent = isDark() ? "☀" : "☾";
  theme.title = isDark() ? "Light page" : "Dark page";
  theme.setAttribute("aria-label", theme.title);
};
const strength = make("input", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": "From the photo to the map alone",
  oninput: () => change({ strength: Number(strength.value) }) });
strength.value = state.strength;

const images = choices("Image", data.captions, (i) => i === state.image, (i) => change({ image: i }), (caption, i) => {
  const image = make("img", { src: data.pictures[data.models[0].pictures[i]], alt: caption, title: caption });
  image.onload = () => { if (image.naturalWidth <= 64) image.style.imageRendering = "pixelated"; };
  return image;
});
images.querySelectorAll("button").forEach((button) => button.classList.add("thumb"));
const caption = make("span", { class: "hint", style: "margin:0" });
images.append(caption);
images.refresh = ((refresh) => () => { refresh(); caption.textContent = data.captions[state.image]; })(images.refresh);
const hidden = new Set();
const modelChoice = choices("Models", data.models.map((model) => model.name), (i) => !hidden.has(i), (i) => {
  if (!hidden.delete(i) && hidden.size < data.models.length - 1) hidden.add(i);
  change({});
});
modelChoice.hidden = data.models.length === 1;
const kindChoice = choices("Show", kinds.map((kind) => KINDS[kind]), (i) => kinds[i] === state.kind, (i) => choose(kinds[i]));
kindChoice.hidden = kinds.length === 1;
const display = [make("label", {}, "Photo", strength, "map"), tick("lift faint parts", "lift"), tick("one scale for all models", "shared")];
const controls = [
  images, theme, modelChoice, kindChoice,
  slider("Layer", "layer", () => deepest() - 1, () => `${state.layer + 1} of ${deepest()}`),
  slider("Head", "head", () => (mostHeads() > 1 ? mostHeads() : 0), () => (state.head ? `${state.head} of ${mostHeads()}` : "mean")),
  queryLabel, hold,
];
const said = make("p", { role: "status", class: "hint" });

const panels = data.models.map((model, number) => {
  const panel = { model, canvas: make("canvas"), tiles: make("canvas", { class: "tiles", role: "img" }), bar: make("canvas", { height: 1, width: 128 }) };
  panel.of = make("p", { class: "of" });
  panel.why = make("div", { class: "why", hidden: true });
  panel.reading = make("dl", { class: "reading", id: `reading-${number}` });
  panel.peak = make("span");
  panel.floor = make("span");
  panel.scale = make("div", { class: "key" }, panel.floor, panel.bar, panel.peak);
  panel.stage = make("div", {
    class: "stage", tabindex: 0, role: "application", "aria-describedby": `reading-${number}`,
    "aria-label": `Map of ${model.name}: arrow keys move the place, space holds the query`,
    onpointermove: (event) => point(panel, event),
    onpointerdown: (event) => { panel.pointer = event.pointerType; point(panel, event); },
    onclick: () => { if (panel.pointer !== "touch") change({ held: !state.held }); },
    onkeydown: (event) => press(panel, event),
  }, panel.canvas, panel.why);
  panel.tiles.addEventListener("click", (event) => pick(panel, event));
  panel.element = make("div", { class: "panel" }, make("h3", {}, model.name), panel.of, panel.stage,
    panel.scale, panel.reading, panel.tiles);
  return panel;
});

root.replaceChildren(
  make("div", { class: "bar" }, ...controls, make("details", {}, make("summary", {}, "Colours"), make("div", { class: "bar" }, ...display))),
  make("div", { class: "panels" }, ...panels.map((panel) => panel.element)),
  make("p", { class: "hint" }, "Move over an image, or tap it, to see where that place looks. A click holds the query; then the pointer reads numbers. Keys: ",
    ...["L", "H", "I", "Q", "S"].flatMap((letter, i) => [make("kbd", {}, letter), ` ${["layer", "head", "image", "query", "what is shown"][i]}, `]),
    "with ", make("kbd", {}, "Shift"), " backwards; in a map ", make("kbd", {}, "← ↑ → ↓"), " move and ", make("kbd", {}, "Space"), " holds."),
  ...data.models.filter((model) => model.leftOut).map((model) => make("p", { class: "hint" }, `${model.name}: ${model.leftOut}.`)),
  said,
);

function change(values) {
  Object.assign(state, values);
  state.layer = Math.max(0, Math.min(state.layer, deepest() - 1));
  state.head = Math.max(0, Math.min(state.head, mostHeads()));
  [...controls, ...display].forEach((control) => control.refresh && control.refresh());
  schedule();
}

function choose(kind) {
  const before = deepest();
  state.kind = kind;
  change({ layer: before === 1 ? deepest() - 1 : Math.round((state.layer * (deepest() - 1)) / (before - 1)) });
}

const isSigned = () => state.kind === "keys";
const isFixed = () => state.held || state.query >= 0 || state.kind === "prior";

function moveTo(place) {
  state.probe = place;
  if (!isFixed()) state.place = place;
  schedule();
}

function point(panel, event) {
  const box = panel.stage.getBoundingClientRect();
  const inside = (part, whole) => Math.max(0, Math.min(0.999999, part / whole));
  moveTo([inside(event.clientX - box.left, box.width), inside(event.clientY - box.top, box.height)]);
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function press(panel, event) {
  const view = viewsOf(panel.model)[viewIndex(panel.model)];
  if (event.key === " ") change({ held: !state.held });
  else if (ARROWS[event.key] && view) {
    const grid = mapsOf(view).keys;
    const [row, column] = cellOf(state.probe, grid).map((at, i) => Math.max(0, Math.min(grid[i] - 1, at + ARROWS[event.key][i])));
    moveTo([(column + 0.5) / grid[1], (row + 0.5) / grid[0]]);
    panel.speak = true;
  } else return;
  event.preventDefault();
}

const around = (value, by, most) => (value + by + most) % most;
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const by = event.shiftKey ? -1 : 1;
  const key = event.key.toLowerCase();
  if (key === "l") change({ layer: around(state.layer, by, deepest()) });
  else if (key === "h" && mostHeads() > 1) change({ head: around(state.head, by, mostHeads() + 1) });
  else if (key === "i") change({ image: around(state.image, by, data.captions.length) });
  else if (key === "q") change({ query: around(state.query + 1, by, prefixNames.length + 1) - 1 });
  else if (key === "s") choose(kinds[around(kinds.indexOf(state.kind), by, kinds.length)]);
  else if (key === "escape") change({ held: false });
});

function pick(panel, event) {
  const box = panel.tiles.getBoundingClientRect();
  const { left, top, wide, high, rows, columns } = panel.layout;
  const column = Math.floor((event.clientX - box.left - left) / wide), row = Math.floor((event.clientY - box.top - top) / high);
  if (row < 0 || row >= rows || column < 0 || column >= columns) return;
  const own = viewsOf(panel.model).length;
  change({ head: column, layer: own === 1 ? state.layer : Math.round((row * (deepest() - 1)) / (own - 1)) });
}

let waiting = false;

function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; render(); });
}

function render() {
  const shown = [];
  panels.forEach((panel, number) => {
    panel.element.hidden = hidden.has(number);
    if (panel.element.hidden) return;
    const view = viewsOf(panel.model)[viewIndex(panel.model)];
    const entry = { panel, view };
    if (view) {
      entry.maps = mapsOf(view);
      if (!entry.maps.ready) {
        entry.maps.loading = entry.maps.loading || unpack(entry.maps, view.prefix).then(schedule, (error) => {
          panel.why.textContent = `This browser cannot read the maps (${error.message}).`;
          panel.why.hidden = false;
        });
      } else {
        entry.query = queryOf(view, entry.maps);
        entry.row = rowOf(entry.maps, headOf(entry.maps), entry.query);
        entry.peak = peakOf(entry.row.values, view.prefix);
      }
    }
    shown.push(entry);
  });
  const common = Math.max(...shown.map((entry) => entry.peak || 0));
  for (const entry of shown) {
    if (state.shared && entry.peak) entry.peak = common;
    drawPanel(entry);
    drawTiles(entry.panel);
  }
}

function drawPanel({ panel, view, maps, query, row, peak }) {
  const { model } = panel;
  const photo = pictures[model.pictures[state.image]];
  if (!photo.grey) return;
  const width = panel.stage.clientWidth, height = (width * photo.naturalHeight) / photo.naturalWidth;
  const context = fit(panel.canvas, width, height);
  const smooth = photo.naturalWidth > 64;
  context.imageSmoothingEnabled = smooth;
  context.drawImage(photo, 0, 0, width, height);
  panel.scale.hidden = panel.reading.hidden = !view;
  if (!view) {
    panel.why.textContent = model.missing[state.kind] || "Nothing of this kind.";
    panel.why.hidden = false;
    panel.of.textContent = "";
    return;
  }
  if (!row) return;
  panel.why.hidden = true;
  shade(context, photo, paint(row.values, view.prefix, maps.keys, peak, isSigned(), state.lift), width, height, state.strength, isSigned() ? 0 : 0.22);
  const isPlace = query >= view.prefix && state.kind !== "prior";
  const from = isPlace ? cellOf(state.place, maps.queries) : null, to = cellOf(state.probe, maps.keys);
  if (isFixed()) frame(context, to, maps.keys, width, height, "#fff");
  if (from) frame(context, from, maps.queries, width, height, FRAME);
  const head = headOf(maps);
  panel.of.textContent = [view.layer, maps.heads === 1 ? "" : head ? `head ${head} of ${maps.heads}` : `mean of ${maps.heads} heads`].filter(Boolean).join(" · ");
  drawBar(panel, peak, row.step);
  read(panel, view, maps, row, from, to, query);
}

function drawBar(panel, peak, step) {
  const signed = isSigned(), context = panel.bar.getContext("2d");
  for (let i = 0; i < 128; i++) {
    const t = state.lift && !signed ? Math.sqrt(i / 127) : i / 127;
    context.fillStyle = `rgb(${colour(signed ? SIGNED : WARM, t)})`;
    context.fillRect(i, 0, 1, 1);
  }
  panel.floor.textContent = signed ? "-1" : "0";
  panel.peak.textContent = signed ? "1" : number(peak, step);
}

function read(panel, view, maps, { values, step }, from, to, query) {
  const columns = maps.keys[1], at = view.prefix + to[0] * columns + to[1], uniform = values.length;
  let best = view.prefix;
  for (let j = view.prefix; j < values.length; j++) if (values[j] > values[best]) best = j;
  const times = (value) => (isSigned() ? "" : ` (${(value * uniform).toFixed(value * uniform < 10 ? 2 : 0)} × uniform)`);
  const strong = (value) => make("b", {}, number(value, step));
  const asker = state.kind === "prior" ? "the mean of all" : from ? whereIs(from) : panel.model.prefix[query];
  const target = from && !isFixed() ? "itself" : whereIs(to);
  const lines = [["Query", asker], [`To ${target}`, [strong(values[at]), times(values[at])]]];
  if (!isSigned()) lines.push(["Most", [strong(values[best]), ` at ${whereIs([Math.floor((best - view.prefix) / columns), (best - view.prefix) % columns])}`]]);
  if (view.prefix) {
    const words = panel.model.prefix.slice(0, view.prefix).flatMap((name, i) => [i ? ", " : "", `${name} `, strong(values[i])]);
    lines.push(["To", words]);
  }
  panel.reading.replaceChildren(...lines.flatMap(([term, words]) => [make("dt", {}, term), make("dd", {}, ...[words].flat())]));
  Object.assign(panel.stage.dataset, { layer: view.layer, head: headOf(maps), query, key: at, value: values[at], step });
  if (panel.speak) {
    said.textContent = `${panel.model.name}: ${asker} to ${target}, ${number(values[at], step)}`;
    panel.speak = false;
  }
}

function drawTiles(panel) {
  const views = viewsOf(panel.model);
  const ready = views.map((view) => [view, mapsOf(view)]);
  const heads = Math.max(0, ...ready.map(([, maps]) => maps.heads));
  panel.tiles.hidden = views.length * heads < 2;
  if (panel.tiles.hidden) return;
  const columns = heads > 1 ? heads + 1 : 1, left = 22, top = heads > 1 ? 16 : 0;
  const width = panel.stage.clientWidth, wide = Math.min(64, (width - left) / columns);
  const [gridRows, gridColumns] = ready[0][1].keys;
  const high = Math.min(72, ((wide - 3) * gridRows) / gridColumns + 3);
  panel.layout = { left, top, wide, high, rows: views.length, columns };
  panel.tiles.style.height = `${top + views.length * high}px`;
  const context = fit(panel.tiles, width, top + views.length * high);
  context.clearRect(0, 0, width, top + views.length * high);
  context.fillStyle = getComputedStyle(panel.of).color;
  context.font = "11px system-ui,sans-serif";
  const every = Math.ceil(18 / wide); // numbers that would touch are left out
  if (heads > 1) for (let head = 0; head < columns; head += head ? every : 1) {
    context.fillText(head || (wide > 32 ? "mean" : "m"), left + head * wide + 1, 10);
  }
  const chosen = viewIndex(panel.model);
  ready.forEach(([view, maps], i) => {
    context.fillText(i + 1, 0, top + i * high + high / 2 + 3);
    if (!maps.ready) {
      maps.loading = maps.loading || unpack(maps, view.prefix).then(schedule, () => {});
      return;
    }
    for (let head = 0; head < (maps.heads > 1 ? maps.heads + 1 : 1); head++) {
      const { values } = rowOf(maps, head, queryOf(view, maps));
      const [x, y] = [left + head * wide, top + i * high];
      context.drawImage(paint(values, view.prefix, maps.keys, peakOf(values, view.prefix), isSigned(), state.lift), x, y, wide - 3, high - 3);
      if (i === chosen && head === headOf(maps)) {
        context.strokeStyle = FRAME;
        context.lineWidth = 2;
        context.strokeRect(x - 0.5, y - 0.5, wide - 2, high - 2);
      }
    }
  });
  panel.tiles.setAttribute("aria-label", `All ${views.length} layers and ${heads} heads of ${panel.model.name} for this query; the sliders choose the same`);
}

new ResizeObserver(schedule).observe(root);
matchMedia("(prefers-color-scheme:dark)").addEventListener("change", () => { theme.refresh(); schedule(); });
change({ layer: deepest() - 1 });
