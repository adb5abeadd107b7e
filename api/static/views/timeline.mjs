// The last hour as a plot: machines that should run, that run, and that are not as desired.
import { html } from "../html.mjs";
import { samples } from "../store.mjs";
import { effect } from "../vendor/signals.mjs";
import { useEffect, useRef } from "../vendor/preact-hooks.mjs";
import Plot from "../vendor/uplot.mjs";

const HEIGHT = 170;
const LINES = [
  ["desired", "Desired", "--muted", [6, 4]],
  ["actual", "Running", "--ok"],
  ["unconverged", "Not as desired", "--trouble", [2, 3]],
];
const columns = (all) => [all.map(({ at }) => at), ...LINES.map(([field]) => all.map((one) => one[field]))];

function draw(box) {
  const colour = (name) => getComputedStyle(box).getPropertyValue(name).trim();
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
  return new Plot(
    {
      width: box.clientWidth || 600,
      height: HEIGHT,
      cursor: { drag: { x: false, y: false } },
      legend: { show: false },
      scales: { x: { range: (_, first, last) => [Math.min(first, last - 300), last] }, y: { range: (_, low, high) => [0, Math.max(high, 1) * 1.08] } },
      axes: [{ ...axis, space: 90 }, { ...axis, size: 46, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }],
      series: [{}, ...LINES.map(([, label, tone, dash]) => ({ label, stroke: colour(tone), width: 2, dash, points: { show: false } }))],
    },
    columns(samples.peek()),
    box,
  );
}

function Canvas() {
  const box = useRef(null);
  useEffect(() => {
    let plot = draw(box.current);
    const stop = effect(() => plot.setData(columns(samples.value)));
    const anew = () => {
      plot.destroy();
      plot = draw(box.current);
    };
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", anew);
    const resized = new ResizeObserver(([{ contentRect }]) => plot.setSize({ width: contentRect.width, height: HEIGHT }));
    resized.observe(box.current);
    return () => {
      stop();
      scheme.removeEventListener("change", anew);
      resized.disconnect();
      plot.destroy();
    };
  }, []);
  const last = samples.value.at(-1);
  const said = `Last hour. Now ${last.desired} desired, ${last.actual} running, ${last.unconverged} not as desired.`;
  return html`<div class="plot" ref=${box} role="img" aria-label=${said}></div>`;
}

/** Nothing until two samples make a line. */
export function Timeline() {
  if (samples.value.length < 2) return null;
  return html`<section class="timeline" aria-label="The last hour">
    <p class="keys" aria-hidden="true">${LINES.map(([field, label]) => html`<span key=${field} class="line-${field}">${label} <b>${samples.value.at(-1)[field]}</b></span>`)}</p>
    <${Canvas} />
  </section>`;
}
