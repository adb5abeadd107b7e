// The keys, in a dialog.
import { html } from "../html.mjs";

const KEYS = [
  ["/", "Search environments, machines and hosts"],
  ["j", "Next in the list"],
  ["k", "The one before"],
  ["Enter", "Open it"],
  ["Esc", "Leave the search, close a dialog"],
  ["?", "These keys"],
];

/** Shows it; the browser keeps the focus inside and gives it back afterwards. */
export function openHelp() {
  document.getElementById("help").showModal();
}

const closeHelp = () => document.getElementById("help").close();

export const Help = () => html`<dialog id="help" aria-labelledby="help-title">
  <h2 id="help-title">Keyboard</h2>
  <dl class="keymap">${KEYS.map(([key, does]) => html`<dt key=${key}><kbd>${key}</kbd></dt><dd>${does}</dd>`)}</dl>
  <button type="button" class="primary" onClick=${closeHelp}>Close</button>
</dialog>`;
