// Map

const map = element("map");
const overview = element("overview");
let picture = null; // the whole map, one pixel per cell
let layout = null; // see updateLayout; lengths are in CSS pixels

/** Chooses the size of the cells, how many the map shows, and the size of the overview. */
function updateLayout() {
  const { T, S } = shown;
  const width = element("maps").clientWidth;
  const phone = width < 500;
  const left = phone ? 84 : 112;
  const top = phone ? 76 : 92;
  const roomPerCell = Math.floor((Math.min(width, 760) - left - 30) / Math.max(S, T));
  const cell = Math.max(phone ? 20 : 22, Math.min(roomPerCell, 30));
  const fit = (space, count) => Math.min(count, Math.max(2, Math.floor(space / cell)));
  const complete = T <= 40 && S <= fit(width - left - 30, S);
  const beside = !complete && width > 820; // the overview, next to the map
  const overviewSize = complete ? 0 : Math.min(512, 12 * Math.max(S, T), beside ? width * 0.42 : width);
  const columns = fit((beside ? width - overviewSize - 18 : width) - left - 30, S);
  const rows = Math.min(T, complete ? 40 : Math.max(columns, 8));
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
  const { T, S } = shown;
  const axes = [["query", T, layout.rows, 0.25], ["key", S, layout.columns, 0.75]];
  for (const [axis, count, size, part] of axes) {
    const place = state.selected[axis];
    const start = state.window[axis];
    const visible = place === null || (place >= start && place < start + size);
    const wanted = visible ? start : place - Math.floor(size * part);
    state.window[axis] = Math.max(0, Math.min(wanted, count - size));
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
  const { query, key } = focused();
  const first = state.window;
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let r = 0; r < rows; r++) {
    const place = first.query + r;
    const position = { x: left - 6, y: top + (r + 0.5) * cell, room: left - 10 };
    drawLabel(context, shown.queries.texts[place], position, { bold: place === query });
  }
  for (let c = 0; c < columns; c++) {
    const place = first.key + c;
    const position = { x: left + (c + 0.5) * cell, y: top - 6, room: top - 12 };
    drawLabel(context, shown.keys.texts[place], position,
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
  const { query, key, cell: isCell } = focused();
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

/** A token without the space around it, shortened to a width in pixels. */
function fitting(context, token, room) {
  const letters = Array.from(token.trim() || token).slice(0, 60);
  let text = letters.join("");
  for (let n = letters.length - 1; n > 0 && context.measureText(text).width > room; n--) {
    text = `${letters.slice(0, n).join("")}…`;
  }
  return text;
}

/** Writes a token beside the map. */
function drawLabel(context, token, { x, y, room }, { slanted = false, bold, struck = false }) {
  const text = fitting(context, token, room);
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
  const { T, S } = shown;
  const side = layout.overviewSize;
  const width = S >= T ? side : Math.max(60, (side * S) / T);
  const height = T >= S ? side : Math.max(60, (side * T) / S);
  const context = prepareCanvas(overview, width, height);
  if (!picture) picture = drawPicture();
  context.imageSmoothingEnabled = width * devicePixelRatio < S;
  context.drawImage(picture, 0, 0, width, height);
  const [x, y] = [width / S, height / T]; // the size of a cell
  const { query, key } = focused();
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
  const { T, S } = shown;
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
  paintCurrent();
});
map.addEventListener("pointerleave", () => {
  state.hovered = null;
  paintCurrent();
});
map.addEventListener("click", (event) => cellAt(event) && select(cellAt(event)));

const selectInOverview = (event) => {
  const box = overview.getBoundingClientRect();
  select({
    query: clamp(Math.floor(((event.clientY - box.top) / box.height) * shown.T), shown.T),
    key: clamp(Math.floor(((event.clientX - box.left) / box.width) * shown.S), shown.S),
    cell: true,
  });
};
overview.addEventListener("click", selectInOverview);
overview.addEventListener("pointermove", (event) => event.buttons === 1 && selectInOverview(event));

map.addEventListener("keydown", (event) => {
  const { T, S } = shown;
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

