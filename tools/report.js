"use strict";
const curves = JSON.parse(document.getElementById("numbers").textContent);
const { width, left, right, top: upper, bottom } = curves.frame;

for (const button of document.querySelectorAll("[data-hides]")) {
  button.addEventListener("click", () => {
    const hidden = document.body.classList.toggle("hide-" + button.dataset.hides);
    button.setAttribute("aria-pressed", String(!hidden));
  });
}

function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle; else high = middle;
  }
  return wanted - steps[low] <= steps[high] - wanted ? low : high;
}

const shown = value => value === null ? "not finite" : String(Number(value.toPrecision(5)));

function words(chart, step) {
  const lines = chart.lines.filter(([run]) => !document.body.classList.contains("hide-run" + run));
  return lines.map(([run, steps, values, smooth]) => {
    const i = nearest(steps, step);
    const mean = smooth ? `  (mean ${shown(smooth[i])})` : "";
    const name = curves.runs.length > 1 ? curves.runs[run] + "  " : "";
    return `${name}${shown(values[i])}${mean}  at step ${steps[i]}`;
  }).join("\n");
}

function point(figure, step) {
  const chart = curves.charts[figure.dataset.chart];
  const [first, last] = chart.axes;
  figure.step = Math.min(Math.max(Math.round(step), first), last);
  const x = left + (figure.step - first) / (last - first) * (width - left - right);
  const cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip");
  cross.setAttribute("d", `M${x} ${upper}V${bottom}`);
  cross.removeAttribute("hidden");
  tip.textContent = words(chart, figure.step);
  tip.hidden = !tip.textContent;
  const share = x / width;
  tip.style.left = share < 0.5 ? `calc(${100 * share}% + 8px)` : "auto";
  tip.style.right = share < 0.5 ? "auto" : `calc(${100 * (1 - share)}% + 8px)`;
}

function leave(figure) {
  figure.querySelector(".cross").setAttribute("hidden", "");
  figure.querySelector(".tip").hidden = true;
}

for (const figure of document.querySelectorAll(".chart")) {
  const [first, last] = curves.charts[figure.dataset.chart].axes;
  const plot = figure.querySelector(".plot");
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    point(figure, first + (x - left) / (width - left - right) * (last - first));
  });
  plot.addEventListener("pointerleave", () => leave(figure));
  figure.addEventListener("blur", () => leave(figure));
  figure.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") leave(figure);
    if (!move || event.target !== figure) return;
    event.preventDefault();
    const stride = Math.max(1, Math.round((last - first) / 100));
    point(figure, (figure.step ?? (move > 0 ? first - stride : last + stride)) + move * stride);
  });
}

document.documentElement.dataset.charts = String(curves.charts.length);
