// Words and numbers, as readers see them.

/** Rounds to the digits that are stored: three of a map, two of a single head. */
function formatNumber(x, digits = view.layer ? 2 : 3) {
  if (!Number.isFinite(x)) return "–";
  return Number(x.toPrecision(digits)).toString().replace("-", "−").replace("e−", "e-");
}
/** Whole percent from ten on, and two digits below. */
function formatPercent(x) {
  const percent = 100 * x;
  return `${Math.abs(percent) >= 9.5 ? formatNumber(Math.round(percent), 3) : formatNumber(percent, 2)}%`;
}
/** A number and a plural noun, such as "1,200 words" or "1 word". */
const countOf = (count, plural) =>
  `${count.toLocaleString("en")} ${count === 1 ? plural.slice(0, -1) : plural}`;
const isPercent = () => state.numbers === "percent";

/** A score: its share of all scores of the measure, or the number itself. */
function formatScore(score, name = view.method.name) {
  return isPercent() ? formatPercent(score / sizeOf(scoresOf(name))) : formatNumber(score, 3);
}
/** The number that stands for 100% in the maps of a measure, or null if they have no percent. */
function whole(method) {
  if (method.ofTarget) return data.scores[method.name] ? sizeOf(scoresOf(method.name)) : null;
  return method.unit.startsWith("share of ") ? 1 : null;
}
/** A value of a map, in percent or in the unit of the measure. */
function formatValue(value, method = view.method) {
  const all = isPercent() ? whole(method) : null;
  if (all === null || !Number.isFinite(value)) return formatNumber(value);
  return formatPercent(value / all);
}
/** What the numbers of a map are in. */
function unitOfValues(method) {
  if (isPercent() && whole(method) !== null) {
    return method.ofTarget ? "of all contributions" : method.unit.slice("share ".length);
  }
  return method.unit;
}

/** Shortens a token to 40 characters; the text shows it in full. */
function shorten(token) {
  const letters = Array.from(token);
  return letters.length > 40 ? `${letters.slice(0, 39).join("")}…` : token;
}
/** A token without the space before it, unless it is only that. */
const trim = (token) => token.trim() || token;
const describe = (token, place) => `“${shorten(trim(token))}” (${place})`;
const quote = (token) => createElement("bdi", { className: "quote" }, `“${shorten(trim(token))}”`);
const inQuotes = (token) => `“${shorten(trim(token))}”`;
/** Scores are those of the whole model, also while a single head is shown. */
const scopeNote = () => (view.layer ? " (all layers and heads)" : "");

const target = settings.target ? inQuotes(settings.target) : "the target";
const contrast = settings.contrast ? inQuotes(settings.contrast) : null;
const towards = contrast ? `towards ${target}` : `for ${target}`;
const against = contrast ? `towards ${contrast}` : `against ${target}`;
/** What the two colours mean for a measure. */
const directions = (method) => (method.ofTarget ? [towards, against] : ["positive", "negative"]);

const definitionList = (entries) =>
  createElement("dl", { className: "rows" }, ...entries.flatMap(
    ([name, value, className = "", title = name]) => [
      createElement("dt", { className, title }, name),
      createElement("dd", { className }, value),
    ]));
/** Lists values by method, with the current method in bold. */
const valueList = (entries) => definitionList(entries.map(([{ name, label, about }, value]) =>
  [label, value, name === view.method.name ? "current" : "", about]));
