// One machine (VM or container): what it should be, what it is, why they differ, and how to get in.
import { html } from "../html.mjs";
import { endpoints, moment, plural, reachable, size, sshCommand } from "../format.mjs";
import { hosts, vms } from "../store.mjs";
import { say, STATES, VERDICTS, verdictOf } from "../verdict.mjs";
import { href } from "../route.mjs";
import { Console } from "./console.mjs";
import { Icon } from "./icons.mjs";
import { Lane } from "./lane.mjs";
import { Copy, Countdown, Name, Sign } from "./parts.mjs";

const DESIRED = { running: "Running", stopped: "Stopped", absent: "Gone" };

function DesiredActual({ vm, verdict }) {
  const wanted = say(STATES, vm.desired);
  const actual = say(STATES, vm.state);
  // What a silent host runs is not known: its last report is no proof of the present.
  const silent = hosts.get(vm.host_id)?.state === "offline";
  const wantedWord = Object.hasOwn(DESIRED, vm.desired) ? DESIRED[vm.desired] : wanted.word;
  return html`<div class="cell states">
    <span class="pair"><span class="label">Desired</span><${Sign} icon=${wanted.icon} word=${wantedWord} /></span>
    <${Icon} name="arrow" />
    <span class="pair"><span class="label">Actual</span><${Sign} icon=${actual.icon} word=${actual.word} tone=${verdict} />${silent && html`<span class="muted small">last known</span>`}</span>
  </div>`;
}

function Where({ vm }) {
  return html`<div class="cell where">
    <span class="label">Host</span>
    ${vm.host_id ? html`<a href=${href("host", vm.host_id)}><${Name} text=${vm.host_id} /></a>` : html`<span class="muted">Not placed yet</span>`}
    ${vm.ip && html`<${Name} text=${vm.ip} mono />`}
  </div>`;
}

function Reach({ vm }) {
  const host = hosts.get(vm.host_id);
  const at = host ? reachable(host.addr) : "";
  const command = vm.state === "running" ? sshCommand(at, vm.port_map["22"]) : "";
  const ports = vm.state === "running" ? endpoints(at, vm.port_map) : [];
  return html`<div class="cell reach">
    <span class="label">Reach it</span>
    ${command && html`<span class="endpoint"><code>${command}</code><${Copy} text=${command} what=${`the ssh command of ${vm.name}`} /></span>`}
    ${ports.map(
      ({ guest, endpoint, url }) => html`<span class="endpoint" key=${guest}>
        <span class="muted">port ${guest}</span>
        ${url ? html`<a href=${url} target="_blank" rel="noreferrer noopener"><code>${endpoint}</code><${Icon} name="out" /><span class="unseen"> (opens a new tab)</span></a>` : html`<code>${endpoint}</code>`}
        <${Copy} text=${endpoint} what=${`the address of port ${guest} of ${vm.name}`} />
      </span>`,
    )}
    ${!command && !ports.length && html`<span class="muted">${vm.state === "running" ? "No forwarded port" : "Not running"}</span>`}
  </div>`;
}

function Note({ vm, verdict }) {
  const retry = verdict !== "ok" && vm.next_attempt_at;
  if (!vm.message && !retry && !vm.attempts) return null;
  return html`<div class="note tone-${verdict}">
    ${vm.message && html`<p class="message"><bdi>${vm.message}</bdi></p>`}
    ${(vm.attempts > 0 || retry) &&
    html`<p class="attempts">
      ${vm.attempts > 0 && html`<span>${plural(vm.attempts, "attempt")} so far</span>`}
      ${retry && html`<${Countdown} at=${vm.next_attempt_at} before="next try in " past="trying again now" />`}
    </p>`}
  </div>`;
}

function Details({ vm }) {
  return html`<details class="details">
    <summary>Details</summary>
    <dl>
      <div><dt>Id</dt><dd><${Name} text=${vm.id} mono /> <${Copy} text=${vm.id} what=${`the id of ${vm.name}`} /></dd></div>
      <div><dt>Created</dt><dd>${moment(vm.created_at)}</dd></div>
      <div><dt>Generation</dt><dd>${vm.generation} asked for, ${vm.observed_generation} reached</dd></div>
      ${vm.conditions.map(
        (one) => html`<div key=${one.type}><dt>${one.type}</dt><dd>${one.status ? "Yes" : "No"}, ${one.reason} since ${moment(one.since)}${one.message && html`: <bdi>${one.message}</bdi>`}</dd></div>`,
      )}
    </dl>
  </details>`;
}

/** A row of the list of machines. `full` adds what only the page of its environment shows. */
export function Machine({ id, full, withEnv }) {
  const vm = vms.get(id);
  if (!vm) return null;
  const verdict = verdictOf(vm);
  return html`<li class="machine verdict-${verdict}">
    <div class="cell who">
      <div class="title-line"><h3><${Name} text=${vm.name} /></h3><${Sign} ...${VERDICTS[verdict]} tone=${verdict} /></div>
      <p class="muted">
        ${withEnv && html`<a href=${href("env", vm.env_id)}><${Name} text=${vm.env_id} /></a> · `}${vm.engine} · <${Name} text=${vm.image} />
      </p>
      <p class="muted">${vm.cpu} vCPU · ${size(vm.mem)} · ${size(vm.disk)} disk</p>
    </div>
    <${DesiredActual} vm=${vm} verdict=${verdict} />
    <${Where} vm=${vm} />
    <${Reach} vm=${vm} />
    <${Note} vm=${vm} verdict=${verdict} />
    ${full && html`<${Lane} vm=${vm} />`}
    ${full && vm.host_id && html`<${Console} vm=${vm} />`}
    ${full && html`<${Details} vm=${vm} />`}
  </li>`;
}

/** The list of machines with its headings. */
export function Machines({ ids, label, full, withEnv }) {
  return html`<div class="machines">
    <div class="heads" aria-hidden="true"><span>Machine</span><span>Desired → actual</span><span>Host</span><span>Reach it</span></div>
    <ul aria-label=${label}>${ids.map((id) => html`<${Machine} key=${id} id=${id} full=${full} withEnv=${withEnv} />`)}</ul>
  </div>`;
}
