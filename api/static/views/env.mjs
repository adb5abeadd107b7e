// An environment: on the first page as a card with some of its machines, on its own page (`#/env/NAME`) with all.
import { html } from "../html.mjs";
import { moment, plural } from "../format.mjs";
import { envs, groups, vms } from "../store.mjs";
import { PHASES, say, verdictOf } from "../verdict.mjs";
import { href } from "../route.mjs";
import { EnvActions } from "./doing.mjs";
import { EventList } from "./events.mjs";
import { Icon } from "./icons.mjs";
import { Machines } from "./machine.mjs";
import { Observed } from "./observed.mjs";
import { Bar, Countdown, Name, Sign } from "./parts.mjs";

const SHOWN = 6; // machines on a card
const SHOWN_FILTERED = 100;

/** Those that are not as desired come first where not all are shown: they are what somebody looks for. */
function pick(ids, limit) {
  if (ids.length <= limit) return ids;
  const fine = (id) => verdictOf(vms.get(id)) === "ok";
  return [...ids.filter((id) => !fine(id)), ...ids.filter(fine)].slice(0, limit);
}

function Facts({ env, name }) {
  const ids = groups.value.get(name) ?? [];
  const counts = {};
  for (const id of ids) {
    const verdict = verdictOf(vms.get(id));
    counts[verdict] = (counts[verdict] ?? 0) + 1;
  }
  const phase = env && say(PHASES, env.phase);
  return html`<div class="env-facts">
    ${phase && html`<${Sign} ...${phase} />`}
    <span class="nowrap"><b>${counts.ok ?? 0}</b> of ${ids.length} as desired</span>
    ${env && html`<span class="muted">owner <${Name} text=${env.owner} /></span>`}
    ${env && html`<span class="muted">${env.state === "stopped" ? "asked to be stopped" : "asked to run"}</span>`}
    ${env && html`<span class="muted">${env.expires_at ? html`<${Countdown} at=${env.expires_at} before="expires in " past="expiring now" />` : "never expires"}</span>`}
    <${Bar} parts=${["ok", "busy", "waiting", "trouble", "leaving"].map((verdict) => [verdict, counts[verdict] ?? 0])} total=${ids.length} />
  </div>`;
}

/** The card of an environment. `ids`: its machines that are to be shown. */
export function EnvCard({ name, ids, filtered }) {
  const env = envs.get(name);
  const all = groups.value.get(name)?.length ?? 0;
  const some = pick(ids, filtered ? SHOWN_FILTERED : SHOWN);
  return html`<article class="card env">
    <header>
      <h3><a href=${href("env", name)}><${Name} text=${name} /></a></h3>
      <${Facts} env=${env} name=${name} />
    </header>
    ${some.length > 0 && html`<${Machines} ids=${some} label=${`Machines of ${name}`} />`}
    ${all === 0 && html`<p class="empty">No machine left in it.</p>`}
    ${all > some.length && html`<a class="more" href=${href("env", name)}>Show all ${plural(all, "machine")} of this environment</a>`}
  </article>`;
}

/** The page of an environment. */
export function EnvPage({ name }) {
  const env = envs.get(name);
  const ids = groups.value.get(name);
  return html`<nav class="back"><a href="#/"><${Icon} name="back" />Fleet</a></nav>
    <h1 tabindex="-1" class="title"><span class="kind">Environment</span><${Name} text=${name} /></h1>
    ${!ids && html`<p class="empty">There is no environment of this name. It may have been deleted, or its lifetime is over.</p>`}
    ${ids &&
    html`<article class="card env">
      <header><${Facts} env=${env} name=${name} /></header>
      ${env && html`<p class="muted meta">Created ${moment(env.created_at)} · generation ${env.generation}</p>`}
      <h2 class="unseen">Machines</h2>
      ${ids.length > 0 ? html`<${Machines} ids=${ids} label=${`Machines of ${name}`} full />` : html`<p class="empty">No machine left in it.</p>`}
    </article>
    ${env && html`<${EnvActions} env=${env} /><${EventList} of="env" id=${name} /><${Observed} env=${env} />`}`}`;
}
