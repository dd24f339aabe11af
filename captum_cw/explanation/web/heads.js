// All layers and heads: what each did for the target, or its share of the output at a query.

const headMap = element("heads");
const hasEffects = data.layers.length > 0 && data.layers.every(({ effects }) => effects);
const mostHeads = Math.max(0, ...data.layers.map(({ heads }) => heads));
let headCursor = null; // the layer and head under the mouse, or reached by arrow keys
const allEffects = hasEffects ? sizeOf(data.layers.flatMap(({ effects }) => effects)) : 1;

const headCell = () => {
  const width = headMap.parentElement.clientWidth - 40;
  return Math.max(5, Math.min(16, Math.floor(width / Math.max(mostHeads, data.layers.length))));
};

function paintHeads() {
  element("heads-part").hidden = !hasEffects;
  if (!hasEffects || !headMap.parentElement.clientWidth) return;
  const cell = headCell();
  // Layers run from left to right, so that a deep model is wide and not tall.
  const context = prepareCanvas(headMap, data.layers.length * cell, mostHeads * cell);
  const maximum = data.layers.reduce((most, { effects }) =>
    effects.reduce((x, effect) => Math.max(x, Math.abs(effect)), most), 0);
  data.layers.forEach(({ effects }, layer) => effects.forEach((effect, head) => {
    context.fillStyle = colourOf(effect, maximum).css;
    context.fillRect(layer * cell, head * cell, cell - 1, cell - 1);
  }));
  const mark = (layer, head) => {
    context.strokeStyle = ramps.ink;
    context.lineWidth = 2;
    context.strokeRect(layer * cell, head * cell, cell - 1, cell - 1);
  };
  if (headCursor) mark(headCursor.layer, headCursor.head);
  if (view.layer && view.head !== ALL) mark(view.number, view.head);
  const strongest = data.layers.flatMap(({ effects }, layer) =>
    effects.map((effect, head) => ({ layer, head, effect }))).sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
  const named = headCursor ?? (view.layer && view.head !== ALL ? { layer: view.number, head: view.head } : null);
  element("heads-note").textContent = `The strongest: ${strongest.slice(0, 3).map(describeHead).join("; ")}` +
    (isPercent() ? ". Percent of all that the heads did." : ", in logits.");
  element("heads-at").textContent = named ? `Shown: ${describeHead(named)}.` : "";
}

function describeHead({ layer, head }) {
  const effect = data.layers[layer].effects[head];
  const size = isPercent() ? formatPercent(Math.abs(effect) / allEffects) : formatNumber(Math.abs(effect), 3);
  return `layer ${layer}, head ${head}, ${size} ${effect < 0 ? against : towards}`;
}

function headAt(event) {
  const box = headMap.getBoundingClientRect();
  const layer = Math.floor((event.clientX - box.left) / headCell());
  const head = Math.floor((event.clientY - box.top) / headCell());
  return data.layers[layer]?.effects[head] === undefined ? null : { layer, head };
}

/** Takes a measure that single heads have: what they draw from, with signs. */
function useMeasureOfHeads() {
  if (state.method.ofHeads) return;
  const signed = data.methods.find(({ name }) => name === "contribution-signed");
  state.method = signed ?? data.methods.find(({ ofHeads }) => ofHeads);
  resetScale();
}

/** Shows a single head. */
function showHead({ layer, head }) {
  useMeasureOfHeads();
  Object.assign(state, { layer, head });
  load();
  writeLink();
  element("status").textContent = `Map of ${describeHead({ layer, head })}.`;
}

headMap.addEventListener("pointermove", (event) => {
  if (event.pointerType !== "mouse") return;
  headCursor = headAt(event);
  paintHeads();
});
headMap.addEventListener("pointerleave", () => {
  headCursor = null;
  paintHeads();
});
headMap.addEventListener("click", (event) => headAt(event) && showHead(headAt(event)));
headMap.addEventListener("blur", () => {
  headCursor = null;
  paintHeads();
});
headMap.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (step) {
    const { layer, head } = headCursor ?? { layer: 0, head: 0 };
    const next = clamp(layer + (headCursor ? step[0] : 0), data.layers.length);
    headCursor = { layer: next, head: clamp(head + (headCursor ? step[1] : 0), data.layers[next].heads) };
    paintHeads();
    element("status").textContent = describeHead(headCursor);
  } else if ((event.key === "Enter" || event.key === " ") && headCursor) showHead(headCursor);
  else return;
  event.preventDefault();
});
