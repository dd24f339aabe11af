// Details

const EIGHT_BITS = "The page stores these numbers in 8 bits. Attention and relative norm are off by at " +
  "most 0.6% of the largest value in their row, and the contribution by at most 1.2%. The other " +
  "numbers are computed from these; the cosine is off by about ±0.05.";

const topKeys = (query) =>
  largest(Array.from({ length: shown.S }, (_, key) => valueAt(query, key)), 5, isIgnored);
const topQueries = (key) => largest(Array.from({ length: shown.T }, (_, query) => valueAt(query, key)), 5);

function paintDetails() {
  const { query, key, cell } = current();
  const isCell = cell && view.grid !== null;
  const parts = [];
  if (query === null && key === null) {
    parts.push(createElement("h2", {}, "Details"),
      createElement("p", { className: "hint" }, `Select a ${state.unit} to see its numbers.`));
  } else if (isCell) parts.push(...cellDetails(query, key));
  if (query !== null && !(isCell && separateQueries)) parts.push(...queryDetails(query, isCell));
  if (key !== null && !isCell) parts.push(...keyDetails(key));
  element("details").replaceChildren(...parts);
}

function cellDetails(query, key) {
  const [{ texts: queries, groups: ofQuery }, { texts: keys, groups: ofKey }] = [shown.queries, shown.keys];
  const title = createElement("h2", {},
    "Query ", quote(queries[query]), ` (${query}), key `, quote(keys[key]), ` (${key})`);
  if (view.layer) {
    const single = [ofQuery[query], ofKey[key]].every(([start, stop]) => stop - start === 1);
    if (view.head === ALL || !single) return [title, headValue(query, key, single)];
    const i = keptIndex(ofQuery[query][0], ofKey[key][0]);
    if (i !== null) return [title, factorList(i, ofQuery[query][0])];
    const notKept = view.layer.K < shown.S
      ? `, or the key is not among the ${view.layer.K} keys that are kept for this query` : "";
    return [title, createElement("p", {}, `The query does not see this key${notKept}.`)];
  }
  const list = createElement("div");
  const methods = data.methods.filter(({ name }) => data.maps.includes(name));
  Promise.all(methods.map(({ name }) => loadMap(name))).then((grids) => {
    list.replaceChildren(valueList(methods.map((method, n) =>
      [method, formatValue(grouped(grids[n], method)[query * shown.S + key], method)])));
  });
  return [title, list];
}

/** The value of a cell of several heads, or of words of several tokens, which have no factors. */
function headValue(query, key, single) {
  const hint = single ? "Choose one head to see the factors of this number."
    : "Show tokens instead of words to see the factors of this number.";
  return createElement("div", {},
    definitionList([[view.method.label, formatValue(valueAt(query, key)), "current"]]),
    createElement("p", { className: "hint" }, hint));
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

const SINK = "An attention sink: many heads attend to it when nothing else concerns them. " +
  "What comes by way of it says little about the word that stands there.";

/** The scores of a word by all methods, each in its own unit or as a share of its own scores. */
function scoreList(place) {
  const methods = data.methods.filter(({ name }) => data.scores[name]);
  const note = shown.sinks.has(place) ? [createElement("p", { className: "hint" }, SINK)] : [];
  return [...note, createElement("h3", {}, `${isPercent() ? "Share of all scores" : "Score"}${scopeNote()}`), valueList(
    methods.map((method) => [method, formatScore(scoresOf(method.name)[place], method.name)]))];
}

function queryDetails(query, isCell) {
  const { texts, groups } = shown.queries;
  const last = groups[query][1] - 1; // the prediction for a word is that after its last token
  const parts = [createElement(isCell ? "h3" : "h2", {},
    isCell ? "Query " : "", quote(texts[query]), ` (${query})`)];
  if (!separateQueries && !isCell && data.scores[view.method.name]) parts.push(...scoreList(query));
  const known = data.probability;
  const probability = known && formatPercent(data.predicted ? known[last]
    : known.slice(...groups[query]).reduce((product, p) => product * p, 1));
  if (data.predicted) {
    parts.push(createElement("p", {}, "The model expects ", quote(data.predicted[last]),
      ` next${probability ? ` (${probability})` : ""}.`));
  } else if (probability) {
    parts.push(createElement("p", {}, `The model gave it a probability of ${probability}.`));
  }
  if (view.grid) {
    const unit = unitOfValues(view.method);
    parts.push(createElement("h3", {}, `Draws most from${unit && ` (${unit})`}`), definitionList(
      topKeys(query).map(([key, value]) => [describe(shown.keys.texts[key], key), formatValue(value)])));
  }
  if (view.layer) parts.push(createElement("p", { className: "hint" }, keptNote(query)));
  return parts;
}

/** How much of a query the keys that are kept account for. */
function keptNote(query) {
  const { K, H, attentionKept, contributionKept, share } = view.layer;
  const { T, S } = allTokens;
  const place = shown.queries.groups[query][1] - 1;
  const heads = view.head === ALL ? [...Array(H).keys()] : [view.head];
  const sum = (values) => heads.reduce((total, head) => total + values[head * T + place], 0);
  const which = view.head === ALL ? "this layer's heads together" : "this head";
  const part = `Of the layer's output, ${which} made ${formatPercent(sum(share))} here.`;
  if (K >= S) return `${part} All keys are kept.`;
  return `${part} Of a single head, the page keeps the ${K} keys that matter most to each query. For ` +
    `this query, they have ${formatPercent(sum(attentionKept) / heads.length)} of the attention, and ` +
    `made ${formatPercent(sum(contributionKept))}.`;
}

function keyDetails(key) {
  const { texts } = shown.keys;
  const parts = [];
  if (separateQueries) {
    parts.push(createElement("h2", {}, quote(texts[key]), ` (${key})`));
    if (Object.keys(data.scores).length) parts.push(...scoreList(key));
  }
  if (view.grid) {
    const unit = unitOfValues(view.method);
    parts.push(createElement("h3", {}, `What draws most from it${unit && ` (${unit})`}`), definitionList(
      topQueries(key).map(([query, value]) =>
        [describe(shown.queries.texts[query], query), formatValue(value)])));
  }
  return parts;
}

/** Tells screen readers what is selected or has the focus. */
function announce() {
  const { query, key, cell } = current();
  const [queries, keys] = [shown.queries.texts, shown.keys.texts];
  let words = "Nothing selected.";
  if (cell && view.grid) {
    words = `Query ${describe(queries[query], query)}, key ${describe(keys[key], key)}: ` +
      `${view.method.label} ${formatValue(valueAt(query, key))}.`;
  } else if (query !== null || key !== null) {
    const score = view.scores?.[key];
    words = `${query === null ? describe(keys[key], key) : describe(queries[query], query)}.`;
    if (score !== undefined) words += ` Score ${formatScore(score)}.`;
    if (query !== null && view.grid) {
      const top = topKeys(query).slice(0, 3)
        .map(([place, value]) => `${describe(keys[place], place)} ${formatValue(value)}`);
      words += ` Draws most from ${top.join(", ")}.`;
    }
  }
  element("status").textContent = words;
}
