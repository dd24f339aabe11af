// Numbers, packed by explanation/page.py. Grids are by token here; grouped() makes them by word.

const allTokens = { T: (data.queries ?? data.tokens).length, S: data.tokens.length };

/** Blobs stand behind the script, so that the page can show the answer before they have arrived. */
const parsed = new Promise((resolve) =>
  document.readyState === "loading" ? addEventListener("DOMContentLoaded", resolve) : resolve());

/** Unpacks a blob, and returns a function that reads its arrays one after another. */
async function unpack(number) {
  await parsed;
  const text = atob(document.querySelectorAll(".blob")[number].textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  let offset = 0;
  return (Type, length) => {
    const array = new Type(buffer, offset, length);
    offset += array.byteLength;
    return array;
  };
}

/** The map of a measure over all layers and heads, T x S. */
const loadMap = memoize(async (name) => {
  const { T, S } = allTokens;
  const read = await unpack(data.maps.indexOf(name));
  const maxima = read(Float32Array, T);
  const [low, high] = [read(Uint8Array, T * S), read(Uint8Array, T * S)];
  const grid = new Float32Array(T * S);
  for (let query = 0, i = 0; query < T; query++) {
    const unit = maxima[query] / 32767;
    for (const end = i + S; i < end; i++) {
      grid[i] = unit * (((low[i] | (high[i] << 8)) << 16) >> 16); // 16 bits with a sign
    }
  }
  return grid;
});

/** The heads of a layer: for each head and query, K keys and their values. */
const loadLayer = memoize(async (number) => {
  const { T } = allTokens;
  const { heads: H, kept: K, negative } = data.layers[number];
  const read = await unpack(data.maps.length + number);
  const rows = H * T;
  const layer = { H, K, outputNorm: read(Float32Array, T) };
  for (const name of ["share", "attentionKept", "contributionKept"]) {
    layer[name] = read(Float32Array, rows);
  }
  const maxima = [0, 1, 2].map(() => read(Float32Array, rows));
  const [low, high] = [read(Uint8Array, rows * K), read(Uint8Array, rows * K)];
  layer.keys = new Uint16Array(rows * K);
  for (let i = 0; i < rows * K; i++) { // each key is stored as its distance from the one before
    layer.keys[i] = (low[i] | (high[i] << 8)) + (i % K ? layer.keys[i - 1] : 0);
  }
  const readValues = (n, signed) => {
    const fractions = Float32Array.from({ length: 256 }, (_, byte) =>
      (signed ? ((byte << 24) >> 24) / 127 : byte / 255) ** 3);
    const codes = read(Uint8Array, rows * K);
    const values = new Float32Array(rows * K);
    for (let row = 0, i = 0; row < rows; row++) {
      for (const end = i + K; i < end; i++) values[i] = maxima[n][row] * fractions[codes[i]];
    }
    return values;
  };
  layer.attention = readValues(0, negative);
  layer.relativeNorm = readValues(1, false);
  layer.contribution = readValues(2, true);
  return layer;
});

/** How the measures of single heads follow from what is stored, as in HeadMaps.measure. */
const HEAD_MEASURES = {
  attention: (layer, i) => layer.attention[i],
  vwon: (layer, i) => Math.abs(layer.attention[i]) * layer.relativeNorm[i],
  vw: (layer, i, query) => HEAD_MEASURES.vwon(layer, i) * layer.outputNorm[query],
  "contribution-signed": (layer, i) => layer.contribution[i],
  contribution: (layer, i) => Math.abs(layer.contribution[i]),
};

/** The map of a head, T x S; NaN where a key was not kept. For all heads, their mean or signed sum. */
function headGrid(layer, head, method) {
  const { T, S } = allTokens;
  const heads = head === ALL ? [...Array(layer.H).keys()] : [head];
  const part = head === ALL && !method.signed ? 1 / layer.H : 1;
  const grid = new Float32Array(T * S).fill(NaN);
  for (const h of heads) {
    for (let query = 0; query < T; query++) {
      const start = (h * T + query) * layer.K;
      for (let i = start; i < start + layer.K; i++) {
        if (layer.attention[i] === 0) continue;
        const cell = query * S + layer.keys[i];
        grid[cell] = (grid[cell] || 0) + part * HEAD_MEASURES[method.name](layer, i, query);
      }
    }
  }
  return grid;
}

/** The index of a key among those kept for a query of the selected head, or null. Places are tokens. */
function keptIndex(query, key) {
  const start = (view.head * allTokens.T + query) * view.layer.K;
  for (let i = start; i < start + view.layer.K; i++) {
    if (view.layer.keys[i] === key && view.layer.attention[i] !== 0) return i;
  }
  return null;
}

const groupedGrids = new WeakMap(); // for each grid, what it is by unit

/** A grid by the shown unit. */
function grouped(grid, method) {
  if (shown.T === allTokens.T && shown.S === allTokens.S) return grid;
  const byUnit = groupedGrids.get(grid) ?? {};
  groupedGrids.set(grid, byUnit);
  return (byUnit[state.unit] ??= sumGroups(grid, method));
}

/** Sums the keys of a word. Its queries are averaged, or summed for a target. */
function sumGroups(grid, method) {
  const { T, S, keyOf, queryOf } = shown;
  const result = new Float32Array(T * S).fill(NaN);
  for (let query = 0, i = 0; query < allTokens.T; query++) {
    const [start, stop] = shown.queries.groups[queryOf[query]];
    const part = method.ofTarget ? 1 : 1 / (stop - start);
    for (let key = 0; key < allTokens.S; key++, i++) {
      if (Number.isNaN(grid[i])) continue;
      const cell = queryOf[query] * S + keyOf[key];
      result[cell] = (result[cell] || 0) + part * grid[i];
    }
  }
  return result;
}

/** The scores of a measure by the shown unit, or null. */
const scoresOf = (name) => scoresByUnit[state.unit](name);
function sumScores(name) {
  const scores = data.scores[name];
  if (!scores) return null;
  return shown.keys.groups.map(([start, stop]) => {
    let sum = 0;
    for (let place = start; place < stop; place++) sum += scores[place];
    return sum;
  });
}
const scoresByUnit = { token: memoize(sumScores), word: memoize(sumScores) };
const sizeOf = (scores) => scores.reduce((sum, score) => sum + Math.abs(score), 0) || 1;

let latestRequest = 0;

/** Unpacks what the state asks for, and shows it unless another request came meanwhile. */
async function unpackAndShow() {
  const request = ++latestRequest;
  const { name, ofHeads } = state.method;
  if (state.layer === ALL && !data.maps.includes(name) && ofHeads && data.layers.length) state.layer = 0;
  if (state.layer !== ALL && !ofHeads) state.layer = ALL;
  if (state.layer === ALL) state.head = ALL;
  const layer = state.layer === ALL ? null : await loadLayer(state.layer);
  let grid = null;
  if (!layer && data.maps.includes(name)) grid = await loadMap(name);
  if (request !== latestRequest) return;
  if (layer) {
    if (state.head !== ALL) state.head = Math.min(state.head, layer.H - 1);
    grid = headGrid(layer, state.head, state.method);
  }
  // Everything is painted from the view, since the state may already ask for something else.
  view = { tokens: grid, layer, method: state.method, number: state.layer, head: state.head };
  showView();
  document.querySelector("main").removeAttribute("aria-busy");
}

/** Shows the view by the current unit. */
function showView() {
  view.grid = view.tokens && grouped(view.tokens, view.method);
  view.scores = scoresOf(view.method.name);
  showControls();
  updateScale();
}

function load() {
  unpackAndShow().catch((error) => {
    element("about").textContent =
      `The page cannot show this: ${error.message}. Save the page again, or use a newer browser.`;
  });
}

/** Finds the values that the darkest colours stand for. */
function updateScale() {
  const { T, S } = shown;
  view.rowMaxima = new Float32Array(T);
  view.negative = false;
  if (view.grid) {
    for (let query = 0, i = 0; query < T; query++) {
      let maximum = 0;
      for (let key = 0; key < S; key++, i++) {
        const value = view.grid[i];
        if (value < 0) view.negative = true;
        if (Math.abs(value) > maximum && !isIgnored(key)) maximum = Math.abs(value);
      }
      view.rowMaxima[query] = maximum;
    }
  }
  view.maximum = view.rowMaxima.reduce((a, b) => Math.max(a, b), 0);
  picture = null;
  paint();
}

const valueAt = (query, key) => view.grid[query * shown.S + key];
const rowScale = (query) => (state.scale === "row" ? view.rowMaxima[query] : view.maximum);
function columnScale(key) {
  if (state.scale === "map") return view.maximum;
  let maximum = 0;
  for (let query = 0; query < shown.T; query++) {
    maximum = Math.max(maximum, Math.abs(valueAt(query, key)) || 0);
  }
  return maximum;
}
/** Sinks do not set the scale of scores, since their colour is their own. */
const scoreScale = (scores) =>
  scores.reduce((largest, score, key) => (shown.sinks.has(key) ? largest : Math.max(largest, Math.abs(score))), 0);
