// The text: its tokens or words, coloured by scores, or by the row of the selected query.

const lists = [{ box: element("tokens"), axis: "key", of: "keys" }];
if (separateQueries) lists.push({ box: element("queries"), axis: "query", of: "queries" });

/** Puts texts into a box, one element each. Space before a text stays outside of its element. */
function spansOf(box, texts, create) {
  box.replaceChildren();
  return texts.map((text, place) => {
    const space = text.trim() ? text.slice(0, text.length - text.trimStart().length) : "";
    const span = create(text.slice(space.length), place);
    if (space && place) box.append(space);
    box.append(span);
    if (text.endsWith("⏎")) box.append(createElement("br"));
    return span;
  });
}

/** Writes the text by the current unit. */
function writeText() {
  for (const list of lists) {
    list.elements = spansOf(list.box, shown[list.of].texts, (text, place) => {
      const span = createElement("span", { className: "token", tabIndex: place ? -1 : 0 }, text);
      span.setAttribute("role", "option");
      span.dataset.place = place;
      return span;
    });
  }
}
writeText();
lists.forEach(listen);

/** What a token of the text selects: its row and its column, or one of them. */
function selectionOf(list, place) {
  if (!separateQueries) return { query: place, key: place, cell: false };
  const both = { ...state.selected, [list.axis]: place };
  return { ...both, cell: both.query !== null && both.key !== null };
}

function listen(list) {
  const { box } = list;
  const tokenOf = (event) => event.target.closest(".token");
  let lastHovered = null;
  const hover = (token) => {
    state.hovered = token && selectionOf(list, Number(token.dataset.place));
    paintCurrent();
  };
  // pointerover would also fire when the page moves under a mouse that rests.
  box.addEventListener("pointermove", (event) => {
    const token = event.pointerType === "mouse" && tokenOf(event);
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
    list.elements.forEach((other) => (other.tabIndex = other === token ? 0 : -1));
    announce();
  });
  box.addEventListener("focusout", () => hover(null));
  box.addEventListener("click", (event) => tokenOf(event) && toggleToken(list, tokenOf(event)));
  box.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const { elements } = list;
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
  scrollToSelected();
  showHeads();
  paintCurrent();
  announce();
  writeLink();
}

function scrollToSelected() {
  for (const { box, axis, elements } of lists) {
    const place = separateQueries || !state.selected.cell ? state.selected[axis] : state.selected.query;
    if (place !== null) scrollToToken(box, elements[place]);
  }
}

/** Selects a key, and moves the focus to it: the way from a bar to its word. */
function goTo(key) {
  lists[0].elements[key].focus({ preventScroll: true });
  select(selectionOf(lists[0], key));
  element("text").scrollIntoView({ block: "nearest" });
  lists[0].elements[key].scrollIntoView({ block: "nearest" }); // if the text is larger than the window
}

/** Scrolls the box of the text, but not the page. */
function scrollToToken(box, token) {
  const [inner, outer] = [token.getBoundingClientRect(), box.getBoundingClientRect()];
  if (inner.top < outer.top || inner.bottom > outer.bottom) {
    box.scrollTop += inner.top - outer.top - outer.height / 3;
  }
}

/** Sets a style only if it changes, which keeps long texts fast. */
function colourToken({ style }, fill) {
  const background = fill ? fill.css : "";
  if (style.backgroundColor === background) return;
  style.backgroundColor = background;
  style.color = fill ? fill.ink : "";
}

/** Paints the backgrounds of tokens by their values as keys, and the lines by those as queries. */
function paintText() {
  const { query, key } = current();
  const scores = query === null || !view.grid ? view.scores : null;
  const maximum = scores && scoreScale(scores);
  const row = query !== null && view.grid ? rowScale(query) : 0;
  const column = key !== null && view.grid ? columnScale(key) : 0;
  for (const list of lists) {
    const isKeys = list.axis === "key";
    list.elements.forEach((token, place) => {
      const ignored = isKeys && isIgnored(place);
      let fill = null;
      if (isKeys && !ignored) {
        if (scores) fill = scoreFill(place, maximum);
        else if (row && !Number.isNaN(valueAt(query, place))) fill = colourOf(valueAt(query, place), row);
      }
      colourToken(token, fill);
      const asQuery = column && (!separateQueries || !isKeys) ? valueAt(place, key) || 0 : 0;
      const line = asQuery ? `inset 0 -4px ${readByColour(asQuery, column).css}` : "";
      if (token.line !== line) token.style.boxShadow = token.line = line;
      const classes = ["token"];
      if (place === query && (!separateQueries || !isKeys)) classes.push("query");
      if (place === key && isKeys) classes.push("key");
      if (query === null && key === null && place === shown.asked && (!separateQueries || !isKeys)) {
        classes.push("asked");
      }
      if (ignored) classes.push("sink");
      if (token.className !== classes.join(" ")) token.className = classes.join(" ");
      const selected = String(state.selected[list.axis] === place);
      if (token.ariaSelected !== selected) token.ariaSelected = selected;
    });
  }
}

function paintLegend() {
  const { query, key } = current();
  const [positive, negative] = directions(view.method);
  const item = (colours, kind, text) => {
    const steps = [0, 51, 102, 153, 204, 255].map((i) => colours[i].css);
    const bar = createElement("i");
    bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
    return createElement("span", { className: `ramp ${kind}` }, bar, text);
  };
  const items = [];
  let signed = view.negative;
  let what = null;
  let range = null;
  const unit = unitOfValues(view.method);
  const inUnit = (maximum, digits) => `0 to ${formatValue(maximum, digits)}${unit && ` ${unit}`}`;
  const row = query !== null && view.grid;
  if (row) {
    what = `how much ${describe(shown.queries.texts[query], query)} draws from it`;
    range = inUnit(rowScale(query));
  } else if (view.scores) {
    signed ||= view.scores.some((score) => score < 0);
    what = `score${scopeNote()}`;
    const all = view.method.ofTarget ? "of all contributions" : "of all scores";
    range = `0 to ${formatScore(scoreScale(view.scores))} ` +
      (isPercent() ? all : view.method.unit && `(${view.method.unit})`);
  }
  if (what) {
    const sign = view.method.ofTarget || signed ? `${positive}: ` : "";
    items.push(item(ramps.towards, "", `${sign}${what}, ${range}`));
    if (signed) items.push(item(ramps.against, "", `${negative}: the same scale`));
    const isGrey = (sink) => view.scores[sink] && !state.ignoreSinks;
    if (!row && [...shown.sinks].some(isGrey)) items.push(item(Array(256).fill(ramps.sink), "", "attention sink"));
  }
  if (key !== null && view.grid) {
    items.push(item(ramps.readBy, "line", `line below a word: how much that word draws from ` +
      `${describe(shown.keys.texts[key], key)}, ${inUnit(columnScale(key))}`));
  }
  element("legend").replaceChildren(...items);
}

// The whole of a long text, one cell for each token

const minimap = element("minimap");
const MINIMAP_COLUMNS = 100;

function paintMinimap() {
  minimap.hidden = !data.long || !view.scores;
  if (minimap.hidden) return;
  const width = minimap.parentElement.clientWidth;
  const rows = Math.ceil(shown.S / MINIMAP_COLUMNS);
  const cell = width / MINIMAP_COLUMNS;
  const height = Math.max(4, Math.min(cell, 12));
  const context = prepareCanvas(minimap, width, rows * height);
  const maximum = scoreScale(view.scores);
  view.scores.forEach((_, key) => {
    if (isIgnored(key)) return;
    context.fillStyle = scoreFill(key, maximum).css;
    context.fillRect((key % MINIMAP_COLUMNS) * cell, Math.floor(key / MINIMAP_COLUMNS) * height, cell, height - 1);
  });
}
minimap.addEventListener("click", (event) => {
  const box = minimap.getBoundingClientRect();
  const rows = Math.ceil(shown.S / MINIMAP_COLUMNS);
  const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
  const column = Math.floor(((event.clientX - box.left) / box.width) * MINIMAP_COLUMNS);
  goTo(clamp(row * MINIMAP_COLUMNS + column, shown.S));
});
