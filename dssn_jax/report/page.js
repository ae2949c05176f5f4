"use strict";
// Draws the charts in the colors of the page, and handles its buttons.
const specs = JSON.parse(document.getElementById("charts").textContent);
const plots = [...document.querySelectorAll(".plot")];
const options = { responsive: true, displaylogo: false, displayModeBar: false };
const longest = Math.max(0, ...specs.flatMap((spec) => spec.traces.flatMap((trace) => trace.meta?.seconds ?? [])));
const unit = longest > 3 * 3600 ? { name: "hours", seconds: 3600 } : { name: "minutes", seconds: 60 };
let axis = "step";

// Returns the layout of a chart, in the colors of the light or the dark page.
function themed(spec) {
  const style = getComputedStyle(document.body);
  const color = (name) => style.getPropertyValue(name).trim();
  const lines = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true };
  const layout = structuredClone(spec.layout);
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: color("--text"), family: style.fontFamily || "sans-serif", size: 12 },
    margin: { l: 44, r: 10, t: 8, b: 36 },
    showlegend: false,
    hovermode: spec.kind === "curve" ? "x unified" : "closest",
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--text") } },
    xaxis: { ...lines, ...(spec.kind === "curve" ? axisOptions() : {}), ...layout.xaxis },
    yaxis: { ...lines, ...layout.yaxis },
  };
}

function axisOptions() {
  return { title: { text: axis === "time" ? unit.name : axis, standoff: 4 }, rangemode: "tozero" };
}

// Returns the x values of a curve on the chosen axis; null where the run did not record them.
function positions(trace) {
  const { seconds, steps_per_epoch: perEpoch } = trace.meta;
  if (axis === "epoch") return trace.x.map((step) => (perEpoch ? step / perEpoch : null));
  if (axis === "time") return seconds.map((value) => (value === null ? null : value / unit.seconds));
  return trace.x;
}

function hidden(trace) {
  const button = document.querySelector(`button.run[data-run="${trace.meta?.run}"]`);
  return button !== null && button.getAttribute("aria-pressed") === "false";
}

function traces(spec) {
  return spec.traces.map((trace) => ({
    ...trace,
    ...(spec.kind === "curve" ? { x: positions(trace) } : {}),
    visible: !hidden(trace),
  }));
}

function draw() {
  for (const plot of plots) {
    const spec = specs[Number(plot.dataset.chart)];
    Plotly.react(plot, traces(spec), themed(spec), options);
  }
}

for (const button of document.querySelectorAll("button.axis")) {
  button.addEventListener("click", () => {
    axis = button.dataset.axis;
    document.querySelectorAll("button.axis").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    draw();
  });
}

for (const button of document.querySelectorAll("button.run")) {
  button.addEventListener("click", () => {
    const show = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", String(show));
    document.querySelectorAll(`[data-of-run="${button.dataset.run}"]`).forEach((element) => { element.hidden = !show; });
    draw();
  });
}

// A click enlarges a picture; small ones are scaled without smoothing.
const dialog = document.getElementById("enlarged");
for (const image of document.querySelectorAll(".pictures img")) {
  image.classList.toggle("pixelated", image.width < 200);
  image.addEventListener("click", () => {
    const large = dialog.querySelector("img");
    large.src = image.src;
    large.alt = image.alt;
    large.classList.toggle("pixelated", image.naturalWidth < 200);
    dialog.querySelector("p").textContent = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", () => dialog.close());

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
