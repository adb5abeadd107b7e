// The first page: how far the fleet is from what was asked for, then hosts and environments.
import { html } from "../html.mjs";
import { share } from "../format.mjs";
import { ask, query } from "../route.mjs";
import { byName, envs, groups, hosts, tally } from "../store.mjs";
import { VERDICTS } from "../verdict.mjs";
import { signal } from "../vendor/signals.mjs";
import { EnvCard } from "./env.mjs";
import { EnvSearch, EnvTable, found, isFiltered } from "./envs.mjs";
import { HeatGrid } from "./heat.mjs";
import { HostCard } from "./host.mjs";
import { Icon } from "./icons.mjs";
import { Bar } from "./parts.mjs";
import { Timeline } from "./timeline.mjs";

const HOSTS_SHOWN = 12;
const CARDS = 12; // environments; more of them are a table
const HEAT = 30; // hosts; more of them are a grid
const allHosts = signal(false);

function Figure() {
  const only = query.value.only;
  const { total, ...counts } = tally.value;
  const rest = total - counts.ok;
  return html`<section class="figure" aria-label="Convergence">
    <h1 tabindex="-1" id="top">
      <span class="count"><b>${counts.ok}</b><span class="of"><span class="unseen"> of </span><span aria-hidden="true">/</span>${total}</span></span>
      <span class="caption">${total === 0 ? "nothing has been asked for" : `${total === 1 ? "machine" : "machines"} as desired`}</span>
    </h1>
    <${Bar} parts=${Object.entries(counts)} total=${total} />
    <div class="legend" role="group" aria-label="Show only">
      ${Object.entries(VERDICTS).map(
        ([verdict, { icon, word }]) =>
          (counts[verdict] > 0 || only === verdict) &&
          html`<button type="button" key=${verdict} class="chip tone-${verdict}" aria-pressed=${only === verdict} onClick=${() => ask({ only: only === verdict ? "" : verdict })}>
            <${Icon} name=${icon} /><b>${counts[verdict]}</b> ${word.toLowerCase()}
          </button>`,
      )}
    </div>
    ${total > 0 && rest === 0 && html`<p class="muted">Everything that was asked for is there, and nothing else.</p>`}
  </section>`;
}

function Facts() {
  const online = hosts.all.value.filter((host) => host.state === "online");
  const sum = (field) => online.reduce((total, host) => total + host.resource[field], 0);
  const rows = [
    ["vCPU", sum("cpu_used"), sum("cpu_total"), `${sum("cpu_used")} of ${sum("cpu_total")}`],
    ["Memory", sum("mem_used"), sum("mem_total"), share(sum("mem_used"), sum("mem_total"))],
    ["Disk", sum("disk_used"), sum("disk_total"), share(sum("disk_used"), sum("disk_total"))],
  ];
  const away = hosts.ids.value.length - online.length;
  return html`<section class="facts" aria-label="Fleet">
    <dl>
      <div><dt><a href="#/hosts">Hosts online</a></dt><dd><b>${online.length}</b> of ${hosts.ids.value.length}${away > 0 && html`<span class="sign tone-trouble"><${Icon} name="offline" />${away} offline</span>`}</dd></div>
      <div><dt><a href="#/envs">Environments</a></dt><dd><b>${envs.ids.value.length}</b></dd></div>
      ${rows.map(([name, used, total, text]) => html`<div key=${name}><dt>${name}</dt><dd><span>${text}</span><${Bar} parts=${[[used > total ? "trouble" : "used", used]]} total=${total} /></dd></div>`)}
    </dl>
  </section>`;
}

function Hosts() {
  const sorted = [...hosts.all.value].sort((a, b) => (a.state === "offline" ? 0 : 1) - (b.state === "offline" ? 0 : 1) || byName(a.id, b.id));
  const some = allHosts.value ? sorted : sorted.slice(0, HOSTS_SHOWN);
  return html`<section id="/hosts" aria-labelledby="hosts">
    <header class="section"><h2 id="hosts">Hosts</h2></header>
    ${!sorted.length && html`<p class="empty">No host yet. Register one: <code>muster host add ADDRESS:9100</code></p>`}
    ${sorted.length > HEAT && html`<${HeatGrid} hosts=${sorted} />`}
    ${sorted.length <= HEAT && html`<ul class="hosts">${some.map((host) => html`<${HostCard} key=${host.id} id=${host.id} />`)}</ul>`}
    ${sorted.length <= HEAT && sorted.length > some.length && html`<button type="button" class="more" onClick=${() => (allHosts.value = true)}>Show all ${sorted.length} hosts</button>`}
  </section>`;
}

function Envs() {
  const few = groups.value.size <= CARDS;
  return html`<section id="/envs" aria-labelledby="envs">
    <header class="section">
      <h2 id="envs">Environments</h2>
      <a class="button" href="#/new">New environment</a>
      <${EnvSearch} />
    </header>
    ${!groups.value.size && html`<p class="empty">No environment yet. Submit one: <code>muster apply -f hello.yaml</code></p>`}
    ${few ? found.value.map(([name, ids]) => html`<${EnvCard} key=${name} name=${name} ids=${ids} filtered=${isFiltered.value} />`) : html`<${EnvTable} />`}
  </section>`;
}

/** The page `#/`. */
export function FleetPage() {
  return html`<div class="overview"><${Figure} /><${Facts} /></div><${Timeline} /><${Envs} /><${Hosts} />`;
}
