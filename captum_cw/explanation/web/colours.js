// Colours, in even steps of lightness. Each has one meaning: blue is for or positive, orange is
// against or negative, teal marks what reads from a token, and grey is a sink. Colour-blind readers
// can tell them apart.

let ramps = null; // see findRamps
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

/** Computes the colours of the theme. A step of a ramp has a background and a text colour. */
function findRamps() {
  const theme = document.documentElement.dataset.theme;
  const dark = theme ? theme === "dark" : prefersDark.matches;
  const [from, to, chroma] = dark ? [0.27, 0.86, 0.12] : [0.96, 0.48, 0.16];
  // The browser converts the colours in a style. Reading them back from a canvas would return
  // noise in browsers that protect against fingerprinting.
  const ramp = (hue, most = chroma) => {
    const steps = Array.from({ length: 256 }, (_, i) => {
      const x = i / 255;
      const wanted = `oklch(${from + (to - from) * x} ${most && 0.008 + most * Math.sqrt(x)} ${hue})`;
      const step = createElement("i");
      step.style.color = `color-mix(in srgb, ${wanted}, ${wanted})`;
      return step;
    });
    const hidden = createElement("div", { hidden: true }, ...steps);
    document.body.append(hidden);
    const colours = steps.map((step) => {
      const parts = getComputedStyle(step).color.slice("color(srgb ".length, -1).split(" ");
      const [r, g, b] = parts.map((part) => Math.round(255 * Math.max(0, Math.min(1, part))));
      return { rgb: [r, g, b], css: `rgb(${r}, ${g}, ${b})`, ink: readableInk(r, g, b) };
    });
    hidden.remove();
    return colours;
  };
  const styleOf = (id, name) => getComputedStyle(element(id))[name];
  ramps = {
    towards: ramp(255),
    against: ramp(60),
    readBy: ramp(175),
    sink: ramp(0, 0)[100],
    ink: getComputedStyle(document.body).color,
    faint: styleOf("settings", "color"),
    line: styleOf("settings", "borderTopColor"),
    panel: styleOf("controls", "backgroundColor"),
    paper: getComputedStyle(document.body).backgroundColor,
  };
  picture = null;
}

/** Black or white, whichever has more contrast to a background (WCAG). */
function readableInk(...rgb) {
  const [r, g, b] = rgb.map((x) => ((x / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** The colour of a value, if `scale` has the darkest colour. */
function colourOf(value, scale) {
  const share = scale > 0 ? Math.min(Math.abs(value) / scale, 1) : 0;
  return (value < 0 ? ramps.against : ramps.towards)[Math.round(share * 255)];
}
/** The colour of a score: sinks are grey, since they say little about their words. */
function scoreFill(key, scale) {
  return shown.sinks.has(key) && view.scores[key] ? ramps.sink : colourOf(view.scores[key], scale);
}
/** The colour of the line below a token that reads from the selected one. */
function readByColour(value, scale) {
  return ramps.readBy[Math.round(Math.min(Math.abs(value) / scale, 1) * 255)];
}
