// The dashboard's start: draws the frame, follows the controller, keeps time, title and focus.
import { html } from "./html.mjs";
import { listen } from "./keyboard.mjs";
import { route } from "./route.mjs";
import { revision, tally, tick } from "./store.mjs";
import { follow, link } from "./stream.mjs";
import { effect } from "./vendor/signals.mjs";
import { options, render } from "./vendor/preact.mjs";
import { Frame } from "./views/frame.mjs";

// Drawing is a task of its own: together with reading a large fleet it would keep the page from answering too long.
options.debounceRendering = (draw) => setTimeout(draw);
render(html`<${Frame} />`, document.getElementById("app"));

effect(() => {
  const { page, id } = route.value;
  const { ok, total } = tally.value;
  const lead = { live: "", stale: "⚠ ", connecting: "", locked: "" }[link.value.state];
  const place = page === "fleet" ? "" : page === "new" ? "New environment · " : page === "envs" ? "Environments · " : `${id.slice(0, 80)} · `;
  document.title = revision.value === null ? "muster" : `${lead}${place}${ok}/${total} as desired · muster`;
});

listen();
setInterval(tick, 1000);
follow();
