// The page's keys: `/` to the search, `j` and `k` through what is listed, `?` for help, Esc out of the search.
// Never while something is typed, in a dialog, or with a modifier: those keys are the browser's and the reader's own.
import { landing } from "./route.mjs";
import { link } from "./stream.mjs";
import { openHelp } from "./views/help.mjs";

const STOPS = "main .rows [role=row] a, main article.env h3 a, main .machine .where a, main .host h3 a, main .heat a";
const typing = (at) => at.matches?.("input, textarea, select, [contenteditable]");

function search() {
  const field = document.getElementById("filter");
  if (field) field.select();
  else {
    landing.id = "filter";
    location.hash = "#/envs";
  }
}

function move(by) {
  const stops = [...document.querySelectorAll(STOPS)];
  const at = stops.indexOf(document.activeElement);
  const seen = stops.findIndex((stop) => stop.getBoundingClientRect().top >= 0);
  stops[at < 0 ? Math.max(seen, 0) : at + by]?.focus();
}

const KEYS = { "/": search, j: () => move(1), k: () => move(-1), "?": openHelp };

/** Listens for as long as the page is open. */
export function listen() {
  addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
    if (document.querySelector("dialog[open]") || link.peek().state === "locked") return;
    if (typing(event.target)) {
      if (event.key === "Escape" && event.target.id === "filter") event.target.blur();
      return;
    }
    if (!Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
}
