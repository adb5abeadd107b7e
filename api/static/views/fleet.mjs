// The first page: how far the fleet is from what was asked for, then hosts and environments.
import { html } from "../html.mjs";
import { plural, share } from "../format.mjs";
import { byName, envs, groups, hosts, tally, vms } from "../store.mjs";
import { VERDICTS, verdictOf } from "../verdict.mjs";
import { computed, signal } from "../vendor/signals.mjs";
import { EnvCard } from "./env.mjs";
import { HostCard } from "./host.mjs";
import { Icon } from "./icons.mjs";
import { Bar } from "./parts.mjs";
import { Timeline } from "./timeline.mjs";

const HOSTS_SHOWN = 12;
const ENVS_SHOWN = 50;
const words = signal("");
const only = signal(""); // a verdict, or "" for all
const allHosts = signal(false);
const allEnvs = signal(false);

/** The environments to show, each with the ids of its machines that match; an environment without any is left out. */
const shown = computed(() => {
  const wanted = words.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  if (!wanted.length && !only.value) return [...groups.value];
  const fits = (text) => wanted.every((word) => text.includes(word));
  const found = [];
  for (const [name, ids] of groups.value) {
    const owner = envs.get(name)?.owner ?? "";
    const left = ids.filter((id) => {
      const vm = vms.get(id);
      const text = [name, owner, vm.name, vm.id, vm.host_id, vm.image, vm.engine, vm.ip, vm.state].join("\n").toLowerCase();
      return (!only.value || verdictOf(vm) === only.value) && fits(text);
    });
    if (left.length || (!only.value && !ids.length && fits(`${name}\n${owner}`.toLowerCase()))) found.push([name, left]);
  }
  return found;
});

function Figure() {
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
          (counts[verdict] > 0 || only.value === verdict) &&
          html`<button type="button" key=${verdict} class="chip tone-${verdict}" aria-pressed=${only.value === verdict} onClick=${() => (only.value = only.value === verdict ? "" : verdict)}>
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
    <ul class="hosts">${some.map((host) => html`<${HostCard} key=${host.id} id=${host.id} />`)}</ul>
    ${sorted.length > some.length && html`<button type="button" class="more" onClick=${() => (allHosts.value = true)}>Show all ${sorted.length} hosts</button>`}
  </section>`;
}

function Envs() {
  const filtered = words.value.trim() !== "" || only.value !== "";
  const entries = shown.value;
  const some = allEnvs.value ? entries : entries.slice(0, ENVS_SHOWN);
  const reset = () => {
    words.value = "";
    only.value = "";
  };
  return html`<section id="/envs" aria-labelledby="envs">
    <header class="section">
      <h2 id="envs">Environments</h2>
      <a class="button" href="#/new">New environment</a>
      <div class="filter">
        <label for="filter">Filter</label>
        <input id="filter" type="search" autocomplete="off" spellcheck="false" placeholder="name, owner, host, image, address" value=${words.value} onInput=${(event) => (words.value = event.target.value)} />
        ${filtered && html`<button type="button" onClick=${reset}>Show all</button>`}
      </div>
    </header>
    ${filtered && html`<p class="muted" role="status">${plural(entries.reduce((sum, [, ids]) => sum + ids.length, 0), "machine")}${only.value && ` ${VERDICTS[only.value].word.toLowerCase()}`} in ${plural(entries.length, "environment")}</p>`}
    ${!groups.value.size && html`<p class="empty">No environment yet. Submit one: <code>muster apply -f hello.yaml</code></p>`}
    ${some.map(([name, ids]) => html`<${EnvCard} key=${name} name=${name} ids=${ids} filtered=${filtered} />`)}
    ${entries.length > some.length && html`<button type="button" class="more" onClick=${() => (allEnvs.value = true)}>Show all ${entries.length} environments</button>`}
  </section>`;
}

/** The page `#/`. */
export function FleetPage() {
  return html`<div class="overview"><${Figure} /><${Facts} /></div><${Timeline} /><${Envs} /><${Hosts} />`;
}
