// Start

/** Names the sinks: `the first token ("In")`, `tokens 0 ("In"), 3 (",")` or `4 tokens`. */
function describeSinks() {
  const { sinks } = data;
  if (sinks.length > 3) return `${sinks.length} tokens`;
  const name = (place) => `(${inQuotes(data.tokens[place])})`;
  if (sinks.length === 1 && sinks[0] === 0) return `the first token ${name(0)}`;
  const names = sinks.map((place) => `${place} ${name(place)}`).join(", ");
  return `token${sinks.length > 1 ? "s" : ""} ${names}`;
}

/** Moves the map and the text to the place of the prediction. */
function openAtPrediction() {
  if (shown.asked === null) return;
  state.window = { query: shown.asked, key: shown.S };
  if (shown.asked === shown.T - 1) element("tokens").scrollTop = element("tokens").scrollHeight;
}

/** Asks the question about the target, and says how probable the answer is. */
function showQuestion() {
  const { target: wanted, contrast: other } = settings;
  element("title").replaceChildren("Why ", quote(wanted), ...(other ? [", and not ", quote(other)] : []), "?");
  document.title = element("title").textContent;
  element("answer").hidden = !data.verdict;
  element("answer").textContent = data.verdict ?? "";
}

const inGroups = (methods) => {
  const of = (isMore) => data.methods.flatMap((method, n) =>
    MORE.has(method.name) === isMore ? [createOption(n, method.label)] : []);
  const [first, more] = [of(false), of(true)];
  if (!first.length || !more.length) return [...first, ...more];
  return [...first, createElement("optgroup", { label: "more" }, ...more)];
};
element("method").append(...inGroups());
resetScale();
element("query-part").hidden = !separateQueries;
element("sink-label").hidden = !data.sinks.length;
element("sink-names").textContent = describeSinks();
element("sink-label").title = "Attention sinks receive much attention and can set the colour scale. If it " +
  "ignores them, the differences between the other tokens become visible.";
element("unit-label").hidden = !data.words;
const hasMaps = data.maps.length || data.layers.length;
element("export-map").hidden = !hasMaps;
element("title").textContent = hasMaps ? "Which tokens each token draws from" : "Token scores";
if (settings.target) showQuestion();
element("sentence").textContent = data.sentence ?? "";
element("heads-hint").textContent = `Each column is a layer, and each row is a head. Blue heads worked ${towards}, ` +
  `orange ones ${against}. Choose a head to see its map.`;
element("note").textContent = data.note ?? "";
document.querySelectorAll("label.of-maps").forEach((label) => (label.hidden = !hasMaps));
const made = Object.entries(settings).map(([name, value]) => `${name}: ${value}`);
element("settings").textContent = ["Made with captum_cw", ...made].join(" · ");
opened = Object.fromEntries(stateOf());
readLink();
writeText();
openAtPrediction();
scrollToSelected();
findRamps();
if (data.scores[state.method.name]) showView(); // the answer, before maps are unpacked
load();

new ResizeObserver(tellHeight).observe(document.body);
