// The signs: each has its own shape, so that none is told by its colour alone. Always beside a word, hence hidden from
// screen readers.
import { html } from "../html.mjs";

const line = (d) => html`<path d=${d} />`;
const SHAPES = {
  check: () => [html`<circle cx="8" cy="8" r="6.5" />`, line("M5 8.3l2.1 2.1L11.2 6")],
  turning: () => [line("M13.8 6.2A6.2 6.2 0 0 0 2.6 5"), line("M2.2 1.8v3.4h3.4"), line("M2.2 9.8A6.2 6.2 0 0 0 13.4 11"), line("M13.8 14.2v-3.4h-3.4")],
  clock: () => [html`<circle cx="8" cy="8" r="6.5" />`, line("M8 4.2V8l2.6 1.8")],
  warning: () => [line("M8 1.8L15 14H1z"), line("M8 6.2v3.6"), html`<circle class="dot" cx="8" cy="11.9" r=".9" />`],
  leaving: () => [line("M9.5 2H3v12h6.5"), line("M7 8h7.6"), line("M11.8 5.2L14.6 8l-2.8 2.8")],
  running: () => [html`<path class="full" d="M4 2.4v11.2L13.6 8z" />`],
  stopped: () => [html`<rect class="full" x="3" y="3" width="10" height="10" rx="1" />`],
  paused: () => [html`<rect class="full" x="3.4" y="3" width="3.2" height="10" rx=".8" />`, html`<rect class="full" x="9.4" y="3" width="3.2" height="10" rx=".8" />`],
  creating: () => [html`<circle class="dashed" cx="8" cy="8" r="6" />`],
  failed: () => [line("M5.2 1.5h5.6l3.7 3.7v5.6l-3.7 3.7H5.2l-3.7-3.7V5.2z"), line("M5.8 5.8l4.4 4.4M10.2 5.8l-4.4 4.4")],
  online: () => [html`<rect x="1.8" y="2.2" width="12.4" height="5" rx="1.2" />`, html`<rect x="1.8" y="8.8" width="12.4" height="5" rx="1.2" />`, html`<circle class="dot" cx="4.6" cy="4.7" r=".9" />`, html`<circle class="dot" cx="4.6" cy="11.3" r=".9" />`],
  offline: () => [line("M6 2.2h7a1.2 1.2 0 0 1 1.2 1.2V6A1.2 1.2 0 0 1 13 7.2h-2M3 2.2A1.2 1.2 0 0 0 1.8 3.4V6A1.2 1.2 0 0 0 3 7.2h3M7.6 8.8H3A1.2 1.2 0 0 0 1.8 10v2.6A1.2 1.2 0 0 0 3 13.8h9.6"), line("M1.4 .9l13.4 14.2")],
  copy: () => [html`<rect x="5.5" y="5.5" width="8.5" height="8.5" rx="1.5" />`, line("M10.5 5.5V3.5A1.5 1.5 0 0 0 9 2H3.5A1.5 1.5 0 0 0 2 3.5V9a1.5 1.5 0 0 0 1.5 1.5h2")],
  arrow: () => [line("M2 8h11.5"), line("M9.5 4l4 4-4 4")],
  back: () => [line("M14 8H2.5"), line("M6.5 4l-4 4 4 4")],
  out: () => [line("M6 3H3v10h10v-3"), line("M9 2.5h4.5V7"), line("M13.2 2.8L7.5 8.5")],
};

/** A sign of 16 units square in the colour of the text around it. */
export function Icon({ name }) {
  return html`<svg class="icon icon-${name}" viewBox="0 0 16 16" aria-hidden="true" focusable="false">${SHAPES[name]()}</svg>`;
}
