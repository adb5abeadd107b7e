// The editor of an environment's YAML: the controller tells each mistake with its line, and what applying would do.
import { html } from "../html.mjs";
import { plural } from "../format.mjs";
import { href } from "../route.mjs";
import { call } from "../stream.mjs";
import { useEffect, useRef } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";
import { Icon } from "./icons.mjs";
import { Name, Sign } from "./parts.mjs";

const PAUSE = 400; // ms without typing before the text is checked
const EXAMPLE = `id: my-env
owner: me
lifetime: 6h
ssh_keys:
  - ssh-ed25519 AAAA... paste your public key here
vms:
  - name: web
    image: alpine
    engine: qemu
    cpu: 1
    mem: 512
    disk: 2048
    ports: [80]
`;
const ACTIONS = {
  keep: ["check", "Keep", "off"],
  create: ["creating", "Create", "ok"],
  start: ["running", "Start", "ok"],
  stop: ["stopped", "Stop", "off"],
  replace: ["turning", "Replace, its disk is lost", "waiting"],
  destroy: ["leaving", "Destroy, its disk is lost", "trouble"],
};

function Plan({ lines }) {
  return html`<ul class="plan" aria-label="What applying would do">${lines.map(({ action, name, fields, host, message }) => {
    const [icon, word, tone] = Object.hasOwn(ACTIONS, action) ? ACTIONS[action] : ["creating", action, "off"];
    return html`<li key=${`${action} ${name}`}><${Sign} icon=${icon} word=${word} tone=${tone} /> <b><${Name} text=${name} /></b>${fields?.length > 0 && html` <span class="muted">differs in ${fields.join(", ")}</span>`}${host && html` <span class="muted">on host <${Name} text=${host} /></span>`}${message && html` <span class="message"><bdi>${message}</bdi></span>`}</li>`;
  })}</ul>`;
}

/** The pages `#/new` (name "") and `#/edit/NAME`. */
export function EditPage({ name }) {
  const text = useSignal(name ? null : EXAMPLE);
  const checked = useSignal(null); // the answer for the text as it is now; null while there is none
  const failed = useSignal("");
  const applying = useSignal(false);
  const area = useRef(null);
  const gutter = useRef(null);

  useEffect(() => {
    if (name)
      call("GET", `envs/${encodeURIComponent(name)}/spec`).then(
        (found) => (text.value = found.yaml),
        (error) => (failed.value = error.message),
      );
  }, [name]);

  const now = text.value;
  useEffect(() => {
    if (now === null) return undefined;
    let current = true;
    checked.value = null;
    const timer = setTimeout(async () => {
      try {
        const answer = await call("POST", "validate", now);
        if (!current) return;
        checked.value = answer;
        failed.value = "";
      } catch (error) {
        if (current) failed.value = error.message;
      }
    }, PAUSE);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [now]);

  const go = (line, column) => {
    const start = now.split("\n").slice(0, line - 1).reduce((sum, each) => sum + each.length + 1, 0);
    area.current.focus();
    area.current.setSelectionRange(start + column - 1, start + (now.slice(start).split("\n")[0].length));
  };
  const answer = checked.value;
  const errors = answer?.errors ?? [];
  const renamed = name && answer?.spec && answer.spec.id !== name;
  const ready = answer?.spec && !errors.length && !renamed && !applying.value;
  const apply = async (event) => {
    event.preventDefault();
    if (!ready) return;
    applying.value = true;
    try {
      // What was planned is what is applied: somebody else's change in between is refused.
      await call("PUT", `envs/${encodeURIComponent(answer.spec.id)}`, answer.spec, answer.exists ? { "If-Match": `"${answer.generation}"` } : {});
      location.hash = href("env", answer.spec.id);
    } catch (error) {
      failed.value = error.message;
    } finally {
      applying.value = false;
    }
  };
  const bad = new Set(errors.map(({ line }) => line));
  const count = (now ?? "").split("\n").length;
  return html`<nav class="back"><a href=${name ? href("env", name) : "#/"}><${Icon} name="back" />${name || "Fleet"}</a></nav>
    <h1 tabindex="-1" class="title"><span class="kind">${name ? "Edit environment" : "New environment"}</span>${name ? html`<${Name} text=${name} />` : "Describe it"}</h1>
    <form class="editing" onSubmit=${apply}>
      <div class="card editor">
        <div class="gutter" ref=${gutter} aria-hidden="true">${Array.from({ length: count }, (_, at) => html`<span key=${at} class=${bad.has(at + 1) ? "bad" : ""}>${bad.has(at + 1) ? "▸" : ""}${at + 1}</span>`)}</div>
        <textarea ref=${area} aria-label="The environment as YAML" aria-describedby="checked" aria-invalid=${errors.length > 0} spellcheck="false" autocapitalize="off" wrap="off" rows="22" disabled=${now === null} value=${now ?? ""} onInput=${(event) => (text.value = event.target.value)} onScroll=${(event) => (gutter.current.scrollTop = event.target.scrollTop)}></textarea>
      </div>
      <div class="card panel verdicts" id="checked" aria-live="polite">
        <h2>${errors.length ? plural(errors.length, "mistake") : "Plan"}</h2>
        ${failed.value && html`<p class="message tone-trouble"><${Icon} name="warning" /> <bdi>${failed.value}</bdi></p>`}
        ${!answer && !failed.value && html`<p class="muted">Checking…</p>`}
        <ul class="mistakes">${errors.map((one, at) => html`<li key=${at}><button type="button" onClick=${() => go(one.line, one.column)}>Line ${one.line}</button> <span>${one.field && html`<code>${one.field}</code>: `}<bdi>${one.message}</bdi></span></li>`)}</ul>
        ${renamed && html`<p class="message tone-trouble">The id cannot be changed; begin a new environment instead.</p>`}
        ${answer?.spec && !errors.length && html`<${Plan} lines=${answer.plan} />`}
        <button type="submit" class="primary" disabled=${!ready}>${applying.value ? "Applying…" : "Apply"}</button>
      </div>
    </form>`;
}
