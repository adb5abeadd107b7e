// What happened to an environment or a host: what the controller kept, and what it tells from then on.
import { html } from "../html.mjs";
import { moment, span } from "../format.mjs";
import { events, now } from "../store.mjs";
import { call, link } from "../stream.mjs";
import { useEffect } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";
import { Name, Sign } from "./parts.mjs";

const SHOWN = 50;

/** `of`: "env" or "host". */
export function EventList({ of, id }) {
  const kept = useSignal([]);
  const failed = useSignal("");
  // Said anew with each connection: a new snapshot brings no events, so those of the gap are asked for.
  const connection = link.value.state === "live" ? link.value : null;
  useEffect(() => {
    if (!connection) return;
    failed.value = "";
    call("GET", `events?${of}=${encodeURIComponent(id)}&limit=${SHOWN}`).then(
      (found) => (kept.value = found),
      (error) => (failed.value = error.message),
    );
  }, [of, id, connection]);
  const all = new Map(kept.value.map((one) => [one.id, one]));
  for (const one of events.value) if (one[of] === id) all.set(one.id, one);
  const latest = [...all.values()].sort((a, b) => b.revision - a.revision).slice(0, SHOWN);
  return html`<article class="card panel" aria-labelledby="events">
    <h2 id="events">Events</h2>
    ${failed.value && html`<p class="message tone-trouble">${failed.value}</p>`}
    ${!latest.length && !failed.value && html`<p class="muted">Nothing kept.</p>`}
    <ol class="events">${latest.map(
      (one) => html`<li key=${one.id}>
        <time class="muted" datetime=${new Date(one.last_seen * 1000).toISOString()} title=${moment(one.last_seen)}>${span(now.value - one.last_seen)} ago</time>
        <${Sign} icon=${one.type === "Warning" ? "warning" : "check"} word=${one.reason} tone=${one.type === "Warning" ? "trouble" : "off"} />
        <span class="told">${one.vm_name && html`<${Name} text=${one.vm_name} />: `}<bdi>${one.message}</bdi>${one.count > 1 && html` <b>× ${one.count}</b>`}</span>
      </li>`,
    )}</ol>
  </article>`;
}
