// The state of the page is one object; code that changes it calls load(), which unpacks numbers, or
// paint(). Names, explanations and units of measures come with the data, from the registry
// (measures.py).

const element = (id) => document.getElementById(id);
const data = JSON.parse(element("data").textContent);
const separateQueries = data.queries !== null; // the queries are not the tokens (keys) themselves
const ALL = ""; // instead of the number of a layer or head: all of them
const NO_SELECTION = { query: null, key: null, cell: false };
const settings = data.settings;

const state = {
  unit: data.words ? "word" : "token",
  numbers: "percent", // or "raw": the unit of the measure
  method: data.methods.find(({ name }) => name === data.initial),
  layer: ALL, // or the number of a layer
  head: ALL, // or the number of a head of that layer
  scale: "row", // or "map": the values that the darkest colour stands for; see resetScale
  ignoreSinks: false,
  selected: NO_SELECTION,
  hovered: null, // the selection by mouse or focus, which is temporary and replaces the other
  window: { query: 0, key: 0 }, // the first row and column that the map shows
};

// The numbers that the state asks for, unpacked; see unpackAndShow and updateScale.
let view = { method: state.method, tokens: null, grid: null, layer: null, rowMaxima: [], maximum: 0, negative: false };

/** Which occurrence of its word each word is, such as "2nd"; "" if the text has it once, in any case. */
function occurrencesOf(texts) {
  const words = texts.map((text) => (text.trim() || text).toLowerCase());
  const counts = new Map();
  words.forEach((word) => counts.set(word, (counts.get(word) ?? 0) + 1));
  const seen = new Map();
  return words.map((word) => {
    const n = (seen.get(word) ?? 0) + 1;
    seen.set(word, n);
    const endings = { one: "st", two: "nd", few: "rd", other: "th" };
    return counts.get(word) > 1 ? `${n}${endings[ordinals.select(n)]}` : "";
  });
}
const ordinals = new Intl.PluralRules("en", { type: "ordinal" });

/** What is shown of the text: tokens, or words. `groups` has the first token and the end of each. */
let shown = null;
function useUnit() {
  const visible = (tokens) => tokens.map((token) => token || "∅");
  const single = (tokens) => tokens.map((_, place) => [place, place + 1]);
  const of = (tokens, words) => (state.unit === "word" && words)
    ? { texts: visible(words.texts), groups: words.groups }
    : { texts: visible(tokens), groups: single(tokens) };
  const keys = of(data.tokens, data.words);
  const queries = separateQueries ? of(data.queries, data.queryWords) : keys;
  const places = (groups) => groups.flatMap(([start, stop], n) => Array(stop - start).fill(n));
  shown = {
    keys, queries, S: keys.texts.length, T: queries.texts.length,
    keyOf: places(keys.groups), queryOf: places(queries.groups), // by token
    sinks: new Set(data.sinks.map((token) => places(keys.groups)[token])),
    occurrences: occurrencesOf(keys.texts),
    asked: places(queries.groups)[data.asked] ?? null,
  };
}
useUnit();

const current = () => state.hovered ?? state.selected;
/** What the map shows: the selection, or else the query whose prediction is asked for. */
function focused() {
  const { query, key, cell } = current();
  const asked = query === null && key === null && view.grid ? shown.asked : query;
  return { query: asked, key, cell };
}
const isIgnored = (key) => state.ignoreSinks && shown.sinks.has(key);
const clamp = (place, count) => Math.max(0, Math.min(count - 1, place));

/** Calls a function once for each argument, and then returns the same result. */
const memoize = (create) => {
  const created = new Map();
  return (key) => created.get(key) ?? created.set(key, create(key)).get(key);
};

function createElement(tag, properties = {}, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}
