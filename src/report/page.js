"use strict";
// Class names and file names are untrusted: they enter the page through textContent and encodeURIComponent only.
// An example is identified by its position on the page, 0 to shown - 1; data.index has its index in the training set.

const byId = (id) => document.getElementById(id);
const page = JSON.parse(byId("data").textContent);
const figures = JSON.parse(byId("plots").textContent);

function decode(id) {
  const text = atob(byId(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes.buffer;
}

const KINDS = { index: Uint32Array, label: Uint16Array, prediction: Int16Array, confidence: Float32Array,
  correct: Uint8Array, kept: Uint8Array, planted: Uint8Array, losses: Uint8Array, probabilities: Uint8Array };
const data = {};
for (const name of Object.keys(KINDS)) if (byId("array-" + name)) data[name] = new KINDS[name](decode("array-" + name));
const scores = page.scores.map((_, k) => new Float32Array(decode("array-score" + k)));
const everyone = Uint32Array.from({ length: page.shown }, (_, i) => i);

for (const name of ["prediction", "correct", "kept", "planted"])
  if (!data[name]) document.querySelectorAll(".if-" + name).forEach((node) => node.remove());

// ------------------------------------------------------------------------------------------------ small helpers

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const number = (value) => (Number.isFinite(value) ? String(+value.toPrecision(4)) : "–");
const count = (value) => value.toLocaleString("en-US");
const className = (label) => page.classes[label] ?? "–";
const fileName = (at) => (page.files ? page.files[at] : "");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// plotly reads text as a kind of HTML
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");

function stored(key, value) { // the file system may have no storage
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { /* the page works without */ }
  return null;
}

function save(name, rows) {
  const cell = (value) => (/[",\n\r]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
  const text = rows.map((row) => row.map(cell).join(",") + "\n").join("");
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveExamples(name, positions, which) {
  const rows = [["index", "file", "class", ...which.map((k) => page.scores[k].mode)]];
  for (const at of positions)
    rows.push([data.index[at], fileName(at), className(data.label[at]),
      ...which.map((k) => (Number.isNaN(scores[k][at]) ? "" : +scores[k][at].toPrecision(8)))]);
  save(name, rows);
}

// ------------------------------------------------------------------------------------------------ images

const sheets = [];
function sheet(k) {
  sheets[k] ??= (async () => {
    const image = new Image();
    image.src = "data:image/jpeg;base64," + byId("sheet-" + k).textContent;
    await image.decode();
    return image;
  })();
  return sheets[k];
}

async function paint(canvas, at) {
  const { side, cell, columns } = page.thumbnail;
  const within = at % (columns * columns);
  canvas.dataset.at = at;
  const image = await sheet(Math.floor(at / (columns * columns)));
  if (canvas.dataset.at !== String(at)) return; // it shows another example by now
  canvas.width = canvas.height = side;
  canvas.getContext("2d").drawImage(image, (within % columns) * cell, Math.floor(within / columns) * cell, side, side, 0, 0, side, side);
  canvas.dataset.painted = at;
}

const visible = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    visible.unobserve(target);
    if (target.draw) target.draw();
    else paint(target, +target.dataset.at);
  }
}, { rootMargin: "200px" });

function press(event, act) { // what a click does, by keyboard
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  act();
}

function label(at) {
  return `${data.index[at]}, ${className(data.label[at])}${page.files ? ", " + fileName(at) : ""}`;
}

document.querySelectorAll("canvas.thumb").forEach((canvas) => prepare(canvas, +canvas.dataset.at));
function prepare(canvas, at) {
  canvas.title = label(at);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "button");
  canvas.setAttribute("aria-label", canvas.title);
  canvas.addEventListener("click", () => open(at));
  canvas.addEventListener("keydown", (event) => press(event, () => open(at)));
  visible.observe(canvas);
}

addEventListener("beforeprint", () => {
  theme("light");
  for (const node of document.querySelectorAll(".thumb, .plot")) node.draw ? node.draw() : node.dataset.at && paint(node, +node.dataset.at);
});

// ------------------------------------------------------------------------------------------------ order and ranks

const ranks = [], orders = [];
// Among all examples, from 1, the most atypical; equal scores share a rank; 0 without a score.
function rank(k, at) {
  if (!ranks[k]) {
    const bytes = decode("array-rank" + k);
    ranks[k] = new (bytes.byteLength === 2 * page.shown ? Uint16Array : Uint32Array)(bytes);
  }
  return ranks[k][at];
}

// Most atypical first; ties by index; examples without a score last.
function order(k) {
  const key = (at) => rank(k, at) || Infinity;
  orders[k] ??= everyone.slice().sort((a, b) => (rank(k, a) === rank(k, b) ? a - b : key(a) - key(b)));
  return orders[k];
}

// ------------------------------------------------------------------------------------------------ gallery

const form = byId("filters");
const fields = form.elements;
let view = everyone, first = 0, subset = null, subsetName = "";

function options(select, entries) {
  for (const [value, text, title] of entries) select.append(element("option", { value, textContent: text, title: title ?? "" }));
}
const scoreOptions = page.scores.map((score, k) => [k, score.title, score.meaning]);
const classOptions = page.classes.map((name, k) => [k, name]);
options(fields.namedItem("score"), scoreOptions);
options(fields.namedItem("label"), classOptions);
if (data.prediction) options(fields.namedItem("prediction"), classOptions);

const field = (name) => fields.namedItem(name)?.value ?? "";
const chosenScore = () => +field("score");

function matching() {
  const k = chosenScore(), values = scores[k];
  const equal = ["label", "prediction", "correct", "kept", "planted"].filter((name) => field(name) !== "").map((name) => [data[name], +field(name)]);
  const low = field("low") === "" ? -Infinity : +field("low"), high = field("high") === "" ? Infinity : +field("high");
  const query = field("query").trim().toLowerCase();
  const indices = /^[\d\s,]+$/.test(query) ? new Set(query.split(/[\s,]+/).filter(Boolean).map(Number)) : null;
  const bounded = low > -Infinity || high < Infinity;
  let sorted = field("order") === "index" ? everyone : order(k);
  if (field("order") === "low") {
    const scored = sorted.filter((at) => !Number.isNaN(values[at]));
    sorted = scored.reverse();
  }
  return sorted.filter((at) =>
    (!subset || subset.has(at)) &&
    equal.every(([values, wanted]) => values[at] === wanted) &&
    (!bounded || (values[at] >= low && values[at] <= high)) &&
    (!query || (indices && indices.has(data.index[at])) || (page.files && fileName(at).toLowerCase().includes(query))));
}

function update() {
  view = matching();
  first = 0;
  delete byId("tiles").dataset.pending;
  const chip = byId("subset");
  chip.hidden = !subset;
  if (subset) chip.textContent = `× ${subsetName} (${count(subset.size)})`;
  byId("count").textContent = `${count(view.length)} of ${count(page.shown)} examples${page.shown < page.total ? " on this page" : ""}`;
  byId("order").textContent = `${page.scores[chosenScore()].title}, ${fields.namedItem("order").selectedOptions[0].text.toLowerCase()}`;
  render();
}

function tile(at) {
  const k = chosenScore(), canvas = element("canvas", { className: "image" });
  const node = element("button", { className: "tile", type: "button" }, canvas);
  node.dataset.index = data.index[at];
  node.classList.toggle("marked", marked.has(data.index[at]));
  const wrong = data.prediction && data.prediction[at] >= 0 && data.prediction[at] !== data.label[at];
  const name = element("bdi", { textContent: className(data.label[at]) });
  const line = element("span", { className: "name" }, name);
  line.title = `Label: ${className(data.label[at])}`;
  if (wrong) {
    line.append(" → ", element("bdi", { className: "wrong", textContent: className(data.prediction[at]) }));
    line.title += `. Predicted: ${className(data.prediction[at])}, by ${page.predictor}`;
  }
  const value = element("span", { textContent: number(scores[k][at]) });
  value.title = `${page.scores[k].title}: ${rank(k, at) ? `rank ${count(rank(k, at))} of ${count(page.scores[k].scored)}, 1 is the most atypical` : "no score"}`;
  const index = element("span", { textContent: data.index[at], title: page.files ? fileName(at) : "Index in the training set" });
  node.append(line, element("span", { className: "sub" }, index, value));
  node.addEventListener("click", () => open(at));
  paint(canvas, at);
  return node;
}

function render() {
  const size = +field("size"), pages = Math.max(1, Math.ceil(view.length / size));
  byId("tiles").replaceChildren(...Array.from(view.slice(first, first + size), tile));
  byId("page").textContent = `${first / size + 1} / ${count(pages)}`;
  byId("previous").disabled = first === 0;
  byId("next").disabled = first + size >= view.length;
}

function turn(step) {
  const size = +field("size"), target = first + step * size;
  if (target < 0 || target >= view.length) return;
  first = target;
  render();
}

// Shows what fields have these values, or these examples; keeps score, order and size of the page.
function filter(values, positions = null, name = "") {
  for (const node of fields) if (!["score", "order", "size"].includes(node.name)) node.value = values[node.name] ?? "";
  subset = positions && new Set(positions);
  subsetName = name;
  update();
}

function show(positions, name) {
  filter({}, positions, name);
  byId("gallery").scrollIntoView();
}

let timer = 0;
form.addEventListener("input", (event) => {
  if (event.target.name === "score") for (const name of ["low", "high"]) fields.namedItem(name).value = ""; // of another score
  byId("tiles").dataset.pending = "";
  clearTimeout(timer);
  timer = setTimeout(update, 120);
});
form.addEventListener("submit", (event) => event.preventDefault());
fields.namedItem("size").addEventListener("input", update);
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("subset").addEventListener("click", () => { subset = null; update(); });
byId("reset").addEventListener("click", () => filter({}));
byId("download").addEventListener("click", () => saveExamples(`${page.name}_${page.scores[chosenScore()].mode}.csv`, view, [chosenScore()]));
document.querySelectorAll("[data-show]").forEach((button) => button.addEventListener("click", () =>
  show(button.dataset.show.trim().split(" ").map(Number), (button.closest("li")?.firstChild ?? button.closest("section").querySelector("h2")).textContent.trim())));
document.querySelectorAll("[data-label]").forEach((button) => button.addEventListener("click", () => {
  filter({ label: button.dataset.label });
  byId("gallery").scrollIntoView();
}));

// Every number has its meaning on hover: that of its column.
for (const { tHead, tBodies } of document.querySelectorAll("main table:not(.matrix)"))
  for (const row of tBodies[0].rows) for (const cell of row.cells) cell.title ||= tHead.rows[0].cells[cell.cellIndex].title;

// A heading sorts its table: text ascending, numbers descending, and the reverse the next time.
document.querySelectorAll(".sortable th").forEach((heading) => {
  heading.tabIndex = 0;
  heading.addEventListener("click", () => sort(heading));
  heading.addEventListener("keydown", (event) => press(event, () => sort(heading)));
});
function sort(heading) {
  const body = heading.closest("table").tBodies[0], cell = (row) => row.cells[heading.cellIndex].textContent;
  const value = (row) => parseFloat(cell(row).replace(/,/g, "")), numeric = heading.classList.contains("n");
  const before = heading.getAttribute("aria-sort"), up = before ? before === "descending" : !numeric;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].sort((a, b) => (numeric ? (value(a) || 0) - (value(b) || 0) : cell(a).localeCompare(cell(b))));
  body.append(...(up ? rows : rows.reverse()));
}

// ------------------------------------------------------------------------------------------------ marks

const markKey = "marks " + page.key;
const marked = new Set((stored(markKey) ?? "").split(" ").filter(Boolean).map(Number));
const positionsOf = (indices) => Array.from(everyone).filter((at) => indices.has(data.index[at]));

function updateMarks() {
  const here = positionsOf(marked).length; // a page of a part may lack some
  for (const id of ["marks", "save-marks", "clear-marks"]) byId(id).hidden = !here;
  byId("marks").textContent = `${count(here)} marked`;
  document.querySelectorAll(".tile").forEach((node) => node.classList.toggle("marked", marked.has(+node.dataset.index)));
  stored(markKey, [...marked].join(" "));
}
function mark(at) {
  if (!marked.delete(data.index[at])) marked.add(data.index[at]);
  if (byId("toggle")) byId("toggle").textContent = marked.has(data.index[at]) ? "Unmark (m)" : "Mark (m)";
  updateMarks();
}
byId("marks").addEventListener("click", () => show(positionsOf(marked), "Marked"));
byId("save-marks").addEventListener("click", () => saveExamples(`${page.name}_marked.csv`, positionsOf(marked), []));
byId("clear-marks").addEventListener("click", () => { marked.clear(); updateMarks(); });
byId("mark-all").addEventListener("click", () => { view.forEach((at) => marked.add(data.index[at])); updateMarks(); });

// ------------------------------------------------------------------------------------------------ one example

const dialog = byId("example");
let opened = null;

function address(at) {
  return page.root && fileName(at) ? page.root + fileName(at).split("/").map(encodeURIComponent).join("/") : null;
}

function open(at) {
  opened = at;
  const canvas = element("canvas", { className: "image" }), body = dialog.querySelector(".body");
  const left = element("div", {}, canvas), right = element("div");
  const fact = (text, title) => left.append(element("div", { className: "muted", textContent: text, title: title ?? "" }));
  right.append(element("h3", {}, `Example ${data.index[at]}: `, element("bdi", { textContent: className(data.label[at]) })));
  if (page.files) left.append(element("div", { title: "File" }, element("bdi", { textContent: fileName(at) })));
  if (data.prediction && data.prediction[at] >= 0)
    fact(`Prediction: ${className(data.prediction[at])} (${(100 * data.confidence[at]).toFixed(1)} %)`,
      `By ${page.predictor}, with the probability of the predicted class`);
  else if (!data.prediction && data.correct && data.correct[at] < 2) fact(data.correct[at] ? "Classified correctly" : "Classified wrongly", "In the last epoch of training");
  if (data.planted?.[at]) fact("Wrong label", "Known from --planted");
  if (data.kept) fact(data.kept[at] ? "Kept by the selection" : "Dropped by the selection");
  const actions = element("div", { className: "actions" });
  const toggle = element("button", { type: "button", id: "toggle", textContent: marked.has(data.index[at]) ? "Unmark (m)" : "Mark (m)", title: "Marked examples can be saved as a csv file" });
  toggle.addEventListener("click", () => mark(at));
  actions.append(toggle);
  const href = address(at);
  if (href) actions.append(element("a", { href, target: "_blank", rel: "noopener", textContent: "Open the original" }));
  left.append(actions);
  const table = element("table", {}, element("thead", {}, element("tr", {}, element("th", { textContent: "Score" }),
    element("th", { className: "n", textContent: "Value" }),
    element("th", { className: "n", textContent: "Rank", title: "Among all examples with this score; 1 is the most atypical; equal scores share a rank" }))));
  const rows = element("tbody");
  page.scores.forEach((score, k) => rows.append(element("tr", {}, element("td", { textContent: score.title, title: score.meaning }),
    element("td", { className: "n", textContent: number(scores[k][at]), title: score.meaning }),
    element("td", { className: "n", textContent: rank(k, at) ? count(rank(k, at)) : "–", title: `Of ${count(score.scored)}` }))));
  table.append(rows);
  if (page.curves) {
    const plot = element("div", { className: "plot" });
    left.append(plot);
    if (window.Plotly) setTimeout(() => plot.isConnected && drawCurve(plot, at));
  }
  right.append(element("div", { className: "scroll" }, table));
  const before = body.querySelector(".js-plotly-plot");
  if (before) Plotly.purge(before); // it listens to the window's size
  body.replaceChildren(left, right);
  paint(canvas, at);
  if (!dialog.open) dialog.showModal();
}

function curve(name, at) {
  const size = page.curves.epochs.length;
  return Array.from(data[name].subarray(at * size, (at + 1) * size), (byte) => (byte === 255 ? null : byte / 254));
}

function drawCurve(node, at) {
  const loss = curve("losses", at).map((value) => (value === null ? null : value * value * page.curves.largest));
  draw(node, [
    { x: page.curves.epochs, y: curve("probabilities", at), name: "probability of the label", mode: "lines+markers", line: { color: css("--accent") }, marker: { size: 4 } },
    { x: page.curves.epochs, y: loss, name: "loss", mode: "lines+markers", yaxis: "y2", line: { color: css("--other") }, marker: { size: 4 } },
  ], { margin: { l: 34, r: 34, t: 34, b: 34 }, xaxis: { title: { text: "Epoch" } }, yaxis: { range: [-0.02, 1.02] },
    yaxis2: { overlaying: "y", side: "right", rangemode: "tozero", showgrid: false, tickmode: "auto", nticks: 4 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 } });
}

byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => { opened = null; });

function neighbor(step) {
  const place = view.indexOf(opened);
  const at = view[place + step];
  if (place < 0 || at === undefined) return;
  const size = +field("size");
  if (Math.floor((place + step) / size) !== first / size) { first = Math.floor((place + step) / size) * size; render(); }
  open(at);
}

document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  if (event.key === "/") { event.preventDefault(); if (dialog.open) dialog.close(); fields.namedItem("query").focus(); }
  else if (event.key === "m" && opened !== null) mark(opened);
  else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
    const step = event.key === "ArrowRight" ? 1 : -1;
    if (opened !== null) neighbor(step);
    else turn(step);
  }
});

// ------------------------------------------------------------------------------------------------ figures

const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A6FD0", "#8C564B", "#6B8E23", "#B03060"];
const drawn = new Map(); // figure -> the function that draws it, for a change of the theme

function draw(node, traces, layout, config = {}) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  const styled = { ...layout, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--muted") }, hoverlabel: { font: { size: 12 } },
    modebar: { bgcolor: "transparent", color: css("--muted"), activecolor: css("--accent") },
    margin: layout.margin ?? { l: 56, r: 16, t: 16, b: 44 } };
  for (const name of ["xaxis", "yaxis", "yaxis2"]) if (name !== "yaxis2" || layout.yaxis2) styled[name] = { ...axis, ...layout[name] };
  return Plotly.react(node, traces, styled, { responsive: true, displaylogo: false, displayModeBar: false, ...config });
}

function figure(id, drawIt) {
  const node = byId(id);
  if (!node) return;
  node.draw = () => { drawn.set(node, drawIt); drawIt(node); };
  document.addEventListener("DOMContentLoaded", () => visible.observe(node)); // plotly.js is parsed last
}

const lines = (series, more = {}) => series.map((one, i) => ({ mode: "lines", line: { width: 1.6, color: COLORS[i % COLORS.length] }, ...more, ...one, name: plain(one.name) }));

if (figures.classes) {
  const curves = figures.classes, select = byId("curve"), which = byId("which");
  if (curves.test_loss.every((row) => row.every((value) => value === null))) select.querySelector("[value=test_loss]").remove();
  const few = page.classes.length <= COLORS.length;
  options(which, [...(few ? [["all", "All"]] : [["hard", "Five hardest and five easiest"]]), ...classOptions]);
  const drawClasses = (node) => {
    const last = curves.accuracy.map((row, k) => [row[row.length - 1] ?? 0, k]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    const chosen = which.value === "all" ? page.classes.map((_, k) => k) : which.value === "hard" ? [...last.slice(0, 5), ...last.slice(-5)] : [+which.value];
    const series = chosen.map((k) => ({ name: className(k), x: curves[select.value][k].map((_, epoch) => epoch + 1), y: curves[select.value][k] }));
    draw(node, lines(series), { showlegend: true, xaxis: { title: { text: "Epoch" } }, yaxis: { title: { text: select.selectedOptions[0].text } } });
  };
  figure("class-plot", drawClasses);
  for (const node of [select, which]) node.addEventListener("input", () => drawClasses(byId("class-plot")));
}
if (figures.loo) figure("loo", (node) => draw(node, lines([
  { name: "leave-one-out estimate", x: figures.loo.epochs, y: figures.loo.estimates, mode: "lines+markers" },
  { name: "test loss", x: figures.loo.test.map((_, epoch) => epoch + 1), y: figures.loo.test },
]), { xaxis: { title: { text: "Epoch" } }, yaxis: { title: { text: "Negative log-likelihood" } }, legend: { orientation: "h", y: 1.12 } }));
if (figures.retrained) figure("retrained", (node) => draw(node, [
  { mode: "markers", x: figures.retrained.estimated, y: figures.retrained.deviations, text: figures.retrained.index.map((i) => `example ${i}`), marker: { color: css("--accent"), size: 7, opacity: 0.8 } },
], { xaxis: { title: { text: "Estimated sensitivity" } }, yaxis: { title: { text: "Deviation after retraining" } } }));
if (figures.spectra) figure("spectra", (node) => draw(node, lines(figures.spectra), { showlegend: figures.spectra.length > 1,
  xaxis: { title: { text: "Eigenvalue" } }, yaxis: { type: "log", title: { text: "Density" }, range: [-6, 3], exponentformat: "power" }, legend: { orientation: "h", y: -0.3 } }));
if (figures.velocities) figure("velocities", (node) => draw(node, lines(figures.velocities, { mode: "lines+markers" }), { showlegend: true,
  xaxis: { title: { text: figures.velocities.every((one) => one.percent) ? "Position in the order of scores (percent)" : figures.velocities.some((one) => one.percent) ? "Position in the order of scores (percent or rank)" : "Rank" } },
  yaxis: { title: { text: "Velocity" } }, legend: { orientation: "h", y: -0.3 } }));

document.querySelectorAll(".strip").forEach((strip) => {
  const kept = +strip.dataset.kept, sorted = order(0).filter((at) => !Number.isNaN(scores[0][at]) && data.kept[at] === kept);
  const some = strip.dataset.order === "high" ? sorted.slice(0, 24) : sorted.slice(-24).reverse();
  some.forEach((at) => { const canvas = element("canvas", { className: "image thumb" }); canvas.dataset.at = at; strip.append(canvas); prepare(canvas, at); });
});

// ------------------------------------------------------------------------------------------------ scatter

if (byId("plot")) {
  const [x, y, color, byRank] = ["x", "y", "color", "by-rank"].map(byId);
  let selection = [];
  options(x, scoreOptions);
  options(y, scoreOptions);
  y.value = Math.max(page.scores.findIndex((score) => score.source !== page.scores[0].source), 1); // not a variant of the first

  const groups = () => {
    if (color.value === "correct") return [["classified correctly", (at) => data.correct[at] === 1], ["classified wrongly", (at) => data.correct[at] === 0], ["unknown", (at) => data.correct[at] === 2]];
    if (color.value === "kept") return [["kept", (at) => data.kept[at] === 1], ["dropped", (at) => data.kept[at] === 0]];
    if (color.value === "planted") return [["right label", (at) => data.planted[at] === 0], ["wrong label", (at) => data.planted[at] === 1]];
    if (color.value === "label" && page.classes.length <= 40) return page.classes.map((name, k) => [name, (at) => data.label[at] === k]);
    return [["", () => true]];
  };

  const drawScatter = (node) => {
    const [i, j] = [+x.value, +y.value];
    const points = everyone.filter((at) => !Number.isNaN(scores[i][at]) && !Number.isNaN(scores[j][at]));
    const note = byId("thinned");
    note.hidden = points.length === page.total;
    note.textContent = `${count(points.length)} of ${count(page.total)} examples are drawn${page.shown < page.total ? "; the extremes of each class are over-represented" : ": those with both scores"}.`;
    const value = (k, at) => (byRank.checked ? rank(k, at) : scores[k][at]);
    const many = color.value === "label" && page.classes.length > 40;
    const traces = groups().map(([name, belongs], g) => {
      const mine = points.filter(belongs);
      return { type: "scattergl", mode: "markers", name: plain(name), customdata: Array.from(mine), hoverinfo: "none",
        x: Array.from(mine, (at) => value(i, at)), y: Array.from(mine, (at) => value(j, at)),
        selected: { marker: { opacity: 0.95 } }, unselected: { marker: { opacity: 0.12 } },
        marker: { size: points.length > 20000 ? 3 : points.length > 4000 ? 4 : 6, opacity: points.length > 20000 ? 0.4 : 0.75,
          symbol: ["circle", "square", "diamond", "cross"][Math.floor(g / COLORS.length)],
          color: many ? Array.from(mine, (at) => data.label[at]) : color.value === "" ? css("--accent") : COLORS[g % COLORS.length], colorscale: "Viridis" } };
    }).filter((trace) => trace.x.length);
    const title = (k) => plain(page.scores[k].title) + (byRank.checked ? " (rank among all, 1 is the most atypical)" : "");
    draw(node, traces, { dragmode: "lasso", hovermode: "closest", showlegend: traces.length > 1, xaxis: { title: { text: title(i) } }, yaxis: { title: { text: title(j) } },
      legend: { itemsizing: "constant" }, uirevision: `${i} ${j} ${byRank.checked}` },
    { displayModeBar: true, scrollZoom: true, modeBarButtons: [["lasso2d", "select2d", "zoom2d", "pan2d", "resetScale2d", "toImage"]] });
    byId("rho").textContent = `ρ = ${page.rho[i][j] === null ? "–" : page.rho[i][j].toFixed(2)}`;
    if (node.dataset.ready) return;
    node.dataset.ready = "yes";
    node.on("plotly_selected", (event) => choose(event ? event.points.map((point) => point.customdata) : []));
    node.on("plotly_deselect", () => choose([]));
    node.on("plotly_hover", (event) => hover(event.points[0].customdata, event.event));
    node.on("plotly_unhover", () => { byId("hover").hidden = true; });
    node.on("plotly_click", (event) => { byId("hover").hidden = true; open(event.points[0].customdata); });
  };

  const choose = (positions) => {
    selection = positions.slice().sort((a, b) => a - b);
    byId("selected").textContent = selection.length ? `${count(selection.length)} selected` : "Draw around points to select examples.";
    for (const id of ["download-selected", "show-selected"]) byId(id).hidden = !selection.length;
  };

  const hover = (at, event) => {
    const card = byId("hover");
    const lines = [element("bdi", { textContent: className(data.label[at]) }), ` (${data.index[at]})`];
    if (page.files) lines.push(element("br"), element("bdi", { textContent: fileName(at) }));
    for (const k of new Set([+x.value, +y.value])) lines.push(element("br"), `${page.scores[k].mode} ${number(scores[k][at])}`);
    card.querySelector("div").replaceChildren(...lines);
    paint(card.querySelector("canvas"), at);
    card.hidden = false;
    card.style.left = Math.min(event.clientX + 18, innerWidth - card.offsetWidth - 8) + "px";
    card.style.top = Math.max(8, Math.min(event.clientY + 18, innerHeight - card.offsetHeight - 8)) + "px";
  };

  figure("plot", drawScatter);
  for (const node of [x, y, color, byRank])
    node.addEventListener("input", () => {
      if (node !== color) choose([]); // the axes have changed
      drawScatter(byId("plot"));
    });
  byId("show-selected").addEventListener("click", () => show(selection, "Selected in the scatter"));
  byId("download-selected").addEventListener("click", () => saveExamples(`${page.name}_selected.csv`, selection, [...new Set([+x.value, +y.value])]));
}

// ------------------------------------------------------------------------------------------------ looks

const darkSystem = matchMedia("(prefers-color-scheme: dark)");
let wanted = stored("report theme");
function theme(chosen = wanted ?? (darkSystem.matches ? "dark" : "light")) {
  document.documentElement.dataset.theme = chosen;
  byId("theme").textContent = chosen === "dark" ? "Light" : "Dark";
  drawn.forEach((drawIt, node) => drawIt(node));
  if (opened !== null) open(opened);
}
byId("theme").addEventListener("click", () => {
  wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  stored("report theme", wanted);
  theme();
});
darkSystem.addEventListener("change", () => theme());
addEventListener("afterprint", () => theme());

function smooth(on) {
  document.body.classList.toggle("smooth", on);
  byId("smooth").setAttribute("aria-pressed", on);
}
byId("smooth").addEventListener("click", () => smooth(!document.body.classList.contains("smooth")));

smooth(page.thumbnail.side >= 64);
theme();
updateMarks();
update();
document.documentElement.dataset.ready = "yes";
