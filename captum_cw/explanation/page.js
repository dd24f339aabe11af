// What the page does. The state is one object; whatever changes it calls load() or paint().
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("data").textContent);
  const blobs = document.querySelectorAll(".blob");
  const crossed = data.queries !== null;
  const visible = (tokens) => tokens.map((token) => token || "∅");
  const keys = visible(data.tokens);
  const queries = visible(data.queries ?? keys);
  const S = keys.length;
  const T = queries.length;
  const sinks = new Set(data.sinks);
  const TOGETHER = "";
  const NOTHING = { query: null, key: null, cell: false };
  const EIGHT_BITS = "Kept in 8 bits: attention and norm are off by at most 0.6% of the largest of their " +
    "row, the contribution by 1.2%. The rest follows from these, the cosine to about ±0.05.";

  const state = {
    method: data.methods.find(({ name }) =>
      name === "contribution" && (data.maps.includes(name) || !data.maps.length)) ?? data.methods[0],
    layer: TOGETHER, // or the number of a layer
    head: 0,
    scale: "row",
    leaveOut: false,
    chosen: NOTHING,
    pointed: null, // by mouse or focus; passes, and counts before what is chosen
    window: { query: 0, key: 0 }, // the first row and column that the map shows
  };
  // What the state asks for, unpacked; largest is of each row, and most of all.
  let view = { method: state.method, grid: null, layer: null, largest: [], most: 0, negative: false };
  let ramps = null;
  let picture = null; // the whole map, a pixel a cell
  const current = () => state.pointed ?? state.chosen;

  // Numbers, as explanation/page.py packs them

  const once = (make) => {
    const made = new Map();
    return (key) => made.get(key) ?? made.set(key, make(key)).get(key);
  };

  async function unpack(number) {
    const text = atob(blobs[number].textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    let at = 0;
    return (Type, length) => {
      const array = new Type(buffer, at, length);
      at += array.byteLength;
      return array;
    };
  }

  const mapOf = once(async (name) => {
    const take = await unpack(data.maps.indexOf(name));
    const largest = take(Float32Array, T);
    const [low, high] = [take(Uint8Array, T * S), take(Uint8Array, T * S)];
    const grid = new Float32Array(T * S);
    for (let query = 0, i = 0; query < T; query++) {
      const unit = largest[query] / 32767;
      for (const end = i + S; i < end; i++) {
        grid[i] = unit * (((low[i] | (high[i] << 8)) << 16) >> 16);
      }
    }
    return grid;
  });

  const layerOf = once(async (number) => {
    const { heads: H, kept: K, negative } = data.layers[number];
    const take = await unpack(data.maps.length + number);
    const rows = H * T;
    const layer = { K, norm: take(Float32Array, T) };
    for (const name of ["share", "attentionKept", "contributionKept"]) {
      layer[name] = take(Float32Array, rows);
    }
    const largest = [0, 1, 2].map(() => take(Float32Array, rows));
    const [low, high] = [take(Uint8Array, rows * K), take(Uint8Array, rows * K)];
    layer.keys = new Uint16Array(rows * K);
    for (let i = 0; i < rows * K; i++) {
      layer.keys[i] = (low[i] | (high[i] << 8)) + (i % K ? layer.keys[i - 1] : 0);
    }
    const numbers = (of, signed) => {
      const share = Float32Array.from({ length: 256 }, (_, byte) =>
        (signed ? ((byte << 24) >> 24) / 127 : byte / 255) ** 3);
      const coded = take(Uint8Array, rows * K);
      const found = new Float32Array(rows * K);
      for (let row = 0, i = 0; row < rows; row++) {
        for (const end = i + K; i < end; i++) found[i] = largest[of][row] * share[coded[i]];
      }
      return found;
    };
    layer.attention = numbers(0, negative);
    layer.relativeNorm = numbers(1, false);
    layer.contribution = numbers(2, true);
    return layer;
  });

  const MEASURES = {
    attention: (layer, i) => layer.attention[i],
    vwon: (layer, i) => Math.abs(layer.attention[i]) * layer.relativeNorm[i],
    vw: (layer, i, query) => MEASURES.vwon(layer, i) * layer.norm[query],
    "contribution-signed": (layer, i) => layer.contribution[i],
    contribution: (layer, i) => Math.abs(layer.contribution[i]),
  };

  /** Of one head, NaN where a key was not kept. */
  function headGrid(layer, head, measure) {
    const grid = new Float32Array(T * S).fill(NaN);
    for (let query = 0; query < T; query++) {
      const start = (head * T + query) * layer.K;
      for (let i = start; i < start + layer.K; i++) {
        if (layer.attention[i] !== 0) {
          grid[query * S + layer.keys[i]] = MEASURES[measure](layer, i, query);
        }
      }
    }
    return grid;
  }

  /** The place of a key among those kept for a query of the chosen head, or null. */
  function keptAt(query, key) {
    const start = (view.head * T + query) * view.layer.K;
    for (let i = start; i < start + view.layer.K; i++) {
      if (view.layer.keys[i] === key && view.layer.attention[i] !== 0) return i;
    }
    return null;
  }

  let turn = 0;

  /** Unpacks what the state asks for, then shows it, unless something else was asked meanwhile. */
  async function unpackAndShow() {
    const mine = ++turn;
    const { name, ofHeads } = state.method;
    if (state.layer === TOGETHER && !data.maps.includes(name) && ofHeads && data.layers.length) {
      state.layer = 0;
    }
    if (state.layer !== TOGETHER && !ofHeads) state.layer = TOGETHER;
    const layer = state.layer === TOGETHER ? null : await layerOf(state.layer);
    let grid = null;
    if (!layer && data.maps.includes(name)) grid = await mapOf(name);
    if (mine !== turn) return;
    if (layer) {
      state.head = Math.min(state.head, data.layers[state.layer].heads - 1);
      grid = headGrid(layer, state.head, name);
    }
    // What painters read: the state may be ahead of it.
    view = { grid, layer, method: state.method, number: state.layer, head: state.head };
    showControls();
    rescale();
  }

  function load() {
    unpackAndShow().catch((error) => {
      element("about").textContent =
        `This cannot be shown: ${error.message}. Save the page again, or use a newer browser.`;
    });
  }

  /** Finds what the darkest colours stand for. */
  function rescale() {
    view.largest = new Float32Array(T);
    view.negative = false;
    if (view.grid) {
      for (let query = 0, i = 0; query < T; query++) {
        let most = 0;
        for (let key = 0; key < S; key++, i++) {
          const x = view.grid[i];
          if (x < 0) view.negative = true;
          if (Math.abs(x) > most && !left(key)) most = Math.abs(x);
        }
        view.largest[query] = most;
      }
    }
    view.most = view.largest.reduce((a, b) => Math.max(a, b), 0);
    picture = null;
    paint();
  }

  const left = (key) => state.leaveOut && sinks.has(key);
  const at = (query, key) => view.grid[query * S + key];
  const rowScale = (query) => (state.scale === "row" ? view.largest[query] : view.most);
  function columnScale(key) {
    if (state.scale === "map") return view.most;
    let most = 0;
    for (let query = 0; query < T; query++) most = Math.max(most, Math.abs(at(query, key)) || 0);
    return most;
  }

  // Colours: of even steps in lightness, one hue for a size, blue and orange for signs

  const dark = matchMedia("(prefers-color-scheme: dark)");
  function findRamps() {
    const theme = document.documentElement.dataset.theme;
    const night = theme ? theme === "dark" : dark.matches;
    const [from, to, chroma] = night ? [0.27, 0.86, 0.12] : [0.96, 0.48, 0.16];
    // Asked of the style: a canvas, read back, is noise in browsers that guard against fingerprints.
    const ramp = (hue) => {
      const steps = Array.from({ length: 256 }, (_, i) => {
        const x = i / 255;
        const wanted = `oklch(${from + (to - from) * x} ${0.008 + chroma * Math.sqrt(x)} ${hue})`;
        const step = make("i");
        step.style.color = `color-mix(in srgb, ${wanted}, ${wanted})`;
        return step;
      });
      const hidden = make("div", { hidden: true }, ...steps);
      document.body.append(hidden);
      const found = steps.map((step) => {
        const parts = getComputedStyle(step).color.slice("color(srgb ".length, -1).split(" ");
        const [r, g, b] = parts.map((part) => Math.round(255 * Math.max(0, Math.min(1, part))));
        return { rgb: [r, g, b], css: `rgb(${r}, ${g}, ${b})`, ink: ink(r, g, b) };
      });
      hidden.remove();
      return found;
    };
    const of = (id, name) => getComputedStyle(element(id))[name];
    ramps = {
      blue: ramp(255),
      orange: ramp(60),
      ink: of("about", "color"),
      faint: of("settings", "color"),
      line: of("settings", "borderTopColor"),
      panel: of("controls", "backgroundColor"),
      paper: getComputedStyle(document.body).backgroundColor,
    };
    picture = null;
  }

  /** Black or white, whichever has more contrast (WCAG). */
  function ink(...rgb) {
    const [r, g, b] = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
  }

  function colour(x, scale, positive = ramps.blue) {
    const share = scale > 0 ? Math.min(Math.abs(x) / scale, 1) : 0;
    return (x < 0 ? ramps.orange : positive)[Math.round(share * 255)];
  }

  const fedRamp = () => (view.negative ? ramps.blue : ramps.orange);

  // Words

  const digits = () => (view.layer ? 2 : 3);
  function figure(x, precision = digits()) {
    if (!Number.isFinite(x)) return "–";
    return Number(x.toPrecision(precision)).toString().replace("-", "−").replace("e−", "e-");
  }
  const percent = (x) => `${figure(100 * x, 2)}%`;
  /** A token of bearable length; whole it stands in the text. */
  function short(token) {
    const letters = Array.from(token);
    return letters.length > 40 ? `${letters.slice(0, 39).join("")}…` : token;
  }
  const spoken = (token, place) => `${place} “${short(token)}”`;
  const whole = () => (view.layer ? " in the whole model" : "");

  function make(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  const quoted = (token) => make("bdi", { className: "quote" }, `“${short(token)}”`);
  const rows = (entries) =>
    make("dl", { className: "rows" }, ...entries.flatMap(([name, value, kind = ""]) => [
      make("dt", { className: kind, title: name }, name),
      make("dd", { className: kind }, value),
    ]));

  // Text

  const lists = [{ box: element("tokens"), side: "key", tokens: keys }];
  if (crossed) lists.push({ box: element("queries"), side: "query", tokens: queries });
  for (const list of lists) {
    list.elements = list.tokens.map((token, place) => {
      const made = make("span", { className: "token", tabIndex: place ? -1 : 0 }, token);
      made.setAttribute("role", "option");
      made.dataset.place = place;
      list.box.append(made);
      if (token.endsWith("⏎")) list.box.append(make("br"));
      return made;
    });
    listen(list);
  }

  /** Where a token of the text leads: to its row and column, or to one of them. */
  function placeOf(list, place) {
    if (!crossed) return { query: place, key: place, cell: false };
    const merged = { ...state.chosen, [list.side]: place };
    return { ...merged, cell: merged.query !== null && merged.key !== null };
  }

  function listen(list) {
    const { box, elements } = list;
    const under = (event) => event.target.closest(".token");
    let pointedAt = null;
    const point = (token) => {
      state.pointed = token && placeOf(list, Number(token.dataset.place));
      paint();
    };
    // Not pointerover, which comes when the page moves under a mouse that rests.
    box.addEventListener("pointermove", (event) => {
      const token = under(event);
      if (token && token !== pointedAt) point(token);
      pointedAt = token;
    });
    box.addEventListener("pointerleave", () => {
      pointedAt = null;
      point(null);
    });
    box.addEventListener("focusin", (event) => {
      if (!under(event)) return; // a box that scrolls takes the focus in some browsers
      point(under(event));
      elements.forEach((x) => (x.tabIndex = x === under(event) ? 0 : -1));
      say();
    });
    box.addEventListener("focusout", () => point(null));
    box.addEventListener("click", (event) => under(event) && chooseToken(list, under(event)));
    box.addEventListener("keydown", (event) => {
      const token = under(event);
      if (!token) return;
      const place = Number(token.dataset.place);
      const forward = getComputedStyle(box).direction === "rtl" ? -1 : 1;
      const next = {
        ArrowRight: () => elements[place + forward],
        ArrowLeft: () => elements[place - forward],
        ArrowDown: () => inLine(elements, token, 1),
        ArrowUp: () => inLine(elements, token, -1),
        Home: () => elements[0],
        End: () => elements.at(-1),
      }[event.key];
      if (next) next()?.focus();
      else if (event.key === "Enter" || event.key === " ") chooseToken(list, token);
      else return;
      event.preventDefault();
    });
  }

  /** The token that stands nearest in the next line, or the one before. */
  function inLine(elements, from, direction) {
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

  function chooseToken(list, token) {
    const place = Number(token.dataset.place);
    const { query, key, cell } = state.chosen;
    const again = crossed ? state.chosen[list.side] === place : !cell && query === place;
    if (!again) choose(placeOf(list, place));
    else choose(crossed ? { query, key, cell: false, [list.side]: null } : NOTHING);
  }

  function choose(place) {
    state.chosen = place;
    state.pointed = null;
    for (const { box, side, elements } of lists) {
      if (place[side] !== null) reveal(box, elements[crossed || !place.cell ? place[side] : place.query]);
    }
    showHeads();
    paint();
    say();
  }

  /** Scrolls the text alone; the page stays where it is. */
  function reveal(box, token) {
    const [inner, outer] = [token.getBoundingClientRect(), box.getBoundingClientRect()];
    if (inner.top < outer.top || inner.bottom > outer.bottom) {
      box.scrollTop += inner.top - outer.top - outer.height / 3;
    }
  }

  function paintText() {
    const { query, key } = current();
    const scores = data.scores[view.method.name];
    const scored = query === null || !view.grid ? scores : null;
    const most = scored && Math.max(...scored.map((x, i) => (left(i) ? 0 : Math.abs(x))));
    const row = query !== null && view.grid ? rowScale(query) : 0;
    const column = key !== null && view.grid ? columnScale(key) : 0;
    for (const list of lists) {
      list.elements.forEach((token, place) => {
        const ofKey = list.side === "key";
        let fill = null;
        if (ofKey && !left(place)) {
          if (scored) fill = colour(scored[place], most);
          else if (row && !Number.isNaN(at(query, place))) fill = colour(at(query, place), row);
        }
        const fed = column && (!crossed || !ofKey) ? at(place, key) || 0 : 0;
        const line = fed ? `inset 0 -4px ${colour(fed, column, fedRamp()).css}` : "";
        const style = token.style;
        const background = fill ? fill.css : "";
        if (style.backgroundColor !== background) {
          style.backgroundColor = background;
          style.color = fill ? fill.ink : "";
        }
        if (token.line !== line) style.boxShadow = token.line = line;
        const isQuery = place === query && (!crossed || !ofKey);
        const isKey = place === key && ofKey;
        const name = `token${isQuery ? " query" : ""}${isKey ? " key" : ""}`;
        const full = ofKey && left(place) ? `${name} sink` : name;
        if (token.className !== full) token.className = full;
        const chosen = String(state.chosen[list.side] === place);
        if (token.ariaSelected !== chosen) token.ariaSelected = chosen;
      });
    }
  }

  function paintLegend() {
    const { query, key } = current();
    const ramp = (colours, kind, ...words) => {
      const steps = [0, 51, 102, 153, 204, 255].map((i) => colours[i].css);
      const bar = make("i");
      bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
      return make("span", { className: `ramp ${kind}` }, bar, ...words);
    };
    const scores = data.scores[view.method.name];
    const parts = [];
    let signs = view.negative;
    if (query === null || !view.grid) {
      if (scores) {
        signs ||= scores.some((x) => x < 0);
        const most = Math.max(...scores.map((x, i) => (left(i) ? 0 : Math.abs(x))));
        parts.push(ramp(ramps.blue, "", `score of the token${whole()}: 0 to ${figure(most, 3)}`));
      }
    } else {
      const most = figure(rowScale(query));
      parts.push(ramp(ramps.blue, "", `${spoken(queries[query], query)} drew from it: 0 to ${most}`));
    }
    if (signs) parts.push(ramp(ramps.orange, "", "below zero"));
    if (key !== null && view.grid) {
      const most = figure(columnScale(key));
      parts.push(ramp(fedRamp(), "line", `it drew from ${spoken(keys[key], key)}: 0 to ${most}`));
    }
    element("legend").replaceChildren(...parts);
  }

  // Map

  const map = element("map");
  const overview = element("overview");
  let size = null; // of the map, in CSS pixels

  function measure() {
    const width = element("maps").clientWidth;
    const phone = width < 500;
    const left = phone ? 84 : 112;
    const top = phone ? 76 : 92;
    const roomy = Math.floor((Math.min(width, 760) - left - 30) / Math.max(S, T));
    const cell = Math.max(phone ? 20 : 22, Math.min(roomy, 34));
    const fit = (space, count) => Math.min(count, Math.max(2, Math.floor(space / cell)));
    const whole = T <= 24 && S <= fit(width - left - 30, S);
    const beside = !whole && width > 820;
    const side = whole ? 0 : Math.min(512, 12 * Math.max(S, T), beside ? width * 0.42 : width);
    const across = fit((beside ? width - side - 18 : width) - left - 30, S);
    size = { cell, left, top, across, down: Math.min(T, whole ? 24 : Math.max(across, 8)), whole, side };
  }

  function sharp(canvas, width, height) {
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
   * Moves the window to what is chosen, unless it shows it already: with more room for the keys
   * before it and the queries after it, where the map of a language model is filled.
   */
  function follow() {
    const sides = [["query", T, size.down, 0.25], ["key", S, size.across, 0.75]];
    for (const [side, count, shown, part] of sides) {
      const place = state.chosen[side];
      const start = state.window[side];
      const seen = place === null || (place >= start && place < start + shown);
      const wanted = seen ? start : place - Math.floor(shown * part);
      state.window[side] = Math.max(0, Math.min(wanted, count - shown));
    }
  }

  function paintMap() {
    if (!view.grid || !element("maps").clientWidth) return; // a hidden frame has no width
    measure();
    follow();
    overview.hidden = size.whole;
    if (!size.whole) paintOverview();
    const { cell, left: x0, top: y0, across, down } = size;
    const context = sharp(map, x0 + across * cell + 30, y0 + down * cell + 2);
    const { query, key } = current();
    const first = state.window;
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (let r = 0; r < down; r++) {
      const place = first.query + r;
      label(context, queries[place], x0 - 6, y0 + (r + 0.5) * cell, x0 - 10, 0, place === query);
    }
    for (let c = 0; c < across; c++) {
      const place = first.key + c;
      const x = x0 + (c + 0.5) * cell;
      label(context, keys[place], x, y0 - 6, y0 - 12, 1, place === key, left(place));
    }
    for (let r = 0; r < down; r++) {
      const scale = rowScale(first.query + r);
      for (let c = 0; c < across; c++) {
        const out = left(first.key + c);
        const x = at(first.query + r, first.key + c);
        if (Number.isNaN(x) && !out) continue;
        context.fillStyle = out ? ramps.panel : colour(x, scale).css;
        context.fillRect(x0 + c * cell, y0 + r * cell, cell - 1, cell - 1);
      }
    }
    context.strokeStyle = ramps.line;
    context.lineWidth = 1;
    context.strokeRect(x0 - 1.5, y0 - 1.5, across * cell + 2, down * cell + 2);
    context.strokeStyle = ramps.ink;
    context.lineWidth = 1.5;
    const r = query === null ? -1 : query - first.query;
    const c = key === null ? -1 : key - first.key;
    const inRows = r >= 0 && r < down;
    const inColumns = c >= 0 && c < across;
    context.setLineDash([3, 3]);
    if (inRows) context.strokeRect(x0 - 1, y0 + r * cell - 1, across * cell + 1, cell + 1);
    if (inColumns) context.strokeRect(x0 + c * cell - 1, y0 - 1, cell + 1, down * cell + 1);
    context.setLineDash([]);
    context.lineWidth = 3;
    if (inRows && inColumns && current().cell) {
      context.strokeRect(x0 + c * cell - 1, y0 + r * cell - 1, cell + 1, cell + 1);
    }
  }

  /** A token beside the map, cut to the room that it has. */
  function label(context, token, x, y, room, up, strong, struck = false) {
    const letters = Array.from(token.slice(0, 60).trim() || token);
    let text = letters.join("");
    for (let n = letters.length - 1; n > 0 && context.measureText(text).width > room; n--) {
      text = `${letters.slice(0, n).join("")}…`;
    }
    context.save();
    context.translate(x, y);
    if (up) context.rotate(-Math.PI / 3);
    context.textAlign = up ? "left" : "right";
    context.fillStyle = strong ? ramps.ink : ramps.faint;
    if (strong) context.font = "bold 12px system-ui, sans-serif";
    context.fillText(text, 0, 0);
    if (struck) context.fillRect(0, -0.5, context.measureText(text).width, 1.2);
    context.restore();
  }

  function paintOverview() {
    const width = S >= T ? size.side : Math.max(60, (size.side * S) / T);
    const height = T >= S ? size.side : Math.max(60, (size.side * T) / S);
    const context = sharp(overview, width, height);
    if (!picture) picture = wholePicture();
    context.imageSmoothingEnabled = width * devicePixelRatio < S;
    context.drawImage(picture, 0, 0, width, height);
    const [x, y] = [width / S, height / T];
    const { query, key } = current();
    context.strokeStyle = ramps.ink;
    context.lineWidth = 1.5;
    const { window: first } = state;
    context.strokeRect(first.key * x, first.query * y, size.across * x, size.down * y);
    context.globalAlpha = 0.6;
    context.lineWidth = 1;
    context.beginPath();
    if (query !== null) line(context, 0, (query + 0.5) * y, width, (query + 0.5) * y);
    if (key !== null) line(context, (key + 0.5) * x, 0, (key + 0.5) * x, height);
    context.stroke();
    context.globalAlpha = 1;
  }

  function line(context, x0, y0, x1, y1) {
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
  }

  function wholePicture() {
    const canvas = new OffscreenCanvas(S, T);
    const context = canvas.getContext("2d");
    const image = context.createImageData(S, T);
    for (let query = 0, i = 0; query < T; query++) {
      const scale = rowScale(query);
      for (let key = 0; key < S; key++, i++) {
        if (Number.isNaN(view.grid[i]) || left(key)) continue;
        const { rgb } = colour(view.grid[i], scale);
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = rgb[c];
        image.data[4 * i + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  function cellUnder(event) {
    const box = map.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - size.left) / size.cell);
    const r = Math.floor((event.clientY - box.top - size.top) / size.cell);
    if (c < 0 || r < 0 || c >= size.across || r >= size.down) return null;
    return { query: state.window.query + r, key: state.window.key + c, cell: true };
  }
  map.addEventListener("pointermove", (event) => {
    const place = cellUnder(event);
    const { query, key } = state.pointed ?? NOTHING;
    if (place?.query === query && place?.key === key) return;
    state.pointed = place;
    paint();
  });
  map.addEventListener("pointerleave", () => {
    state.pointed = null;
    paint();
  });
  map.addEventListener("click", (event) => cellUnder(event) && choose(cellUnder(event)));

  const move = (event) => {
    const box = overview.getBoundingClientRect();
    const place = (x, room, count) => Math.max(0, Math.min(count - 1, Math.floor((x / room) * count)));
    choose({
      query: place(event.clientY - box.top, box.height, T),
      key: place(event.clientX - box.left, box.width, S),
      cell: true,
    });
  };
  overview.addEventListener("click", move);
  overview.addEventListener("pointermove", (event) => event.buttons === 1 && move(event));

  map.addEventListener("keydown", (event) => {
    const steps = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -S], End: [0, S],
    }[event.key];
    if (!steps) return;
    event.preventDefault();
    const { query, key } = state.chosen;
    const start = query === null && key === null;
    const clamp = (x, count) => Math.max(0, Math.min(count - 1, x));
    choose({
      query: start ? state.window.query : clamp((query ?? 0) + steps[0], T),
      key: start ? state.window.key : clamp((key ?? 0) + steps[1], S),
      cell: true,
    });
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose(NOTHING);
  });

  // Details

  /** The places with the largest values, and these. */
  function largest(count, value, skip) {
    const places = [];
    for (let i = 0; i < count; i++) if (value(i) && !skip(i)) places.push(i);
    places.sort((a, b) => Math.abs(value(b)) - Math.abs(value(a)) || a - b);
    return places.slice(0, 5).map((i) => [i, value(i)]);
  }

  function paintDetails() {
    const { query, key } = current();
    const cell = current().cell && view.grid !== null;
    const parts = [];
    if (query === null && key === null) {
      parts.push(make("h2", {}, "Nothing chosen"), make("p", { className: "hint" },
        "Figures of a token or a cell of the map appear here."));
    } else if (cell && view.grid) parts.push(...cellDetails(query, key));
    if (query !== null && !(cell && crossed)) parts.push(...queryDetails(query, cell));
    if (key !== null && !cell) parts.push(...keyDetails(key));
    element("details").replaceChildren(...parts);
  }

  function cellDetails(query, key) {
    const parts = [
      make("h2", {}, "Query ", quoted(queries[query]), ` (${query}), key `, quoted(keys[key]), ` (${key})`),
    ];
    if (view.layer) {
      const i = keptAt(query, key);
      if (i === null) {
        const kept = view.layer.K < S ? `, or not among the ${view.layer.K} keys that are kept of it` : "";
        parts.push(make("p", {}, `The query does not see this key${kept}.`));
      } else parts.push(factors(i, query));
    } else {
      const names = data.methods.filter((m) => data.maps.includes(m.name));
      const list = make("div");
      parts.push(list);
      Promise.all(names.map((m) => mapOf(m.name))).then((grids) => {
        list.replaceChildren(rows(names.map(({ label, name }, n) =>
          [label, figure(grids[n][query * S + key]), name === view.method.name ? "current" : ""])));
      });
    }
    return parts;
  }

  function factors(i, query) {
    const { attention, relativeNorm, contribution } = view.layer;
    const length = attention[i] * relativeNorm[i];
    const cosine = length ? Math.max(-1, Math.min(1, contribution[i] / length)) : 0;
    const entries = [
      ["attention", figure(attention[i])],
      ["× value norm / output norm", figure(relativeNorm[i])],
      ["× cosine of value and output", figure(cosine)],
      ["= contribution", figure(contribution[i]), "product"],
      ["VW", figure(MEASURES.vw(view.layer, i, query))],
      ["VW-ON", figure(MEASURES.vwon(view.layer, i))],
    ];
    return make("div", {}, rows(entries), make("p", { className: "hint" }, EIGHT_BITS));
  }

  function queryDetails(query, cell) {
    const parts = [make(cell ? "h3" : "h2", {}, cell ? "Query " : "", quoted(queries[query]), ` (${query})`)];
    if (!crossed && !cell && data.scores[view.method.name]) {
      const shown = data.methods.filter((m) => data.scores[m.name]);
      parts.push(make("h3", {}, `Score${whole()}`), rows(
        shown.map((m) => [m.label, figure(data.scores[m.name][query], 3),
          m.name === view.method.name ? "current" : ""])));
    }
    if (!data.predicted && data.probability) {
      parts.push(make("p", {}, `The model gave it a probability of ${percent(data.probability[query])}.`));
    }
    if (data.predicted) {
      const known = data.probability ? ` (${percent(data.probability[query])})` : "";
      parts.push(make("p", {}, "After it the model expects ", quoted(data.predicted[query]), known));
    }
    if (view.grid) {
      const drew = largest(S, (key) => at(query, key), left);
      parts.push(make("h3", {}, "Drew most from"), rows(drew.map(([i, x]) => [spoken(keys[i], i), figure(x)])));
    }
    if (view.layer) parts.push(make("p", { className: "hint" }, kept(query)));
    return parts;
  }

  function kept(query) {
    const { K, attentionKept, contributionKept, share } = view.layer;
    const row = view.head * T + query;
    if (K >= S) return "All keys of this head are kept.";
    return `Of a single head the ${K} keys that matter most to a query are kept. Here they hold ` +
      `${percent(attentionKept[row])} of the attention, and their contributions sum to ` +
      `${figure(contributionKept[row], 3)}, those of all keys to ${figure(share[row], 3)}.`;
  }

  function keyDetails(key) {
    const parts = [];
    if (crossed) {
      const shown = data.methods.filter((m) => data.scores[m.name]);
      parts.push(make("h2", {}, quoted(keys[key]), ` (${key})`));
      if (shown.length) {
        parts.push(make("h3", {}, `Score${whole()}`), rows(
          shown.map((m) => [m.label, figure(data.scores[m.name][key], 3)])));
      }
    }
    if (view.grid) {
      const fed = largest(T, (query) => at(query, key), () => false);
      parts.push(make("h3", {}, "Fed most"), rows(fed.map(([i, x]) => [spoken(queries[i], i), figure(x)])));
    }
    return parts;
  }

  /** Tells those who cannot see it; only of what is chosen or has the focus. */
  function say() {
    const { query, key, cell } = current();
    let words = "Nothing chosen.";
    if (cell && view.grid) {
      words = `Query ${spoken(queries[query], query)}, key ${spoken(keys[key], key)}: ` +
        `${view.method.label} ${figure(at(query, key))}.`;
    } else if (query !== null || key !== null) {
      const score = data.scores[view.method.name]?.[key];
      words = `${query === null ? spoken(keys[key], key) : spoken(queries[query], query)}.`;
      if (score !== undefined) words += ` Score ${figure(score, 3)}.`;
      if (query !== null && view.grid) {
        const drew = largest(S, (place) => at(query, place), left);
        const most = drew.map(([i, x]) => `${spoken(keys[i], i)} ${figure(x)}`);
        words += ` Drew most from ${most.slice(0, 3).join(", ")}.`;
      }
    }
    element("status").textContent = words;
  }

  // Controls

  function option(value, text, disabled = false) {
    return make("option", { value, disabled }, text);
  }

  function showControls() {
    const { method } = state;
    const together = data.maps.includes(method.name);
    const unit = view.layer ? "" : ` ${method.together}`;
    element("about").textContent = `${method.about}${view.grid || data.maps.length ? unit : ""}`;
    element("method").value = data.methods.indexOf(method);
    element("layer").replaceChildren(
      option(TOGETHER, together ? "all layers and heads together" : "–", !together),
      ...data.layers.map(({ name }, n) => option(n, `${n} · ${name}`, !method.ofHeads)),
    );
    element("layer").value = state.layer;
    element("head").disabled = view.layer === null;
    element("map-part").hidden = !view.grid;
    element("scale").disabled = !view.grid;
    element("text-hint").textContent = view.grid
      ? "Point at a token: the colour behind each token says how much the chosen one drew from it, the line " +
        "below a token how much it drew from the chosen one. Click or Enter keeps the choice, Escape lets go."
      : "Point at a token for its scores. Click or Enter keeps the choice, Escape lets go.";
    element("map-hint").textContent =
      "A query, down, is a token whose output is explained; keys, across, are the tokens it drew from. " +
      "Point at a cell for its figures, or move with the arrow keys." +
      (view.layer && view.layer.K < S
        ? ` Blank: not seen, or not among the ${view.layer.K} keys that are kept for each query.` : "");
    showHeads();
  }

  /** Heads with their share of the layer's output at the chosen query. */
  function showHeads() {
    if (!view.layer) {
      element("head").replaceChildren(option(0, "all"));
      return;
    }
    const { query } = state.chosen;
    const heads = Array.from({ length: data.layers[view.number].heads }, (_, head) => {
      const share = query === null ? "" : `: ${percent(view.layer.share[head * T + query])} of the layer`;
      return option(head, `${head}${share}`);
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
  onChange("method", ({ value }) => { state.method = data.methods[value]; load(); });
  onChange("layer", ({ value }) => { state.layer = value === TOGETHER ? TOGETHER : Number(value); load(); });
  onChange("head", ({ value }) => { state.head = Number(value); load(); });
  onChange("scale", ({ value }) => { state.scale = value; rescale(); });
  onChange("sinks", ({ checked }) => { state.leaveOut = checked; rescale(); });
  let around = ""; // the theme of a notebook, which Chromium does not pass on to its frames
  function showTheme() {
    const theme = element("theme").value || around;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    findRamps();
    paint();
  }
  onChange("theme", showTheme);
  dark.addEventListener("change", showTheme);
  addEventListener("message", (event) => {
    if (!["light", "dark"].includes(event.data)) return;
    around = event.data;
    showTheme();
  });
  addEventListener("resize", () => paintMap());
  element("controls").addEventListener("submit", (event) => event.preventDefault());

  element("method").append(...data.methods.map(({ label }, n) => option(n, label)));
  element("query-part").hidden = !crossed;
  element("sink-label").hidden = !data.sinks.length;
  const named = data.sinks.slice(0, 3).map((place) => spoken(keys[place], place)).join(", ");
  element("sink-names").textContent = data.sinks.length > 3 ? `${data.sinks.length} sinks` : `the sink ${named}`;
  element("sink-label").title = "Attention sinks draw much attention and add little. Left out, they no longer pale all others.";
  const mapped = data.maps.length || data.layers.length;
  element("title").textContent = mapped ? "What each token drew from" : "Which tokens matter";
  document.querySelectorAll("label.of-maps").forEach((label) => (label.hidden = !mapped));
  const settings = Object.entries(data.settings).map(([name, value]) => `${name}: ${value}`);
  element("settings").textContent = ["Made with captum_cw", ...settings].join(" · ");
  findRamps();
  load();
})();
