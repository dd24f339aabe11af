// The answer: the prompt, bars of the words with the largest shares, and attention beside it.

/** The places with the largest sizes, and their values; zeros are left out. */
function largest(values, count, isSkipped = () => false) {
  const places = [];
  values.forEach((value, place) => value && !isSkipped(place) && places.push(place));
  places.sort((a, b) => Math.abs(values[b]) - Math.abs(values[a]) || a - b);
  return places.slice(0, count).map((place) => [place, values[place]]);
}

/** The rows of the bars: sinks first, set apart, then the words with the largest scores. */
function barRows() {
  const scores = view.scores;
  const sinks = [...shown.sinks].filter((key) => scores[key]).map((key) => [key, scores[key], true]);
  return [...sinks, ...largest(scores, data.bars, (key) => shown.sinks.has(key)).map((row) => [...row, false])];
}

/** The number of characters of a prompt that is shown in full, and of the end of a longer one. */
const PROMPT = 200;
const PROMPT_END = 100;

/** The places of the prompt that are shown: its end, and the words of the bars between their neighbours. */
function excerpt(rows) {
  const { texts } = shown.keys;
  const places = [...texts.keys()];
  if (texts.join("").length <= PROMPT) return places;
  let [end, length] = [texts.length, 0];
  while (end && length < PROMPT_END) length += texts[--end].length;
  return places.filter((place) => place >= end || rows.some(([key]) => Math.abs(key - place) <= 1));
}

/** Shows the prompt in the colours of its words, and the answer after it. */
function paintPrompt() {
  const isNext = settings.target && data.asked === data.tokens.length - 1 && data.predicted;
  element("prompt").hidden = !isNext;
  if (!isNext) return;
  const scale = view.scores && scoreScale(view.scores);
  const places = excerpt(view.scores ? barRows() : []);
  const parts = places.flatMap((place, n) => {
    const text = shown.keys.texts[place];
    const gap = place > (places[n - 1] ?? -1) + 1 ? [n ? " … " : "… "] : [];
    const start = gap.length || !place ? "" : text.slice(0, text.length - text.trimStart().length);
    const word = createElement("span", {}, text.trimStart() || text);
    colourToken(word, view.scores && scoreFill(place, scale));
    return [...gap, start, word];
  });
  const isOwn = !("model's prediction" in settings);
  const answer = createElement("b", { className: isOwn ? "" : "unchosen" }, trim(settings.target));
  const note = isOwn ? [] : [" ", createElement("small", {}, "not the model's choice")];
  const space = /^\s/.test(settings.target) ? " " : "";
  element("prompt").replaceChildren(createElement("bdi", {}, ...parts), space, answer, ...note);
}

function paintBars() {
  element("bars-part").hidden = !view.scores;
  if (!view.scores) return;
  const { method } = view;
  const rows = barRows();
  const longest = Math.max(...rows.map(([, score]) => Math.abs(score)), 0) || 1;
  const signed = rows.some(([, score]) => score < 0);
  const unit = { word: data.words ? "words" : "tokens", token: "tokens" }[state.unit];
  const answers = contrast ? `${target} and ${contrast}` : target;
  element("bars-title").textContent = method.ofTarget
    ? `The ${unit} behind ${answers}` : `The ${unit} with the largest scores, by “${method.label}”`;
  const [positive, negative] = directions(method);
  element("bars-ends").replaceChildren(...(signed || (method.ofTarget && contrast)
    ? [createElement("span", {}, signed ? `← ${negative}` : ""), createElement("span", {}, `${positive} →`)] : []));
  element("bars").classList.toggle("signed", signed);
  element("bars").replaceChildren(...rows.map(([key, score, isSink]) => {
    const word = shown.keys.texts[key];
    const note = isSink ? "sink" : shown.occurrences[key];
    const button = createElement("button", { type: "button", onclick: () => goTo(key) },
      createElement("bdi", {}, trim(word)), ...(note ? [" ", createElement("small", {}, note)] : []));
    button.title = `Show ${describe(word, key)} in the text`;
    const bar = createElement("i");
    bar.style.width = `${(100 * Math.abs(score)) / longest / (signed ? 2 : 1)}%`;
    bar.style[signed && score < 0 ? "right" : "left"] = signed ? "50%" : "0";
    bar.style.background = isSink ? ramps.sink.css : (score < 0 ? ramps.against : ramps.towards)[200].css;
    const value = createElement("span", { className: "value" }, formatScore(score));
    const track = createElement("span", { className: "track" }, bar);
    return createElement("li", { className: isSink ? "sink-row" : "" }, button, track, value);
  }));
  const others = shown.S - rows.length;
  const left = 1 - rows.reduce((sum, [, score]) => sum + Math.abs(score), 0) / sizeOf(view.scores);
  const about = contrast ? `gave to ${target} or to ${contrast}` : `added to ${target} or took from it`;
  const layers = method.name === "target"
    ? " The bars do not add up to the prediction: what passes through several layers counts in each of them." : "";
  const all = method.ofTarget ? `of all that the ${unit} ${about}` : `of all scores${scopeNote()}`;
  element("bars-note").textContent = (isPercent()
    ? `Percent ${all}.` : `Numbers are in the ${method.unit || "method's own unit"}.`) +
    (others > 0 ? ` ${countOf(others, `more ${unit}`)}: ${formatPercent(Math.abs(left))}.` : "") + layers;
}

/**
 * Attention beside contributions: what each says of the same text. Contributions are those to the
 * answer, or those to the outputs of layers at a query that is selected.
 */
const COMPARED = ["attention", "contribution"];
const answering = data.methods.find(({ name, ofTarget }) => name === data.initial && ofTarget && data.scores[name]);

/** The values of a measure at the shown query, or its scores if there are no maps. */
function comparedValues(name, grid, query) {
  if (grid && query !== null) {
    const method = data.methods.find((one) => one.name === name);
    return Array.from(grouped(grid, method).subarray(query * shown.S, (query + 1) * shown.S));
  }
  return scoresOf(name);
}

let latestComparison = 0;

async function paintComparison() {
  const request = ++latestComparison;
  const hasMaps = COMPARED.every((name) => data.maps.includes(name));
  const { query } = current();
  const hasScores = COMPARED.every((name) => data.scores[name]);
  const at = !hasMaps ? null : query ?? shown.asked ?? (hasScores ? null : shown.T - 1);
  element("compare-part").hidden = at === null && !hasScores;
  if (element("compare-part").hidden) return;
  const ofAnswer = answering && (query === null || !hasMaps);
  const grids = await Promise.all(COMPARED.map((name) => (at === null ? null : loadMap(name))));
  if (request !== latestComparison) return;
  element("compare-at").replaceChildren(...(at === null
    ? ["Over all positions of the text, layers and heads."]
    : ["At ", quote(shown.queries.texts[at]), ", over all layers and heads.",
      answering && !ofAnswer ? " This is not about the prediction." : ""]));
  const titles = [
    ["Attention", "where the layers look"],
    ["Contributions", ofAnswer ? (contrast ? `${towards} and ${against}` : `for and against ${target}`) : "what makes the outputs of layers"],
  ];
  COMPARED.forEach((name, n) => {
    const isAnswer = ofAnswer && name === "contribution";
    const values = isAnswer ? scoresOf(answering.name) : comparedValues(name, grids[n], at);
    const all = sizeOf(values);
    const isApart = (key) => isIgnored(key) || (isAnswer && shown.sinks.has(key));
    const maximum = values.reduce((most, x, key) => (isApart(key) ? most : Math.max(most, Math.abs(x))), 0);
    const box = element(`compare-${name}`);
    const [label, about] = titles[n];
    const fill = (key) => (isIgnored(key) ? null : isApart(key) ? ramps.sink : colourOf(values[key], maximum));
    comparedSpans(box.querySelector(".strip")).forEach((span, key) => colourToken(span, fill(key)));
    const top = largest(values, 3, isIgnored).map(([key, value]) =>
      `${shown.occurrences[key]} ${inQuotes(shown.keys.texts[key])} ${formatPercent(value / all)}`.trim());
    box.querySelector("h3").replaceChildren(label, createElement("small", {}, ` ${about}`));
    box.querySelector("p").textContent = top.join(", ");
  });
}

/** The words of a strip, which are written once for each unit. */
function comparedSpans(box) {
  if (box.unit !== state.unit) {
    box.unit = state.unit;
    box.spans = spansOf(box, shown.keys.texts, (text) => createElement("span", {}, text));
    box.scrollTop = box.scrollHeight;
  }
  return box.spans;
}
