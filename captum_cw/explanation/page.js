// The interactive page of an explanation. The state of the page is one object; code that changes it
// calls load(), which unpacks numbers, or paint(). Names, explanations and units of measures come
// with the data, from the registry (measures.py).
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  const blobs = document.querySelectorAll(".blob");
  const separateQueries = data.queries !== null; // the queries are not the tokens (keys) themselves
  const visible = (tokens) => tokens.map((token) => token || "∅");
  const keys = visible(data.tokens);
  const queries = visible(data.queries ?? keys);
  const S = keys.length;
  const T = queries.length;
  const sinks = new Set(data.sinks);
  const ALL = ""; // instead of the number of a layer: all layers and heads
  const NO_SELECTION = { query: null, key: null, cell: false };
  const EIGHT_BITS = "The page stores these numbers in 8 bits. Attention and relative norm are off by at " +
    "most 0.6% of the largest value in their row, and the contribution by at most 1.2%. The other " +
    "numbers are computed from these; the cosine is off by about ±0.05.";

  const state = {
    method: data.methods.find(({ name }) => name === data.initial),
    layer: ALL, // or the number of a layer
    head: 0,
    scale: "row", // or "map": the values that the darkest colour stands for; see resetScale
    ignoreSinks: false,
    selected: NO_SELECTION,
    hovered: null, // the selection by mouse or focus, which is temporary and replaces the other
    window: { query: 0, key: 0 }, // the first row and column that the map shows
  };
  // The numbers that the state asks for, unpacked; see unpackAndShow and updateScale.
  let view = { method: state.method, grid: null, layer: null, rowMaxima: [], maximum: 0, negative: false };
  let ramps = null; // the colours; see findRamps
  let picture = null; // the whole map, one pixel per cell
  const current = () => state.hovered ?? state.selected;

  // Numbers, packed by explanation/page.py

  /** Calls a function once for each argument, and then returns the same result. */
  const memoize = (create) => {
    const created = new Map();
    return (key) => created.get(key) ?? created.set(key, create(key)).get(key);
  };

  /** Unpacks a blob, and returns a function that reads its arrays one after another. */
  async function unpack(number) {
    const text = atob(blobs[number].textContent);
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
    const { heads: H, kept: K, negative } = data.layers[number];
    const read = await unpack(data.maps.length + number);
    const rows = H * T;
    const layer = { K, outputNorm: read(Float32Array, T) };
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

  /** The map of a single head, T x S; NaN where a key was not kept. */
  function headGrid(layer, head, measure) {
    const grid = new Float32Array(T * S).fill(NaN);
    for (let query = 0; query < T; query++) {
      const start = (head * T + query) * layer.K;
      for (let i = start; i < start + layer.K; i++) {
        if (layer.attention[i] !== 0) {
          grid[query * S + layer.keys[i]] = HEAD_MEASURES[measure](layer, i, query);
        }
      }
    }
    return grid;
  }

  /** The index of a key among those kept for a query of the selected head, or null. */
  function keptIndex(query, key) {
    const start = (view.head * T + query) * view.layer.K;
    for (let i = start; i < start + view.layer.K; i++) {
      if (view.layer.keys[i] === key && view.layer.attention[i] !== 0) return i;
    }
    return null;
  }

  let latestRequest = 0;

  /** Unpacks what the state asks for, and shows it unless another request came meanwhile. */
  async function unpackAndShow() {
    const request = ++latestRequest;
    const { name, ofHeads } = state.method;
    if (state.layer === ALL && !data.maps.includes(name) && ofHeads && data.layers.length) {
      state.layer = 0;
    }
    if (state.layer !== ALL && !ofHeads) state.layer = ALL;
    const layer = state.layer === ALL ? null : await loadLayer(state.layer);
    let grid = null;
    if (!layer && data.maps.includes(name)) grid = await loadMap(name);
    if (request !== latestRequest) return;
    if (layer) {
      state.head = Math.min(state.head, data.layers[state.layer].heads - 1);
      grid = headGrid(layer, state.head, name);
    }
    // Everything is painted from the view, since the state may already ask for something else.
    view = { grid, layer, method: state.method, number: state.layer, head: state.head };
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

  const isIgnored = (key) => state.ignoreSinks && sinks.has(key);
  const valueAt = (query, key) => view.grid[query * S + key];
  const rowScale = (query) => (state.scale === "row" ? view.rowMaxima[query] : view.maximum);
  function columnScale(key) {
    if (state.scale === "map") return view.maximum;
    let maximum = 0;
    for (let query = 0; query < T; query++) {
      maximum = Math.max(maximum, Math.abs(valueAt(query, key)) || 0);
    }
    return maximum;
  }
  const scoreScale = (scores) =>
    Math.max(...scores.map((score, key) => (isIgnored(key) ? 0 : Math.abs(score))));

  // Colours, in even steps of lightness: blue for positive values, orange for negative ones

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  /** Computes the colours of the theme. A step of a ramp has a background and a text colour. */
  function findRamps() {
    const theme = document.documentElement.dataset.theme;
    const dark = theme ? theme === "dark" : prefersDark.matches;
    const [from, to, chroma] = dark ? [0.27, 0.86, 0.12] : [0.96, 0.48, 0.16];
    // The browser converts the colours in a style. Reading them back from a canvas would return
    // noise in browsers that protect against fingerprinting.
    const ramp = (hue) => {
      const steps = Array.from({ length: 256 }, (_, i) => {
        const x = i / 255;
        const wanted = `oklch(${from + (to - from) * x} ${0.008 + chroma * Math.sqrt(x)} ${hue})`;
        const step = createElement("i");
        step.style.color = `color-mix(in srgb, ${wanted}, ${wanted})`;
        return step;
      });
      const hidden = createElement("div", { hidden: true }, ...steps);
      document.body.append(hidden);
      const colours = steps.map((step) => {
        const parts = getComputedStyle(step).color.slice("color(srgb ".length, -1).split(" ");
        const [r, g, b] = parts.map((part) => Math.round(255 * Math.max(0, Math.min(1, part))));
        return { rgb: [r, g, b], css: `rgb(${r}, ${g}, ${b})`, ink: readableInk(r, g, b) };
      });
      hidden.remove();
      return colours;
    };
    const styleOf = (id, name) => getComputedStyle(element(id))[name];
    ramps = {
      blue: ramp(255),
      orange: ramp(60),
      ink: styleOf("about", "color"),
      faint: styleOf("settings", "color"),
      line: styleOf("settings", "borderTopColor"),
      panel: styleOf("controls", "backgroundColor"),
    };
    picture = null;
  }

  /** Black or white, whichever has more contrast to a background (WCAG). */
  function readableInk(...rgb) {
    const [r, g, b] = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  /** The colour of a value, if `scale` has the darkest colour. */
  function colourOf(value, scale, positive = ramps.blue) {
    const share = scale > 0 ? Math.min(Math.abs(value) / scale, 1) : 0;
    return (value < 0 ? ramps.orange : positive)[Math.round(share * 255)];
  }

  /** The colours of the lines below tokens: orange, unless orange means a negative value. */
  const lineRamp = () => (view.negative ? ramps.blue : ramps.orange);

  // Words

  /** Rounds to the digits that are stored: three of a map, two of a single head. */
  function formatNumber(x, digits = view.layer ? 2 : 3) {
    if (!Number.isFinite(x)) return "–";
    return Number(x.toPrecision(digits)).toString().replace("-", "−").replace("e−", "e-");
  }
  const formatPercent = (x) => `${formatNumber(100 * x, 2)}%`;
  /** Shortens a token to 40 characters; the text shows it in full. */
  function shorten(token) {
    const letters = Array.from(token);
    return letters.length > 40 ? `${letters.slice(0, 39).join("")}…` : token;
  }
  const describeToken = (token, place) => `${place} “${shorten(token)}”`;
  /** Scores are those of the whole model, also while a single head is shown. */
  const scopeNote = () => (view.layer ? " (all layers and heads)" : "");

  function createElement(tag, properties = {}, ...children) {
    const created = Object.assign(document.createElement(tag), properties);
    created.append(...children);
    return created;
  }
  const quote = (token) => createElement("bdi", { className: "quote" }, `“${shorten(token)}”`);
  /** A token without the space before it, unless it is only that. */
  const trim = (token) => token.trim() || token;
  const answer = data.settings.target ? `“${shorten(trim(data.settings.target))}”` : "the target";
  const namesHues = (things) =>
    `Blue ${things} worked for ${answer}, and orange ${things} worked against it.`;
  const definitionList = (entries) =>
    createElement("dl", { className: "rows" }, ...entries.flatMap(
      ([name, value, className = "", title = name]) => [
        createElement("dt", { className, title }, name),
        createElement("dd", { className }, value),
      ]));
  /** Lists values by method, with the current method in bold. */
  const valueList = (entries) => definitionList(entries.map(([{ name, label, about }, value]) =>
    [label, value, name === view.method.name ? "current" : "", about]));

  // Text

  const lists = [{ box: element("tokens"), axis: "key", tokens: keys }];
  if (separateQueries) lists.push({ box: element("queries"), axis: "query", tokens: queries });
  for (const list of lists) {
    list.elements = list.tokens.map((token, place) => {
      const span = createElement("span", { className: "token", tabIndex: place ? -1 : 0 }, token);
      span.setAttribute("role", "option");
      span.dataset.place = place;
      list.box.append(span);
      if (token.endsWith("⏎")) list.box.append(createElement("br"));
      return span;
    });
    listen(list);
  }

  /** What a token of the text selects: its row and its column, or one of them. */
  function selectionOf(list, place) {
    if (!separateQueries) return { query: place, key: place, cell: false };
    const both = { ...state.selected, [list.axis]: place };
    return { ...both, cell: both.query !== null && both.key !== null };
  }

  function listen(list) {
    const { box, elements } = list;
    const tokenOf = (event) => event.target.closest(".token");
    let lastHovered = null;
    const hover = (token) => {
      state.hovered = token && selectionOf(list, Number(token.dataset.place));
      paint();
    };
    // pointerover would also fire when the page moves under a mouse that rests.
    box.addEventListener("pointermove", (event) => {
      const token = tokenOf(event);
      if (token && token !== lastHovered) hover(token);
      lastHovered = token;
    });
    box.addEventListener("pointerleave", () => {
      lastHovered = null;
      hover(null);
    });
    box.addEventListener("focusin", (event) => {
      const token = tokenOf(event);
      if (!token) return; // some browsers focus a box that scrolls
      hover(token);
      elements.forEach((other) => (other.tabIndex = other === token ? 0 : -1));
      announce();
    });
    box.addEventListener("focusout", () => hover(null));
    box.addEventListener("click", (event) => tokenOf(event) && toggleToken(list, tokenOf(event)));
    box.addEventListener("keydown", (event) => {
      const token = tokenOf(event);
      if (!token) return;
      const place = Number(token.dataset.place);
      const forward = getComputedStyle(box).direction === "rtl" ? -1 : 1;
      const next = {
        ArrowRight: () => elements[place + forward],
        ArrowLeft: () => elements[place - forward],
        ArrowDown: () => tokenInNextLine(elements, token, 1),
        ArrowUp: () => tokenInNextLine(elements, token, -1),
        Home: () => elements[0],
        End: () => elements.at(-1),
      }[event.key];
      if (next) next()?.focus();
      else if (event.key === "Enter" || event.key === " ") toggleToken(list, token);
      else return;
      event.preventDefault();
    });
  }

  /** The nearest token in the next line, or in the previous one (direction -1). */
  function tokenInNextLine(elements, from, direction) {
    const start = from.getClientRects()[0];
    let best = null;
    for (const token of elements) {
      const box = token.getClientRects()[0];
      const down = (box.top - start.top) * direction;
      const distance = 1e4 * down + Math.abs(box.left + box.width / 2 - start.left - start.width / 2);
      if (down > 4 && (!best || distance < best.distance)) best = { token, distance };
    }
    return best?.token;
  }

  /** Selects a token, or clears the selection if it is selected already. */
  function toggleToken(list, token) {
    const place = Number(token.dataset.place);
    const { query, key, cell } = state.selected;
    const isSelected = separateQueries ? state.selected[list.axis] === place : !cell && query === place;
    if (!isSelected) select(selectionOf(list, place));
    else select(separateQueries ? { query, key, cell: false, [list.axis]: null } : NO_SELECTION);
  }

  function select(selection) {
    state.selected = selection;
    state.hovered = null;
    for (const { box, axis, elements } of lists) {
      if (selection[axis] === null) continue;
      scrollToToken(box, elements[separateQueries || !selection.cell ? selection[axis] : selection.query]);
    }
    showHeads();
    paint();
    announce();
  }

  /** Scrolls the box of the text, but not the page. */
  function scrollToToken(box, token) {
    const [inner, outer] = [token.getBoundingClientRect(), box.getBoundingClientRect()];
    if (inner.top < outer.top || inner.bottom > outer.bottom) {
      box.scrollTop += inner.top - outer.top - outer.height / 3;
    }
  }

  /** Paints the backgrounds of tokens by their values as keys, and the lines by those as queries. */
  function paintText() {
    const { query, key } = current();
    const scores = query === null || !view.grid ? data.scores[view.method.name] : null;
    const maximum = scores && scoreScale(scores);
    const row = query !== null && view.grid ? rowScale(query) : 0;
    const column = key !== null && view.grid ? columnScale(key) : 0;
    for (const list of lists) {
      const isKeys = list.axis === "key";
      list.elements.forEach((token, place) => {
        const ignored = isKeys && isIgnored(place);
        let fill = null;
        if (isKeys && !ignored) {
          if (scores) fill = colourOf(scores[place], maximum);
          else if (row && !Number.isNaN(valueAt(query, place))) fill = colourOf(valueAt(query, place), row);
        }
        const asQuery = column && (!separateQueries || !isKeys) ? valueAt(place, key) || 0 : 0;
        const line = asQuery ? `inset 0 -4px ${colourOf(asQuery, column, lineRamp()).css}` : "";
        // Each style is set only if it changes, which keeps long texts fast.
        const { style } = token;
        const background = fill ? fill.css : "";
        if (style.backgroundColor !== background) {
          style.backgroundColor = background;
          style.color = fill ? fill.ink : "";
        }
        if (token.line !== line) style.boxShadow = token.line = line;
        const classes = ["token"];
        if (place === query && (!separateQueries || !isKeys)) classes.push("query");
        if (place === key && isKeys) classes.push("key");
        if (ignored) classes.push("sink");
        if (token.className !== classes.join(" ")) token.className = classes.join(" ");
        const selected = String(state.selected[list.axis] === place);
        if (token.ariaSelected !== selected) token.ariaSelected = selected;
      });
    }
  }

  function paintLegend() {
    const { query, key } = current();
    const { ofTarget } = view.method;
    const unit = ofTarget ? `for ${answer}` : view.method.unit;
    const item = (colours, kind, text) => {
      const steps = [0, 51, 102, 153, 204, 255].map((i) => colours[i].css);
      const bar = createElement("i");
      bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
      return createElement("span", { className: `ramp ${kind}` }, bar, text);
    };
    const range = (maximum) => `0 to ${maximum}${unit && ` (${unit})`}`;
    const scores = data.scores[view.method.name];
    const items = [];
    let negative = view.negative;
    let what = null;
    let maximum = null;
    if (query !== null && view.grid) {
      what = `how much ${describeToken(queries[query], query)} draws from a token`;
      maximum = formatNumber(rowScale(query));
    } else if (scores) {
      negative ||= scores.some((score) => score < 0);
      what = `score of a token${scopeNote()}`;
      maximum = formatNumber(scoreScale(scores), 3);
    }
    if (what) items.push(item(ramps.blue, "", `${what}: ${range(maximum)}`));
    if (what && ofTarget) items.push(item(ramps.orange, "", `against ${answer}: 0 to −${maximum}`));
    else if (negative) items.push(item(ramps.orange, "", "negative"));
    if (key !== null && view.grid) {
      const token = describeToken(keys[key], key);
      items.push(item(lineRamp(), "line", `how much a token draws from ${token}: ` +
        range(formatNumber(columnScale(key)))));
    }
    element("legend").replaceChildren(...items);
  }

  // Map

  const map = element("map");
  const overview = element("overview");
  let layout = null; // see updateLayout; lengths are in CSS pixels

  /** Chooses the size of the cells, how many the map shows, and the size of the overview. */
  function updateLayout() {
    const width = element("maps").clientWidth;
    const phone = width < 500;
    const left = phone ? 84 : 112;
    const top = phone ? 76 : 92;
    const roomPerCell = Math.floor((Math.min(width, 760) - left - 30) / Math.max(S, T));
    const cell = Math.max(phone ? 20 : 22, Math.min(roomPerCell, 34));
    const fit = (space, count) => Math.min(count, Math.max(2, Math.floor(space / cell)));
    const complete = T <= 24 && S <= fit(width - left - 30, S);
    const beside = !complete && width > 820; // the overview, next to the map
    const overviewSize = complete ? 0 : Math.min(512, 12 * Math.max(S, T), beside ? width * 0.42 : width);
    const columns = fit((beside ? width - overviewSize - 18 : width) - left - 30, S);
    const rows = Math.min(T, complete ? 24 : Math.max(columns, 8));
    layout = { cell, left, top, columns, rows, complete, overviewSize };
  }

  /** Clears a canvas of a size in CSS pixels, which is sharp on screens with more pixels. */
  function prepareCanvas(canvas, width, height) {
    const ratio = devicePixelRatio || 1;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) {
      Object.assign(canvas, { width: w, height: h });
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  /**
   * Moves the part that the map shows, if the selection is outside of it. In language models a token
   * draws from earlier tokens, so the part has more of the keys before the selected one, and more of
   * the queries after it.
   */
  function moveWindow() {
    const axes = [["query", T, layout.rows, 0.25], ["key", S, layout.columns, 0.75]];
    for (const [axis, count, shown, part] of axes) {
      const place = state.selected[axis];
      const start = state.window[axis];
      const visible = place === null || (place >= start && place < start + shown);
      const wanted = visible ? start : place - Math.floor(shown * part);
      state.window[axis] = Math.max(0, Math.min(wanted, count - shown));
    }
  }

  function paintMap() {
    if (!view.grid || !element("maps").clientWidth) return; // a hidden frame has no width
    updateLayout();
    moveWindow();
    overview.hidden = layout.complete;
    if (!layout.complete) paintOverview();
    const { cell, left, top, rows, columns } = layout;
    const context = prepareCanvas(map, left + columns * cell + 30, top + rows * cell + 2);
    const { query, key } = current();
    const first = state.window;
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (let r = 0; r < rows; r++) {
      const place = first.query + r;
      const position = { x: left - 6, y: top + (r + 0.5) * cell, room: left - 10 };
      drawLabel(context, queries[place], position, { bold: place === query });
    }
    for (let c = 0; c < columns; c++) {
      const place = first.key + c;
      const position = { x: left + (c + 0.5) * cell, y: top - 6, room: top - 12 };
      drawLabel(context, keys[place], position,
        { slanted: true, bold: place === key, struck: isIgnored(place) });
    }
    for (let r = 0; r < rows; r++) {
      const scale = rowScale(first.query + r);
      for (let c = 0; c < columns; c++) {
        const ignored = isIgnored(first.key + c);
        const value = valueAt(first.query + r, first.key + c);
        if (Number.isNaN(value) && !ignored) continue;
        context.fillStyle = ignored ? ramps.panel : colourOf(value, scale).css;
        context.fillRect(left + c * cell, top + r * cell, cell - 1, cell - 1);
      }
    }
    context.strokeStyle = ramps.line;
    context.lineWidth = 1;
    context.strokeRect(left - 1.5, top - 1.5, columns * cell + 2, rows * cell + 2);
    paintSelection(context);
  }

  /** Frames the row, the column and the cell that are selected. */
  function paintSelection(context) {
    const { cell, left, top, rows, columns } = layout;
    const { query, key, cell: isCell } = current();
    const r = query === null ? -1 : query - state.window.query;
    const c = key === null ? -1 : key - state.window.key;
    const inRows = r >= 0 && r < rows;
    const inColumns = c >= 0 && c < columns;
    context.strokeStyle = ramps.ink;
    context.lineWidth = 1.5;
    context.setLineDash([3, 3]);
    if (inRows) context.strokeRect(left - 1, top + r * cell - 1, columns * cell + 1, cell + 1);
    if (inColumns) context.strokeRect(left + c * cell - 1, top - 1, cell + 1, rows * cell + 1);
    context.setLineDash([]);
    context.lineWidth = 3;
    if (inRows && inColumns && isCell) {
      context.strokeRect(left + c * cell - 1, top + r * cell - 1, cell + 1, cell + 1);
    }
  }

  /** Writes a token beside the map, shortened to the room that it has. */
  function drawLabel(context, token, { x, y, room }, { slanted = false, bold, struck = false }) {
    const letters = Array.from(token.slice(0, 60).trim() || token);
    let text = letters.join("");
    for (let n = letters.length - 1; n > 0 && context.measureText(text).width > room; n--) {
      text = `${letters.slice(0, n).join("")}…`;
    }
    context.save();
    context.translate(x, y);
    if (slanted) context.rotate(-Math.PI / 3);
    context.textAlign = slanted ? "left" : "right";
    context.fillStyle = bold ? ramps.ink : ramps.faint;
    if (bold) context.font = "bold 12px system-ui, sans-serif";
    context.fillText(text, 0, 0);
    if (struck) context.fillRect(0, -0.5, context.measureText(text).width, 1.2);
    context.restore();
  }

  /** Paints the whole map, with a frame around the part that the map shows. */
  function paintOverview() {
    const side = layout.overviewSize;
    const width = S >= T ? side : Math.max(60, (side * S) / T);
    const height = T >= S ? side : Math.max(60, (side * T) / S);
    const context = prepareCanvas(overview, width, height);
    if (!picture) picture = drawPicture();
    context.imageSmoothingEnabled = width * devicePixelRatio < S;
    context.drawImage(picture, 0, 0, width, height);
    const [x, y] = [width / S, height / T]; // the size of a cell
    const { query, key } = current();
    const { window: first } = state;
    context.strokeStyle = ramps.ink;
    context.lineWidth = 1.5;
    context.strokeRect(first.key * x, first.query * y, layout.columns * x, layout.rows * y);
    context.globalAlpha = 0.6;
    context.lineWidth = 1;
    context.beginPath();
    if (query !== null) addLine(context, 0, (query + 0.5) * y, width, (query + 0.5) * y);
    if (key !== null) addLine(context, (key + 0.5) * x, 0, (key + 0.5) * x, height);
    context.stroke();
    context.globalAlpha = 1;
  }

  function addLine(context, x0, y0, x1, y1) {
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
  }

  /** Draws the whole map with one pixel per cell. */
  function drawPicture() {
    const canvas = new OffscreenCanvas(S, T);
    const context = canvas.getContext("2d");
    const image = context.createImageData(S, T);
    for (let query = 0, i = 0; query < T; query++) {
      const scale = rowScale(query);
      for (let key = 0; key < S; key++, i++) {
        if (Number.isNaN(view.grid[i]) || isIgnored(key)) continue;
        const { rgb } = colourOf(view.grid[i], scale);
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = rgb[c];
        image.data[4 * i + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  /** The cell of the map under the pointer, or null. */
  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - layout.left) / layout.cell);
    const r = Math.floor((event.clientY - box.top - layout.top) / layout.cell);
    if (c < 0 || r < 0 || c >= layout.columns || r >= layout.rows) return null;
    return { query: state.window.query + r, key: state.window.key + c, cell: true };
  }
  map.addEventListener("pointermove", (event) => {
    const cell = cellAt(event);
    const { query, key } = state.hovered ?? NO_SELECTION;
    if (cell?.query === query && cell?.key === key) return;
    state.hovered = cell;
    paint();
  });
  map.addEventListener("pointerleave", () => {
    state.hovered = null;
    paint();
  });
  map.addEventListener("click", (event) => cellAt(event) && select(cellAt(event)));

  const clamp = (place, count) => Math.max(0, Math.min(count - 1, place));
  const selectInOverview = (event) => {
    const box = overview.getBoundingClientRect();
    select({
      query: clamp(Math.floor(((event.clientY - box.top) / box.height) * T), T),
      key: clamp(Math.floor(((event.clientX - box.left) / box.width) * S), S),
      cell: true,
    });
  };
  overview.addEventListener("click", selectInOverview);
  overview.addEventListener("pointermove", (event) => event.buttons === 1 && selectInOverview(event));

  map.addEventListener("keydown", (event) => {
    const step = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -S], End: [0, S],
    }[event.key];
    if (!step) return;
    event.preventDefault();
    const { query, key } = state.selected;
    const start = query === null && key === null;
    select({
      query: start ? state.window.query : clamp((query ?? 0) + step[0], T),
      key: start ? state.window.key : clamp((key ?? 0) + step[1], S),
      cell: true,
    });
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") select(NO_SELECTION);
  });

  // Details

  /** The five places with the largest absolute values, and their values; zeros are left out. */
  function topFive(count, value, isSkipped) {
    const places = [];
    for (let i = 0; i < count; i++) if (value(i) && !isSkipped(i)) places.push(i);
    places.sort((a, b) => Math.abs(value(b)) - Math.abs(value(a)) || a - b);
    return places.slice(0, 5).map((i) => [i, value(i)]);
  }
  const topKeys = (query) => topFive(S, (key) => valueAt(query, key), isIgnored);
  const topQueries = (key) => topFive(T, (query) => valueAt(query, key), () => false);

  function paintDetails() {
    const { query, key } = current();
    const isCell = current().cell && view.grid !== null;
    const parts = [];
    if (query === null && key === null) {
      const scores = view.method.ofTarget && data.scores[view.method.name];
      parts.push(...(scores ? strongestTokens(scores) : [createElement("h2", {}, "Nothing selected")]),
        createElement("p", { className: "hint" }, "Select a token or a cell of the map to see its numbers."));
    } else if (isCell) parts.push(...cellDetails(query, key));
    if (query !== null && !(isCell && separateQueries)) parts.push(...queryDetails(query, isCell));
    if (key !== null && !isCell) parts.push(...keyDetails(key));
    element("details").replaceChildren(...parts);
  }

  /** The tokens with the largest scores for the target, and those against it. */
  function strongestTokens(scores) {
    const list = (sign, title) => {
      const top = topFive(S, (key) => scores[key], (key) => isIgnored(key) || sign * scores[key] <= 0);
      const entries = top.map(([key, score]) => {
        const name = describeToken(keys[key], key);
        const show = () => {
          lists[0].elements[key].focus();
          select(selectionOf(lists[0], key));
        };
        const button = createElement("button", { type: "button", onclick: show }, name);
        return [button, formatNumber(score, 3), "", name];
      });
      return [createElement("h3", {}, title), top.length ? definitionList(entries) : "None"];
    };
    return [createElement("h2", {}, "Strongest tokens"),
      ...list(1, `For ${answer}`), ...list(-1, `Against ${answer}`)];
  }

  function cellDetails(query, key) {
    const title = createElement("h2", {},
      "Query ", quote(queries[query]), ` (${query}), key `, quote(keys[key]), ` (${key})`);
    if (view.layer) {
      const i = keptIndex(query, key);
      if (i !== null) return [title, factorList(i, query)];
      const notKept = view.layer.K < S
        ? `, or the key is not among the ${view.layer.K} keys that are kept for this query` : "";
      return [title, createElement("p", {}, `The query does not see this key${notKept}.`)];
    }
    const list = createElement("div");
    const methods = data.methods.filter(({ name }) => data.maps.includes(name));
    Promise.all(methods.map(({ name }) => loadMap(name))).then((grids) => {
      list.replaceChildren(valueList(methods.map((method, n) =>
        [method, formatNumber(grids[n][query * S + key])])));
    });
    return [title, list];
  }

  /** A contribution as the product of its factors, and the other measures of the head. */
  function factorList(i, query) {
    const { attention, relativeNorm, contribution } = view.layer;
    const length = attention[i] * relativeNorm[i];
    const cosine = length ? Math.max(-1, Math.min(1, contribution[i] / length)) : 0;
    const values = [attention[i], relativeNorm[i], cosine, contribution[i]];
    const signs = ["", "× ", "× ", "= "];
    const product = data.factors.map(({ label, about }, n) =>
      [signs[n] + label, formatNumber(values[n]), n === 3 ? "product" : "", about]);
    const others = data.methods.filter(({ name, ofHeads }) =>
      ofHeads && !data.factors.some((factor) => factor.name === name));
    return createElement("div", {},
      definitionList([...product, ...others.map(({ name, label, about }) =>
        [label, formatNumber(HEAD_MEASURES[name](view.layer, i, query)), "", about])]),
      createElement("p", { className: "hint" }, EIGHT_BITS));
  }

  /** The scores of a token by all methods. */
  function scoreList(place) {
    const methods = data.methods.filter(({ name }) => data.scores[name]);
    return [createElement("h3", {}, `Score${scopeNote()}`), valueList(
      methods.map((method) => [method, formatNumber(data.scores[method.name][place], 3)]))];
  }

  function queryDetails(query, isCell) {
    const parts = [createElement(isCell ? "h3" : "h2", {},
      isCell ? "Query " : "", quote(queries[query]), ` (${query})`)];
    if (!separateQueries && !isCell && data.scores[view.method.name]) parts.push(...scoreList(query));
    const probability = data.probability && formatPercent(data.probability[query]);
    if (data.predicted) {
      parts.push(createElement("p", {}, "The model expects ", quote(data.predicted[query]),
        ` next${probability ? ` (${probability})` : ""}.`));
    } else if (probability) {
      parts.push(createElement("p", {}, `The model gave it a probability of ${probability}.`));
    }
    if (view.grid) {
      parts.push(createElement("h3", {}, "Top keys (what it draws from)"), definitionList(
        topKeys(query).map(([key, value]) => [describeToken(keys[key], key), formatNumber(value)])));
    }
    if (view.layer) parts.push(createElement("p", { className: "hint" }, keptNote(query)));
    return parts;
  }

  /** How much of a query the keys that are kept account for. */
  function keptNote(query) {
    const { K, attentionKept, contributionKept, share } = view.layer;
    const row = view.head * T + query;
    if (K >= S) return "All keys of this head are kept.";
    return `Of a single head, the page keeps the ${K} keys that matter most to each query. For this ` +
      `query, they have ${formatPercent(attentionKept[row])} of the attention. Their contributions ` +
      `sum to ${formatNumber(contributionKept[row], 3)}, and those of all keys to ` +
      `${formatNumber(share[row], 3)}.`;
  }

  function keyDetails(key) {
    const parts = [];
    if (separateQueries) {
      parts.push(createElement("h2", {}, quote(keys[key]), ` (${key})`));
      if (Object.keys(data.scores).length) parts.push(...scoreList(key));
    }
    if (view.grid) {
      parts.push(createElement("h3", {}, "Top queries (what draws from it)"), definitionList(
        topQueries(key).map(([query, value]) =>
          [describeToken(queries[query], query), formatNumber(value)])));
    }
    return parts;
  }

  /** Tells screen readers what is selected or has the focus. */
  function announce() {
    const { query, key, cell } = current();
    let words = "Nothing selected.";
    if (cell && view.grid) {
      words = `Query ${describeToken(queries[query], query)}, key ${describeToken(keys[key], key)}: ` +
        `${view.method.label} ${formatNumber(valueAt(query, key))}.`;
    } else if (query !== null || key !== null) {
      const score = data.scores[view.method.name]?.[key];
      words = `${query === null ? describeToken(keys[key], key) : describeToken(queries[query], query)}.`;
      if (score !== undefined) words += ` Score ${formatNumber(score, 3)}.`;
      if (query !== null && view.grid) {
        const top = topKeys(query).slice(0, 3)
          .map(([place, value]) => `${describeToken(keys[place], place)} ${formatNumber(value)}`);
        words += ` Top keys: ${top.join(", ")}.`;
      }
    }
    element("status").textContent = words;
  }

  // Controls

  function createOption(value, text, disabled = false) {
    return createElement("option", { value, disabled }, text);
  }

  function showControls() {
    const { method } = state;
    const hasMap = data.maps.includes(method.name);
    const aggregation = !view.layer && (view.grid || data.maps.length) ? ` ${method.aggregation}` : "";
    element("about").textContent = `${method.about}${aggregation}`;
    element("method").value = data.methods.indexOf(method);
    element("layer").replaceChildren(
      createOption(ALL, hasMap ? "all layers and heads" : "–", !hasMap),
      ...data.layers.map(({ name }, n) => createOption(n, `${n} · ${name}`, !method.ofHeads)),
    );
    element("layer").value = state.layer;
    element("head").disabled = view.layer === null;
    element("map-part").hidden = !view.grid;
    element("scale").disabled = !view.grid;
    const { ofTarget } = method;
    element("text-hint").textContent = (ofTarget ? `${namesHues("tokens")} ` : "") + (view.grid
      ? "Point at a token to select it. The background of each token then shows how much the selected " +
        "token draws from that token" + (ofTarget ? `, for ${answer} or against it` : "") + ". The line " +
        "below a token shows how much that token draws from the selected one."
      : "Point at a token to see its scores.") +
      " Click or press Enter to keep the selection, and Escape to clear it.";
    element("map-hint").textContent = (ofTarget ? `${namesHues("cells")} Rows are queries. `
      : "Rows are queries: the tokens whose output is explained. ") + "Columns are keys: the tokens that " +
      "a query draws from. Point at a cell to see its numbers, or move with the arrow keys." +
      (view.layer && view.layer.K < S
        ? " A cell is blank if the query does not see the key, or if the key is not among the " +
          `${view.layer.K} that are kept for each query.` : "");
    showHeads();
  }

  /** Lists the heads, with their share of the layer's output at the selected query. */
  function showHeads() {
    if (!view.layer) {
      element("head").replaceChildren(createOption(0, "all"));
      return;
    }
    const { query } = state.selected;
    const heads = Array.from({ length: data.layers[view.number].heads }, (_, head) => {
      const share = query === null ? ""
        : `: ${formatPercent(view.layer.share[head * T + query])} of the layer's output`;
      return createOption(head, `${head}${share}`);
    });
    element("head").replaceChildren(...heads);
    element("head").value = state.head;
  }

  function paint() {
    paintText();
    paintLegend();
    paintMap();
    paintDetails();
  }

  function onChange(id, change) {
    element(id).addEventListener("change", () => change(element(id)));
  }
  onChange("method", ({ value }) => {
    const before = state.method.ofTarget;
    state.method = data.methods[value];
    if (state.method.ofTarget !== before) resetScale();
    load();
  });
  /** The rows of contributions to a target are in one unit, so that their colours can be compared. */
  function resetScale() {
    element("scale").value = state.scale = state.method.ofTarget ? "map" : "row";
  }
  onChange("layer", ({ value }) => { state.layer = value === ALL ? ALL : Number(value); load(); });
  onChange("head", ({ value }) => { state.head = Number(value); load(); });
  onChange("scale", ({ value }) => { state.scale = value; updateScale(); });
  onChange("sinks", ({ checked }) => { state.ignoreSinks = checked; updateScale(); });
  let hostTheme = ""; // the theme of a notebook, which Chromium does not pass on to its frames
  function showTheme() {
    const theme = element("theme").value || hostTheme;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    findRamps();
    paint();
  }
  onChange("theme", showTheme);
  prefersDark.addEventListener("change", showTheme);
  addEventListener("message", (event) => {
    if (!["light", "dark"].includes(event.data)) return;
    hostTheme = event.data;
    showTheme();
  });
  addEventListener("resize", () => paintMap());
  element("controls").addEventListener("submit", (event) => event.preventDefault());

  /** Names the sinks: `the first token ("In")`, `tokens 0 ("In"), 3 (",")` or `4 tokens`. */
  function describeSinks() {
    const { sinks } = data;
    if (sinks.length > 3) return `${sinks.length} tokens`;
    const name = (place) => `(“${shorten(trim(keys[place]))}”)`;
    if (sinks.length === 1 && sinks[0] === 0) return `the first token ${name(0)}`;
    const names = sinks.map((place) => `${place} ${name(place)}`).join(", ");
    return `token${sinks.length > 1 ? "s" : ""} ${names}`;
  }

  /** Asks the question about the target, and says how probable the answer is. */
  function showQuestion() {
    const { target, contrast } = data.settings;
    const list = (about, between) => [...about(target, "target"),
      ...(contrast ? [between, ...about(contrast, "contrast")] : [])];
    const quoted = (token) => [quote(trim(token))];
    const probability = (token, role) => [...quoted(token),
      ` has a probability of ${formatNumber(Number(data.settings[`${role} probability`]), 2)}`];
    element("title").replaceChildren("Why ", ...list(quoted, ", and not "), "?");
    const value = formatNumber(Number(data.settings["target value"]), 4);
    element("answer").hidden = !("target value" in data.settings);
    element("answer").replaceChildren(
      ...("target probability" in data.settings ? [...list(probability, ", and "), ". "] : []),
      contrast ? `The difference of their logits is ${value}.` : `Its logit is ${value}.`);
    if (!state.method.ofTarget) return;
    state.window = { query: T, key: S }; // the end, where the prediction is made
    if (data.predicted) element("tokens").scrollTop = element("tokens").scrollHeight;
  }

  // Start

  element("method").append(...data.methods.map(({ label }, n) => createOption(n, label)));
  resetScale();
  element("query-part").hidden = !separateQueries;
  element("sink-label").hidden = !data.sinks.length;
  element("sink-names").textContent = describeSinks();
  element("sink-label").title = "Attention sinks receive much attention and can set the colour scale. If it " +
    "ignores them, the differences between the other tokens become visible.";
  const hasMaps = data.maps.length || data.layers.length;
  element("title").textContent = hasMaps ? "Which tokens each token draws from" : "Token scores";
  if (data.settings.target) showQuestion();
  document.querySelectorAll("label.of-maps").forEach((label) => (label.hidden = !hasMaps));
  const settings = Object.entries(data.settings).map(([name, value]) => `${name}: ${value}`);
  element("settings").textContent = ["Made with captum_cw", ...settings].join(" · ");
  findRamps();
  load();
})();
