// The table of environments: searched, filtered and sorted as the address says, with as many rows in the document as are
// seen and a few more, however many there are.
import { html } from "../html.mjs";
import { plural } from "../format.mjs";
import { ask, href, query } from "../route.mjs";
import { byEnv, byName, envs, groups, vms } from "../store.mjs";
import { PHASES, say, STATES, VERDICTS, verdictOf } from "../verdict.mjs";
import { useEffect, useRef } from "../vendor/preact-hooks.mjs";
import { computed, signal, useSignal } from "../vendor/signals.mjs";
import { Icon } from "./icons.mjs";
import { Countdown, Name, Sign } from "./parts.mjs";

const AROUND = 8; // rows kept beyond each edge of the window
const STEP = 3; // rows that come and go together
const DOTS = 20; // machines drawn of one environment
const compact = matchMedia("(max-width: 60rem)"); // as in app.css
const height = signal(compact.matches ? 116 : 44); // px of a row, as in app.css
compact.addEventListener("change", () => (height.value = compact.matches ? 116 : 44));

const texts = new WeakMap();
/** What a machine is found by; made once for each state it is told in. */
function textOf(vm) {
  let text = texts.get(vm);
  if (!text) texts.set(vm, (text = [vm.name, vm.id, vm.host_id, vm.image, vm.engine, vm.ip, vm.state].join("\n").toLowerCase()));
  return text;
}

export const isFiltered = computed(() => Boolean(query.value.q?.trim() || query.value.only));

/** The environments that fit, [name, ids of its machines that fit] each, in order of their names. */
export const found = computed(() => {
  const { q = "", only = "" } = query.value;
  const wanted = q.trim().toLowerCase().split(/\s+/).filter(Boolean);
  if (!wanted.length && !only) return [...groups.value];
  const left = [];
  for (const [name, ids] of groups.value) {
    const whole = `${name}\n${envs.get(name)?.owner ?? ""}`.toLowerCase();
    // Counting first: most environments have no machine of a wanted verdict, and their machines need not be looked at.
    if (only && !byEnv.counts(name)[only]) continue;
    const missing = wanted.filter((word) => !whole.includes(word));
    const fits = ids.filter((id) => {
      const vm = vms.get(id);
      return vm && (!only || verdictOf(vm) === only) && missing.every((word) => textOf(vm).includes(word));
    });
    if (fits.length || (!only && !ids.length && !missing.length)) left.push([name, fits]);
  }
  return left;
});

const ORDER = ["degraded", "pending", "progressing", "terminating", "ready", "stopped"];
const COLUMNS = [
  ["name", "Environment", null],
  ["owner", "Owner", (name) => envs.get(name)?.owner ?? ""],
  ["phase", "Phase", (name) => ORDER.indexOf(envs.get(name)?.phase)],
  ["machines", "Machines, desired → actual", (name) => byEnv.counts(name).ok - byEnv.counts(name).total],
  ["left", "Time left", (name) => envs.get(name)?.expires_at || Infinity],
  ["generation", "Generation", (name) => -(envs.get(name)?.generation ?? 0)],
];

const rows = computed(() => {
  const sort = query.value.sort || "name";
  const [, , key] = COLUMNS.find(([column]) => column === sort.replace("-", "")) ?? COLUMNS[0];
  let all = found.value;
  if (key) {
    const keyed = all.map((row) => [key(row[0]), row]);
    keyed.sort(([a], [b]) => (typeof a === "string" ? byName(a, b) : a < b ? -1 : a > b ? 1 : 0)); // stable: names decide
    all = keyed.map(([, row]) => row);
  }
  return sort.startsWith("-") ? [...all].reverse() : all;
});

const EDGES = { running: () => html`<circle class="dot-edge" cx="7" cy="7" r="5.6" />`, stopped: () => html`<rect class="dot-edge" x="1.5" y="1.5" width="11" height="11" rx="1.5" />` };
const MARKS = {
  running: () => html`<circle class="dot-full" cx="7" cy="7" r="3.6" />`,
  stopped: () => html`<rect class="dot-full" x="4.3" y="4.3" width="5.4" height="5.4" />`,
  paused: () => html`<path class="dot-full" d="M4.5 4h2v6h-2zM7.5 4h2v6h-2z" />`,
  creating: () => html`<path class="dot-full" d="M7 3.4a3.6 3.6 0 0 0 0 7.2z" />`,
  failed: () => html`<path class="dot-cross" d="M4.6 4.6l4.8 4.8M9.4 4.6l-4.8 4.8" />`,
};
const none = () => null;

/** Each machine as a dot: its edge is what is desired, its inside what is there; a cross where attention is needed. */
function Dots({ name }) {
  const ids = byEnv.ids(name);
  const counts = byEnv.counts(name);
  const drawn = ids.slice(0, DOTS);
  const told = Object.entries(VERDICTS).filter(([verdict]) => counts[verdict]).map(([verdict, { word }]) => `${counts[verdict]} ${word.toLowerCase()}`);
  return html`<svg width=${drawn.length * 16} height="14" viewBox="0 0 ${drawn.length * 16} 14" preserveAspectRatio="xMinYMid slice" role="img" aria-label=${told.join(", ") || "no machine"}>
      ${drawn.map((id, at) => {
        const vm = vms.get(id);
        if (!vm) return null;
        const verdict = verdictOf(vm);
        const edge = Object.hasOwn(EDGES, vm.desired) ? EDGES[vm.desired] : none;
        const mark = verdict === "trouble" ? MARKS.failed : Object.hasOwn(MARKS, vm.state) ? MARKS[vm.state] : none;
        return html`<g key=${id} class="tone-${verdict}" transform="translate(${at * 16} 0)"><title>${`${vm.name}: ${vm.desired} → ${say(STATES, vm.state).word.toLowerCase()} (${VERDICTS[verdict].word.toLowerCase()})`}</title>${edge()}${mark()}</g>`;
      })}
    </svg><span class="count">${counts.ok}/${counts.total}</span>`;
}

function Row({ name, index, top }) {
  const env = envs.get(name);
  const deploying = env && env.observed_generation < env.generation;
  return html`<div role="row" aria-rowindex=${index + 2} style=${{ top: `${top}px` }}>
    <div role="cell"><a href=${href("env", name)}><${Name} text=${name} /></a></div>
    <div role="cell" class="owner"><${Name} text=${env?.owner ?? "—"} /></div>
    <div role="cell">${env && html`<${Sign} ...${say(PHASES, env.phase)} />`}</div>
    <div role="cell" class="dots"><${Dots} name=${name} /></div>
    <div role="cell" class="left">${env?.expires_at ? html`<${Countdown} at=${env.expires_at} before="" past="ending now" />` : "no end"}</div>
    <div role="cell" class="generation">${env && (deploying ? html`${env.observed_generation} → ${env.generation}<${Sign} icon="turning" word="Deploying" tone="busy" />` : env.generation)}</div>
  </div>`;
}

function Heads() {
  const sort = query.value.sort || "name";
  return html`<div role="row" aria-rowindex="1" class="columns">${COLUMNS.map(([column, word]) => {
    const here = sort.replace("-", "") === column;
    const down = here && sort.startsWith("-");
    return html`<div role="columnheader" key=${column} aria-sort=${here ? (down ? "descending" : "ascending") : undefined}>
      <button type="button" onClick=${() => ask({ sort: here && !down ? `-${column}` : column === "name" ? "" : column })}>${word}${here && html`<span aria-hidden="true">${down ? "▼" : "▲"}</span>`}</button>
    </div>`;
  })}</div>`;
}

/** The rows within the window, which is the page's own; others are room without elements. */
export function EnvTable() {
  const box = useRef(null);
  const first = useSignal(0);
  const count = useSignal(Math.ceil(innerHeight / height.peek()));
  const all = rows.value;
  const tall = height.value;
  useEffect(() => {
    const look = () => {
      const above = -box.current.getBoundingClientRect().top;
      // In steps: a row's worth of scrolling must not draw the table anew each time.
      first.value = Math.max(0, Math.floor(above / height.peek() / STEP) * STEP);
      count.value = Math.ceil(innerHeight / height.peek());
    };
    look();
    addEventListener("scroll", look, { passive: true });
    addEventListener("resize", look);
    return () => {
      removeEventListener("scroll", look);
      removeEventListener("resize", look);
    };
  }, [tall]);
  const from = Math.max(0, Math.min(first.value, all.length - count.value) - AROUND);
  const shown = all.slice(from, from + count.value + 3 * AROUND);
  return html`<div class="card table" role="table" aria-label="Environments" aria-rowcount=${all.length + 1}>
    <div role="rowgroup"><${Heads} /></div>
    <div role="rowgroup" class="rows" ref=${box} style=${{ height: `${all.length * tall}px` }}>
      ${shown.map(([name], at) => html`<${Row} key=${name} name=${name} index=${from + at} top=${(from + at) * tall} />`)}
    </div>
  </div>`;
}

/** The search field, and what it left. */
export function EnvSearch() {
  const { q = "", only = "" } = query.value;
  const left = found.value;
  const said = isFiltered.value && `${plural(left.reduce((sum, [, ids]) => sum + ids.length, 0), "machine")}${Object.hasOwn(VERDICTS, only) ? ` ${VERDICTS[only].word.toLowerCase()}` : ""} in ${plural(left.length, "environment")}`;
  return html`<div class="filter">
      <label for="filter">Filter</label>
      <input id="filter" type="search" autocomplete="off" spellcheck="false" placeholder="name, owner, host, image, address" value=${q} onInput=${(event) => ask({ q: event.target.value })} />
      ${isFiltered.value && html`<button type="button" onClick=${() => ask({ q: "", only: "" })}>Show all</button>`}
    </div>
    ${said && html`<p class="muted" role="status">${said}</p>`}`;
}

/** The page `#/envs`. */
export function EnvsPage() {
  const only = query.value.only;
  return html`<nav class="back"><a href="#/"><${Icon} name="back" />Fleet</a></nav>
    <section aria-label="Environments"><header class="section">
      <h1 tabindex="-1" class="title">Environments</h1>
      <a class="button" href="#/new">New environment</a>
      <${EnvSearch} />
    </header>
    <div class="legend" role="group" aria-label="Show only">${Object.entries(VERDICTS).map(
      ([verdict, { icon, word }]) => html`<button type="button" key=${verdict} class="chip tone-${verdict}" aria-pressed=${only === verdict} onClick=${() => ask({ only: only === verdict ? "" : verdict })}><${Icon} name=${icon} />${word}</button>`,
    )}</div>
    <${EnvTable} /></section>`;
}
