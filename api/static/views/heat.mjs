// Many hosts at a glance: a cell each, with its name, its fullest resource as a number, and a sign when something is wrong.
import { html } from "../html.mjs";
import { hosts as known } from "../store.mjs";
import { href } from "../route.mjs";
import { Icon } from "./icons.mjs";
import { Name } from "./parts.mjs";

const LEVELS = ["below 25 %", "25 to 49 %", "50 to 74 %", "75 to 89 %", "90 % and more"];
const FROM = [0, 25, 50, 75, 90];
const KINDS = [["cpu", "vCPU"], ["mem", "memory"], ["disk", "disk"]];

/** The resource that runs out first: [percent, its name]. */
function fullest(resource) {
  const shares = KINDS.map(([kind, word]) => [Math.round((100 * resource[`${kind}_used`]) / Math.max(resource[`${kind}_total`], 1)), word]);
  return shares.reduce((most, one) => (one[0] > most[0] ? one : most));
}

function Cell({ id }) {
  const host = known.get(id);
  if (!host) return null;
  const [percent, word] = fullest(host.resource);
  const offline = host.state !== "online";
  const sign = offline ? ["offline", "Offline"] : host.cordoned ? ["paused", host.drain ? "Draining" : "Cordoned"] : null;
  const level = offline ? "off" : FROM.findLastIndex((from) => percent >= from);
  const said = `${sign ? `${sign[1].toLowerCase()}, ` : ""}${percent} % of ${word}, ${host.resource.vm_count} machines`;
  return html`<li><a class="load-${level}" href=${href("host", id)} title=${`${id}: ${said}`}>
    <${Name} text=${id} />
    <span class="load"><span aria-hidden="true">${offline ? "offline" : `${percent} %`}</span>${sign && html`<${Icon} name=${sign[0]} />`}<span class="unseen">${said}</span></span>
  </a></li>`;
}

/** The grid with its legend. `hosts`: in the order to be shown. */
export function HeatGrid({ hosts }) {
  return html`<p class="heat-legend">
      <span>Fullest of vCPU, memory and disk:</span>
      ${LEVELS.map((word, level) => html`<span key=${word}><i class="load-${level}"></i>${word}</span>`)}
      <span><${Icon} name="paused" />cordoned or draining</span><span><${Icon} name="offline" />offline</span>
    </p>
    <ul class="heat" aria-label="Hosts">${hosts.map((host) => html`<${Cell} key=${host.id} id=${host.id} />`)}</ul>`;
}
