"use strict";
// Draws the page's charts from the packed data beside it. Controls are plain form elements, so keys and readers work.
const page = JSON.parse(document.getElementById("data").textContent);
const light = { background: "transparent", font: "system-ui, sans-serif", view: { stroke: null } };
const figures = new Map();

function kept() {
  try { return JSON.parse(sessionStorage.getItem("mtraining") || "{}"); } catch { return {}; }
}
function keep(name, value) {
  try { sessionStorage.setItem("mtraining", JSON.stringify({ ...kept(), [name]: value })); } catch { /* private */ }
}
function chosenRuns() {
  const boxes = [...document.querySelectorAll(".bar input[type=checkbox]")];
  return boxes.length ? new Set(boxes.filter((box) => box.checked).map((box) => box.value)) : null;
}

// The same rows as `unpacked` in chart.py makes. `strength` is the weight of the past, 0 for none.
function unpack(key, table, strength) {
  if (table.parts) return table.parts.flatMap((part) => unpack(key, part, strength));
  const rows = [];
  if (table.z) {
    const edges = table.x.length > table.z.at(-1).length;
    table.z.forEach((line, place) => line.forEach((value, column) => {
      if (value === null) return;
      const row = { x: table.x[column], y: table.y[place], value };
      if (edges) row.x2 = table.x[column + 1];
      if (table.chosen) row.chosen = table.chosen[place][column];
      rows.push(row);
    }));
    return rows;
  }
  const names = Object.keys(table);
  const columns = names.filter((name) => Array.isArray(table[name]));
  const count = columns.length ? table[columns[0]].length : 0;
  let past = 0, weight = 0;
  for (let place = 0; place < count; place += 1) {
    const row = { run: key };
    for (const name of names) row[name] = Array.isArray(table[name]) ? table[name][place] : table[name];
    if (strength > 0 && typeof row.value === "number") {
      past = strength * past + (1 - strength) * row.value;
      weight = strength * weight + (1 - strength);
      row.value = past / weight;
    }
    rows.push(row);
  }
  return rows;
}

function rowsOf(chart, entry) {
  const strength = chart.smooths ? Number(document.getElementById("smooth")?.value || 0) / 100 : 0;
  if (chart.menu) return entry.menu ? unpack(entry.menu.value, chart.tables[entry.menu.value], strength) : [];
  const runs = chosenRuns();
  return Object.entries(chart.tables)
    .filter(([key]) => runs === null || runs.has(key))
    .flatMap(([key, table]) => unpack(key, table, strength));
}

function specOf(chart, entry, rows) {
  const spec = structuredClone(chart.spec);
  spec.description = `${chart.title}. ${chart.says}`;
  spec.width = "container";
  spec.autosize = { type: "fit-x", contains: "padding" };
  spec.data = { values: rows };
  if (spec.layer && !rows.some((row) => row.low !== undefined)) {
    spec.layer = spec.layer.filter((layer) => layer.name !== "band");
  }
  const domain = entry.menu && chart.tables[entry.menu.value]?.domain;
  if (domain) Object.assign(spec.encoding.color.scale, { domain, clamp: true });
  if (entry.log?.checked) {
    for (const layer of spec.layer || []) {
      layer.encoding.y.scale = { type: "log" };
      layer.transform = [...(layer.transform || []), { filter: "datum.value > 0 && !(datum.low <= 0)" }];
    }
  }
  return spec;
}

async function draw(chart) {
  const entry = figures.get(chart.name);
  const rows = rowsOf(chart, entry);
  entry.rows = rows;
  const old = entry.view;
  const result = await vegaEmbed(entry.plot, specOf(chart, entry, rows), {
    actions: false, renderer: "svg", config: light, mode: "vega-lite",
  });
  entry.view = result.view;
  if (old) old.finalize();
  entry.plot.dataset.rows = String(rows.length);
  // On paper there is no menu to say which one is shown.
  if (entry.menu) {
    const others = entry.menu.options.length - 1;
    entry.chosen.textContent = `${chart.menu}: ${entry.menu.value}${others ? ` (${others} more on the page)` : ""}`;
  }
  if (entry.table.open) fillTable(entry);
}

// A paper wants a fixed width and black on white, whatever the screen is.
async function paper(chart) {
  const entry = figures.get(chart.name);
  const spec = { ...specOf(chart, entry, rowsOf(chart, entry)), width: 560 };
  spec.config = { ...light, background: "white" };
  if (spec.layer) spec.layer = spec.layer.filter((layer) => !layer.params);
  const hidden = document.createElement("div");
  const result = await vegaEmbed(hidden, spec, { actions: false, renderer: "none", mode: "vega-lite" });
  const svg = await result.view.toSVG();
  result.view.finalize();
  return svg;
}

async function saveSvg(chart) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([await paper(chart)], { type: "image/svg+xml" }));
  link.download = `${chart.name}.svg`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Text keeps its size on paper only if charts are as wide as the paper's columns.
function fitPaper() {
  for (const entry of figures.values()) {
    if (!entry.view) continue;
    const alone = entry.plot.closest(".one") || entry.plot.closest("figure").matches(":only-child");
    entry.view.width(alone ? 670 : 318);
    if (!alone) entry.view.height(150);
    entry.view.run();
  }
}

function savePdf(figure) {
  const section = figure.closest("section");
  document.body.classList.add("one");
  figure.classList.add("one");
  section.classList.add("has-one");
  window.addEventListener("afterprint", () => {
    document.body.classList.remove("one");
    figure.classList.remove("one");
    section.classList.remove("has-one");
  }, { once: true });
  window.print();
}

function fillTable(entry) {
  const most = 400, every = Math.max(1, Math.ceil(entry.rows.length / most));
  const shown = entry.rows.filter((_, place) => place % every === 0);
  const heads = [...new Set(shown.flatMap((row) => Object.keys(row)))].filter((name) => !name.startsWith("_vg"));
  const table = document.createElement("table");
  const caption = table.createCaption();
  caption.textContent = every > 1 ? `every ${every}th of ${entry.rows.length} points` : `${shown.length} points`;
  const first = table.createTHead().insertRow();
  for (const name of heads) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    first.append(cell);
  }
  const body = table.createTBody();
  for (const row of shown) {
    const line = body.insertRow();
    for (const name of heads) line.insertCell().textContent = row[name] ?? "";
  }
  entry.table.querySelector(".rows").replaceChildren(table);
}

function prepare(chart) {
  const figure = document.getElementById(chart.name);
  const entry = {
    plot: figure.querySelector(".plot"), menu: figure.querySelector("select"),
    log: figure.querySelector("input.log"), table: figure.querySelector("details"),
    chosen: figure.querySelector(".chosen"), view: null, rows: [],
  };
  figures.set(chart.name, entry);
  const memory = kept();
  if (entry.menu && chart.tables[memory[`menu ${chart.name}`]]) entry.menu.value = memory[`menu ${chart.name}`];
  if (entry.log) entry.log.checked = Boolean(memory[`log ${chart.name}`]);
  const chosen = (control, value) => { keep(`${control} ${chart.name}`, value); drawAll((one) => one === chart); };
  entry.menu?.addEventListener("change", () => chosen("menu", entry.menu.value));
  entry.log?.addEventListener("change", () => chosen("log", entry.log.checked));
  entry.table.addEventListener("toggle", () => { if (entry.table.open) fillTable(entry); });
  figure.querySelector("button.svg").addEventListener("click", () => saveSvg(chart));
  figure.querySelector("button.pdf").addEventListener("click", () => savePdf(figure));
}

// One drawing after another: of two at a time the older could end last, and stay.
let turn = Promise.resolve(), waiting = 0;
function drawAll(wanted) {
  delete document.body.dataset.drawn;
  waiting += 1;
  turn = turn.then(async () => {
    for (const chart of page.charts) if (wanted(chart)) await draw(chart);
  }).catch((error) => console.error(error)).then(() => {
    waiting -= 1;
    if (!waiting) document.body.dataset.drawn = String(page.charts.length);
  });
  return turn;
}

async function start() {
  const smooth = document.getElementById("smooth"), memory = kept();
  for (const box of document.querySelectorAll(".bar input[type=checkbox]")) {
    box.checked = !(memory.off || []).includes(box.value);
    box.addEventListener("change", () => {
      const all = [...document.querySelectorAll(".bar input[type=checkbox]")];
      keep("off", all.filter((one) => !one.checked).map((one) => one.value));
      drawAll((chart) => !chart.menu);
    });
  }
  if (smooth) {
    smooth.value = memory.smooth ?? 0;
    const told = document.getElementById("smoothed");
    const tell = () => { told.textContent = `${smooth.value} %`; };
    tell();
    smooth.addEventListener("input", tell);
    smooth.addEventListener("change", () => { keep("smooth", smooth.value); drawAll((chart) => chart.smooths); });
  }
  page.charts.forEach(prepare);
  window.addEventListener("beforeprint", fitPaper);
  window.addEventListener("afterprint", () => drawAll(() => true));
  await drawAll(() => true);
  if (page.refresh) {
    window.scrollTo(0, memory.scroll || 0);
    setTimeout(() => { keep("scroll", window.scrollY); location.reload(); }, 1000 * page.refresh);
  }
}
start();
