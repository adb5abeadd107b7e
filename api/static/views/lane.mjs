// The lane of a machine: the steps it went through, how long each took, and those still to come.
import { html } from "../html.mjs";
import { span } from "../format.mjs";
import { now } from "../store.mjs";
import { verdictOf } from "../verdict.mjs";

const WAY = ["accepted", "placed", "disk", "network", "booting", "ready"];
const SHOWN = 8; // the latest ones

const lasted = (ms) => (ms < 1000 ? `${Math.max(0, Math.round(ms))} ms` : span(ms / 1000));

/** Times are the controller's; those before it started are not known. */
export function Lane({ vm }) {
  const done = (vm.steps ?? []).slice(-SHOWN);
  const last = done.at(-1);
  if (!last) return null;
  const verdict = verdictOf(vm);
  const settled = verdict === "ok";
  const ahead = settled || vm.desired !== "running" ? [] : WAY.slice(WAY.indexOf(last.name) + 1 || WAY.length);
  return html`<ol class="lane" aria-label=${`Steps of ${vm.name}`}>
    ${done.map((step, at) => {
      const next = done[at + 1];
      const time = next ? lasted(next.at_ms - step.at_ms) : settled ? "" : `for ${span(now.value - step.at_ms / 1000)}`;
      return html`<li key=${`${step.name} ${step.at_ms}`} class=${next ? "done" : `here tone-${verdict}`} aria-current=${next ? undefined : "step"}><b><bdi>${step.name}</bdi></b>${time && html` <span>${time}</span>`}</li>`;
    })}
    ${ahead.map((name) => html`<li key=${`to ${name}`} class="ahead">${name}<span class="unseen"> still to come</span></li>`)}
  </ol>`;
}
