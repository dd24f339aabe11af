// Links and files that a reader takes away

const say = (words) => (element("said").textContent = element("status").textContent = words);

element("copy").hidden = !hasAddress;
element("copy").addEventListener("click", async () => {
  const link = location.href.split("#")[0] + linkOfState();
  try {
    await navigator.clipboard.writeText(link);
    say("The link to this state is copied.");
  } catch { // a browser may forbid it
    history.replaceState(null, "", link);
    say("The address of this page now leads to this state: copy it from there.");
  }
});

function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  createElement("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
  say(`${name} is saved.`);
}

/** A field of a CSV file. */
const field = (x) => (/[",\n\r]/.test(String(x)) ? `"${String(x).replaceAll('"', '""')}"` : String(x));
const csv = (rows) => rows.map((row) => row.map(field).join(",")).join("\n") + "\n";

function scoresAsCsv() {
  const names = Object.keys(data.scores);
  const scores = names.map(scoresOf);
  const rows = shown.keys.texts.map((text, key) => [key, text, ...scores.map((of) => of[key])]);
  return csv([["place", state.unit, ...names], ...rows]);
}
function mapAsCsv() {
  const rows = shown.queries.texts.map((text, query) => [query, text,
    ...Array.from({ length: shown.S }, (_, key) => (Number.isNaN(valueAt(query, key)) ? "" : valueAt(query, key)))]);
  return csv([["place", "query", ...shown.keys.texts], ...rows]);
}

/** Text for XML, which allows neither control characters nor single surrogates. */
const escaped = (text) => text
  .replace(/[&<>"]/g, (x) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[x])
  .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ud800-\udfff\ufffe\uffff]/gu, "�");

/** Breaks a text into lines of a width in pixels, and shortens words that are longer. */
function linesOf(context, text, width) {
  const lines = [""];
  for (const whole of text.split(" ").filter(Boolean)) {
    const word = fitting(context, whole, width);
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (lines.at(-1) && context.measureText(longer).width > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines.filter(Boolean);
}

/** The answer as a picture: question, sentence, bars, and what their numbers are. */
function answerAsSvg() {
  const [width, left, line] = [720, 190, 26];
  const measure = document.createElement("canvas").getContext("2d");
  const font = "system-ui, 'Segoe UI', Roboto, sans-serif";
  const parts = [];
  let y = 10;
  const write = (text, x, size, { weight = 400, anchor = "start", fill = ramps.ink } = {}) =>
    parts.push(`<text x="${x}" y="${y}" font-size="${size}" font-weight="${weight}" text-anchor="${anchor}" ` +
      `fill="${fill}">${escaped(text)}</text>`);
  const paragraph = (text, size, style = {}) => {
    measure.font = `${style.weight ?? 400} ${size}px ${font}`;
    for (const row of linesOf(measure, text, width - 40)) {
      y += 8 + size;
      write(row, 20, size, style);
    }
  };
  paragraph(element("title").textContent, 20, { weight: 700 });
  paragraph(element("answer").textContent, 14);
  if (view.method.name === data.initial) paragraph(element("sentence").textContent, 14); // it is about that measure
  const rows = barRows();
  const longest = Math.max(...rows.map(([, score]) => Math.abs(score)), 0) || 1;
  const signed = rows.some(([, score]) => score < 0);
  const [room, zero] = signed ? [(width - left - 90) / 2, left + (width - left - 90) / 2] : [width - left - 90, left];
  y += 14;
  for (const [key, score, isSink] of rows) {
    y += line;
    const note = isSink ? " (sink)" : "";
    measure.font = `14px ${font}`;
    const word = fitting(measure, shown.keys.texts[key], left - 30 - measure.measureText(note).width);
    write(word + note, left - 10, 14, { anchor: "end" });
    const length = (room * Math.abs(score)) / longest;
    const colour = isSink ? ramps.sink.css : (score < 0 ? ramps.against : ramps.towards)[200].css;
    parts.push(`<rect x="${score < 0 ? zero - length : zero}" y="${y - 14}" width="${length}" height="18" fill="${colour}"/>`);
    write(formatScore(score), width - 20, 14, { anchor: "end" });
  }
  y += 10;
  const [positive, negative] = directions(view.method);
  const colours = signed ? ` Blue is ${positive}, orange is ${negative}.` : "";
  paragraph(`Scores: ${view.method.label}.${colours} ${element("bars-note").textContent}`, 12, { fill: ramps.faint });
  const height = y + 24;
  return { width, height, text: `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" ` +
    `viewBox="0 0 ${width} ${height}" font-family="${font}"><rect width="100%" height="100%" fill="${ramps.paper}"/>` +
    `${parts.join("")}</svg>` };
}

/** Draws an SVG picture into a canvas of twice its size. */
async function asPng({ width, height, text }) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
  canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const exports = {
  svg: () => download("answer.svg", "image/svg+xml", answerAsSvg().text),
  png: async () => download("answer.png", "image/png", await asPng(answerAsSvg())),
  scores: () => download("scores.csv", "text/csv", scoresAsCsv()),
  map: () => download("map.csv", "text/csv", mapAsCsv()),
};
element("export").addEventListener("change", async ({ target: select }) => {
  const { value } = select;
  select.value = "";
  try {
    await exports[value]();
  } catch (error) {
    say(`The file could not be saved: ${error.message}`);
  }
});
