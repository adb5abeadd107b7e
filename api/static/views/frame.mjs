// What surrounds every page: the name, how fresh the picture is, and the banner when it is not.
import { html } from "../html.mjs";
import { span } from "../format.mjs";
import { heardAt, now, revision, skew, tally } from "../store.mjs";
import { hasKey, link, retryNow, setKey } from "../stream.mjs";
import { landing, route } from "../route.mjs";
import { useLayoutEffect, useRef } from "../vendor/preact-hooks.mjs";
import { EditPage } from "./edit.mjs";
import { EnvPage } from "./env.mjs";
import { EnvsPage } from "./envs.mjs";
import { FleetPage } from "./fleet.mjs";
import { Help, openHelp } from "./help.mjs";
import { HostPage } from "./host.mjs";
import { Icon } from "./icons.mjs";
import { KeyPage } from "./key.mjs";
import { Announcer, Sign } from "./parts.mjs";

const LINKS = {
  connecting: { icon: "turning", word: "Connecting", tone: "busy" },
  live: { icon: "check", word: "Live", tone: "ok" },
  stale: { icon: "offline", word: "Not live", tone: "trouble" },
  locked: { icon: "clock", word: "Key needed", tone: "waiting" },
};

function Stale() {
  const { state, why, retryAt } = link.value;
  if (state !== "stale") return null;
  const here = now.value * 1000 - skew.value; // ticks with `now`, in this machine's own time
  const last = heardAt.value;
  const left = Math.ceil((retryAt - here) / 1000);
  return html`<section class="banner" aria-label="Connection">
    <${Icon} name="warning" />
    <div>
      <p role="alert"><b>${last === null ? "No word from the controller" : "What you see may have changed"}</b> — ${why}.</p>
      <p>
        ${last !== null && html`<time datetime=${new Date(last).toISOString()} title=${new Date(last).toLocaleTimeString()}>Last word ${span((here - last) / 1000)} ago. </time>`}
        <span>${left > 0 ? `Trying again in ${span(left)}.` : "Trying again now."}</span>
      </p>
    </div>
    <button type="button" onClick=${retryNow}>Try now</button>
  </section>`;
}

function Page() {
  if (link.value.state === "locked") return html`<${KeyPage} />`;
  if (heardAt.value === null || (revision.value === null && link.value.state === "connecting"))
    return html`<p class="loading" role="status"><${Icon} name="turning" />Asking the controller for the fleet…</p>`;
  const { page, id } = route.value;
  if (page === "envs") return html`<${EnvsPage} />`;
  if (page === "env") return html`<${EnvPage} key=${id} name=${id} />`;
  if (page === "new" || page === "edit") return html`<${EditPage} key=${`${page} ${id}`} name=${page === "edit" ? id : ""} />`;
  if (page === "host") return html`<${HostPage} key=${id} id=${id} />`;
  return html`<${FleetPage} />`;
}

function Spoken() {
  const { ok, total } = tally.value;
  return html`<div class="unseen" role="status">${link.value.state === "live" ? `${ok} of ${total} machines as desired` : ""}</div>`;
}

/** A reader with a keyboard or screen reader goes on at the new page's heading (or its search), not where the old link was. */
function useArrival() {
  const { page, id } = route.value;
  const first = useRef(true);
  useLayoutEffect(() => {
    if (!first.current) {
      scrollTo(0, 0);
      const at = document.getElementById(landing.id) ?? document.querySelector("main h1");
      at?.focus({ preventScroll: true });
      landing.id = "";
    }
    first.current = false;
  }, [page, id]);
}

export function Frame() {
  useArrival();
  const { state } = link.value;
  return html`<a class="skip" href="#main" onClick=${skip}>Skip to the fleet</a>
    <header class="top">
      <a class="brand" href="#/"><svg viewBox="0 0 26 16" aria-hidden="true" focusable="false"><circle cx="3" cy="3" r="3" /><circle cx="13" cy="3" r="3" /><circle cx="23" cy="3" r="3" /><circle cx="3" cy="13" r="3" /><circle cx="13" cy="13" r="3" /><circle class="late" cx="23" cy="13" r="2.4" /></svg>muster</a>
      <span class="link"><${Sign} ...${LINKS[state]} /></span>
      <button type="button" class="help" aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)" onClick=${openHelp}>?</button>
      ${hasKey.value && html`<button type="button" onClick=${() => setKey("")}>Forget the key</button>`}
    </header>
    <${Stale} />
    <main id="main" class=${state === "stale" ? "stale" : ""}><${Page} /></main>
    <${Announcer} /><${Spoken} /><${Help} />`;
}

/** An address of our own would leave the page that is shown, so the jump is made by hand. */
function skip(event) {
  event.preventDefault();
  document.querySelector("main h1")?.focus();
}
