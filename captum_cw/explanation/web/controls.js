// Controls

function createOption(value, text, disabled = false) {
  return createElement("option", { value, disabled }, text);
}

const MORE = new Set(["vw", "vwon"]);
const touches = matchMedia("(hover: none)").matches;

function showControls() {
  const { method } = state;
  const hasMap = data.maps.includes(method.name);
  const aggregation = !view.layer && (view.grid || data.maps.length) ? ` ${method.aggregation}` : "";
  element("about").textContent = `${method.about}${aggregation}`;
  element("method").value = data.methods.indexOf(method);
  element("layer").replaceChildren(
    createOption(ALL, hasMap ? "all layers" : "–", !hasMap),
    ...data.layers.map(({ name }, n) => createOption(n, `${n} · ${name}`)),
  );
  element("layer").value = state.layer;
  element("head").disabled = view.layer === null;
  element("map-part").hidden = !view.grid;
  element("export-map").disabled = !view.grid;
  element("export-scores").disabled = !Object.keys(data.scores).length;
  document.querySelectorAll(".export-answer").forEach((option) => (option.disabled = !view.scores));
  element("scale").disabled = !view.grid;
  element("numbers").value = state.numbers;
  element("unit").value = state.unit;
  element("sinks").checked = state.ignoreSinks;
  element("scale").value = state.scale;
  element("controls-summary").textContent =
    `Options (now: ${method.label}, by ${state.unit}${view.layer ? `, layer ${view.number}` : ""})`;
  const unit = state.unit;
  const [point, keep, clear] = touches
    ? ["Tap a", "", ` Tap it again to clear the selection.`]
    : ["Point at a", ` Click or press Enter to keep the selection, and Escape to clear it.`, ""];
  element("text-hint").textContent = (view.grid
    ? `${point} ${unit}: colours then show what it draws from.` : `${point} ${unit} to see its scores.`) + keep + clear +
    (data.long && view.scores ? " The strip is the whole text: a click in it leads to that place." : "");
  element("map-hint").textContent = `Rows are queries: the ${unit}s whose output is explained. Columns are keys: ` +
    `the ${unit}s that a query draws from. ${touches ? "Tap" : "Point at"} a cell to see its numbers` +
    (touches ? "." : ", or move with the arrow keys.") +
    (view.layer && view.layer.K < allTokens.S
      ? " A cell is blank if the query does not see the key, or if the key is not among the " +
        `${view.layer.K} that are kept for each query.` : "");
  showHeads();
}

/** Lists the heads, with their share of the layer's output at the selected query. */
function showHeads() {
  if (!view.layer) {
    element("head").replaceChildren(createOption(ALL, "all heads"));
    return;
  }
  const { query } = focused();
  const place = query === null ? null : shown.queries.groups[query][1] - 1;
  const heads = Array.from({ length: view.layer.H }, (_, head) => {
    const share = place === null ? ""
      : `: ${formatPercent(view.layer.share[head * allTokens.T + place])} of the layer's output`;
    return createOption(head, `${head}${share}`);
  });
  element("head").replaceChildren(createOption(ALL, "all heads of this layer"), ...heads);
  element("head").value = state.head;
}

function paint() {
  paintPrompt();
  paintBars();
  paintMinimap();
  paintHeads();
  paintCurrent();
}
/** Paints what depends on the token or cell that is selected or under the mouse. */
function paintCurrent() {
  paintText();
  paintLegend();
  paintMap();
  paintDetails();
  paintComparison();
}

function onChange(id, change) {
  element(id).addEventListener("change", () => {
    change(element(id));
    writeLink();
  });
}
const numberOrAll = (value) => (value === ALL ? ALL : Number(value));
onChange("method", ({ value }) => {
  const before = state.method.ofTarget;
  state.method = data.methods[value];
  if (state.method.ofTarget !== before) resetScale();
  load();
});
/** The rows of contributions to a target are in one unit, so that their colours can be compared. */
const usualScale = () => (state.method.ofTarget ? "map" : "row");
function resetScale() {
  state.scale = usualScale();
}
onChange("layer", ({ value }) => {
  state.layer = numberOrAll(value);
  if (state.layer !== ALL) useMeasureOfHeads();
  load();
});
onChange("head", ({ value }) => { state.head = numberOrAll(value); load(); });
onChange("scale", ({ value }) => { state.scale = value; updateScale(); });
onChange("sinks", ({ checked }) => { state.ignoreSinks = checked; updateScale(); });
onChange("numbers", ({ value }) => { state.numbers = value; showControls(); paint(); });
onChange("unit", ({ value }) => changeUnit(value));

/** Shows tokens or words, and keeps the selection. */
function changeUnit(unit) {
  const { queries, keys } = shown;
  const { query, key, cell } = state.selected;
  const [ofQuery, ofKey] = [queries.groups[query]?.[0], keys.groups[key]?.[0]];
  state.unit = unit;
  useUnit();
  state.selected = {
    query: query === null ? null : shown.queryOf[ofQuery], key: key === null ? null : shown.keyOf[ofKey], cell,
  };
  state.hovered = null;
  writeText();
  openAtPrediction();
  scrollToSelected();
  showView();
}

let hostTheme = ""; // the theme of a notebook, which Chromium does not pass on to its frames
function showTheme() {
  const theme = element("theme").value || hostTheme;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  findRamps();
  paint();
}
element("theme").addEventListener("change", showTheme);
prefersDark.addEventListener("change", showTheme);
/** Lets a notebook give its frame the height of the page. */
function tellHeight() {
  if (parent !== window) parent.postMessage({ height: document.body.offsetHeight }, "*");
}
addEventListener("message", (event) => {
  tellHeight(); // the notebook may have missed what was sent before
  if (!["light", "dark"].includes(event.data) || event.data === hostTheme) return;
  hostTheme = event.data;
  showTheme();
});
addEventListener("resize", () => paint());
element("controls").addEventListener("submit", (event) => event.preventDefault());

// The link to a state: what differs from the page as it opens

const linked = {
  measure: [() => state.method.name, (x) => {
    state.method = data.methods.find(({ name }) => name === x) ?? state.method;
    resetScale();
  }],
  unit: [() => state.unit, (x) => { if (x === "token" || data.words) state.unit = x === "word" ? "word" : "token"; }],
  numbers: [() => state.numbers, (x) => { state.numbers = x === "raw" ? "raw" : "percent"; }],
  layer: [() => state.layer, (x) => { if (isPlace(x, data.layers.length)) state.layer = Number(x); }],
  head: [() => state.head, (x) => { if (isPlace(x, data.layers[state.layer]?.heads)) state.head = Number(x); }],
  scale: [() => (state.scale === usualScale() ? "" : state.scale), (x) => { if (["row", "map"].includes(x)) state.scale = x; }],
  sinks: [() => state.ignoreSinks, (x) => { state.ignoreSinks = x === "true"; }],
  query: [() => state.selected.query, (x) => choosePlace("query", x)],
  key: [() => state.selected.key, (x) => choosePlace("key", x)],
  cell: [() => state.selected.cell, (x) => { state.selected = { ...state.selected, cell: x === "true" }; }],
};
const isPlace = (x, count) => /^\d+$/.test(x) && Number(x) < count;
function choosePlace(axis, x) {
  if (isPlace(x, axis === "query" ? shown.T : shown.S)) state.selected = { ...state.selected, [axis]: Number(x) };
}
const stateOf = () => Object.entries(linked).map(([name, [get]]) => [name, String(get() ?? "")]);
let opened = null; // the state as the page opens

function linkOfState() {
  const differing = stateOf().filter(([name, value]) => value !== opened[name]);
  return differing.length ? `#${new URLSearchParams(differing)}` : "";
}
/** Reads a link; names and numbers that the page does not have are left out. */
function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, [, set]] of Object.entries(linked)) {
    if (name === "query") useUnit();
    if (given.has(name)) set(given.get(name));
  }
  if (state.selected.query === null || state.selected.key === null) state.selected.cell = false;
}
const hasAddress = ["file:", "http:", "https:"].includes(location.protocol);
let linkTimer = 0;
/** Keeps the address of the page that of its state. Browsers limit how often it may change. */
function writeLink() {
  if (!hasAddress) return;
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => history.replaceState(null, "", linkOfState() || location.pathname + location.search), 300);
}
addEventListener("hashchange", () => location.reload()); // a link that is opened in the same window
