// What can be done to an environment or a host. Each asks the controller; its consequence is then seen like any change.
import { html } from "../html.mjs";
import { call } from "../stream.mjs";
import { href } from "../route.mjs";
import { useRef } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";
import { Icon } from "./icons.mjs";
import { Name } from "./parts.mjs";

const LIFETIMES = { 3600: "1 hour", 21600: "6 hours", 86400: "1 day", 604800: "7 days", never: "never ending" };

function useDoing() {
  const busy = useSignal("");
  const said = useSignal(null);
  const run = async (word, ...request) => {
    busy.value = word;
    said.value = null;
    try {
      await call(...request);
      said.value = { good: true, text: `${word}: recorded. What follows shows above.` };
      return true;
    } catch (error) {
      said.value = { good: false, text: error.message };
      return false;
    } finally {
      busy.value = "";
    }
  };
  const outcome = html`<p class="outcome ${said.value && !said.value.good ? "tone-trouble" : "muted"}" role="status">${said.value && html`<${Icon} name=${said.value.good ? "check" : "warning"} /><bdi>${said.value.text}</bdi>`}</p>`;
  return { busy: busy.value, run, outcome };
}

function DeleteDialog({ env, dialog, run }) {
  const typed = useSignal("");
  const submit = async (event) => {
    event.preventDefault();
    if (typed.value !== env.id) return;
    dialog.current.close();
    await run("Delete", "DELETE", `envs/${encodeURIComponent(env.id)}`);
  };
  return html`<dialog ref=${dialog} aria-labelledby="delete-title" onClose=${() => (typed.value = "")}>
    <form onSubmit=${submit}>
      <h2 id="delete-title">Delete <${Name} text=${env.id} />?</h2>
      <p>All its machines and their disks are destroyed. This cannot be undone.</p>
      <label for="delete-name">Type the name of the environment</label>
      <input id="delete-name" autocomplete="off" spellcheck="false" value=${typed.value} onInput=${(event) => (typed.value = event.target.value)} />
      <p class="actions"><button type="button" onClick=${() => dialog.current.close()}>Keep it</button><button type="submit" class="danger" disabled=${typed.value !== env.id}>Delete it</button></p>
    </form>
  </dialog>`;
}

/** Stop, start, edit, extend, delete. */
export function EnvActions({ env }) {
  const { busy, run, outcome } = useDoing();
  const dialog = useRef(null);
  const lifetime = useRef(null);
  const path = `envs/${encodeURIComponent(env.id)}`;
  const going = env.phase === "terminating";
  const off = busy !== "" || going;
  const extend = () => {
    const value = lifetime.current.value;
    run("Extend", "POST", `${path}/extend`, { lifetime: value === "never" ? value : Number(value) });
  };
  return html`<section class="doing card panel" aria-label="Actions">
    <div class="actions">
      ${env.state === "active"
        ? html`<button type="button" disabled=${off} onClick=${() => run("Stop", "POST", `${path}/stop`)}>Stop</button>`
        : html`<button type="button" disabled=${off} onClick=${() => run("Start", "POST", `${path}/start`)}>Start</button>`}
      ${!going && html`<a class="button" href=${href("edit", env.id)}>Edit</a>`}
      <span class="pairing"><label class="unseen" for="lifetime">Lifetime from now</label><select id="lifetime" ref=${lifetime} disabled=${off}>${Object.entries(LIFETIMES).map(([value, word]) => html`<option key=${value} value=${value}>${word}</option>`)}</select><button type="button" disabled=${off} onClick=${extend}>Extend</button></span>
      <button type="button" class="danger" disabled=${off} onClick=${() => dialog.current.showModal()}>Delete…</button>
    </div>
    ${outcome}
    <${DeleteDialog} env=${env} dialog=${dialog} run=${run} />
  </section>`;
}

/** Cordon, uncordon, drain. */
export function HostActions({ host }) {
  const { busy, run, outcome } = useDoing();
  const ask = (word, verb) => () => run(word, "POST", `hosts/${encodeURIComponent(host.id)}/${verb}`);
  return html`<section class="doing card panel" aria-label="Actions">
    <div class="actions">
      ${host.cordoned
        ? html`<button type="button" disabled=${busy !== ""} onClick=${ask("Uncordon", "uncordon")}>${host.drain ? "Uncordon, end the drain" : "Uncordon"}</button>`
        : html`<button type="button" disabled=${busy !== ""} onClick=${ask("Cordon", "cordon")}>Cordon</button>`}
      ${!host.drain && html`<button type="button" disabled=${busy !== ""} onClick=${ask("Drain", "drain")}>Drain</button>`}
    </div>
    ${outcome}
  </section>`;
}
