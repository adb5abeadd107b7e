// A host: a card on the first page, and its own page (`#/host/ID`) with the machines placed on it.
import { html } from "../html.mjs";
import { moment, plural, share, span } from "../format.mjs";
import { byHost, heartbeats, hosts, now } from "../store.mjs";
import { HOST_STATES, say } from "../verdict.mjs";
import { href } from "../route.mjs";
import { HostActions } from "./doing.mjs";
import { EventList } from "./events.mjs";
import { Icon } from "./icons.mjs";
import { Machines } from "./machine.mjs";
import { Bar, Name, Sign } from "./parts.mjs";

function Room({ resource }) {
  const rows = [
    ["vCPU", resource.cpu_used, resource.cpu_total, `${resource.cpu_used} of ${resource.cpu_total}`],
    ["Memory", resource.mem_used, resource.mem_total, share(resource.mem_used, resource.mem_total)],
    ["Disk", resource.disk_used, resource.disk_total, share(resource.disk_used, resource.disk_total)],
  ];
  return html`<dl class="room">
    ${rows.map(([name, used, total, text]) => html`<div key=${name}><dt>${name}</dt><dd>${text}</dd><${Bar} parts=${[[used > total ? "trouble" : "used", used]]} total=${total} /></div>`)}
  </dl>`;
}

/** When it was last heard, and what keeps new machines from it. */
function Heard({ host }) {
  const at = heartbeats.value[host.id];
  return html`<p class="muted">
    ${at !== undefined && html`<span>heard ${span(now.value - at)} ago</span>`}
    ${host.cordoned && html` <${Sign} icon="paused" word=${host.drain ? `Cordoned, ${host.drain.state}: ${host.drain.left} of ${host.drain.total} left` : "Cordoned"} tone="waiting" />`}
  </p>`;
}

function Body({ host }) {
  return html`<p class="muted"><${Name} text=${host.addr} mono /></p>
    <p class="muted">${plural(host.resource.vm_count, "machine")} · ${host.engines.length ? host.engines.join(", ") : "engines not known yet"} · ${host.storage} storage</p>
    <${Heard} host=${host} />
    ${host.message && html`<p class="message"><bdi>${host.message}</bdi></p>`}
    ${host.resource.cpu_total > 0 && html`<${Room} resource=${host.resource} />`}`;
}

/** The card of a host. */
export function HostCard({ id }) {
  const host = hosts.get(id);
  if (!host) return null;
  return html`<li class="card host state-${host.state}">
    <header><h3><a href=${href("host", id)}><${Name} text=${id} /></a></h3><${Sign} ...${say(HOST_STATES, host.state)} /></header>
    <${Body} host=${host} />
  </li>`;
}

/** The page of a host. */
export function HostPage({ id }) {
  const host = hosts.get(id);
  const placed = byHost.ids(id);
  return html`<nav class="back"><a href="#/"><${Icon} name="back" />Fleet</a></nav>
    <h1 tabindex="-1" class="title"><span class="kind">Host</span><${Name} text=${id} /></h1>
    ${!host && html`<p class="empty">There is no host of this id. It may have been removed, or has told its own id since.</p>`}
    ${host &&
    html`<article class="card host state-${host.state}">
      <header><${Sign} ...${say(HOST_STATES, host.state)} /><span class="muted">registered ${moment(host.registered_at)}</span></header>
      <${Body} host=${host} />
    </article>
    <article class="card env">
      <header><h2>Machines placed here</h2></header>
      ${placed.length ? html`<${Machines} ids=${placed} label=${`Machines on ${id}`} withEnv full />` : html`<p class="empty">None.</p>`}
    </article>
    <${HostActions} host=${host} /><${EventList} of="host" id=${id} />`}`;
}
