// The desired state of an environment as YAML, beside what its hosts reported last.
import { html } from "../html.mjs";
import { call } from "../stream.mjs";
import { useEffect } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";
import { Icon } from "./icons.mjs";
import { Name } from "./parts.mjs";

const PAUSE = 500; // ms; many changes in a row are read once
const text = (value) => (Array.isArray(value) ? value.join(", ") : String(value ?? "—"));

/** Read anew whenever the environment itself changed. */
export function Observed({ env }) {
  const found = useSignal(null);
  const failed = useSignal("");
  useEffect(() => {
    let current = true;
    const read = () =>
      call("GET", `envs/${encodeURIComponent(env.id)}/spec`).then(
        (spec) => current && (found.value = spec),
        (error) => current && (failed.value = error.message),
      );
    const timer = setTimeout(read, found.peek() ? PAUSE : 0);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [env]);
  if (!found.value) return failed.value ? html`<p class="message">${failed.value}</p>` : null;
  return html`<article class="card panel" aria-labelledby="spec">
    <h2 id="spec">Desired and observed</h2>
    <div class="beside">
      <pre class="yaml" tabindex="0" aria-label="The desired state as YAML">${found.value.yaml}</pre>
      <div class="compared">${found.value.vms.map(({ id, name, desired, observed }) => {
        const fields = Object.keys(desired);
        return html`<table key=${id}>
          <caption><${Name} text=${name} /></caption>
          <thead><tr><th scope="col">Field</th><th scope="col">Desired</th><th scope="col">Observed</th></tr></thead>
          <tbody>${fields.map((field) => {
            const seen = observed ? text(observed[field]) : "not there";
            const differs = seen !== text(desired[field]);
            return html`<tr key=${field} class=${differs ? "differs" : ""}><th scope="row">${field}</th><td><bdi>${text(desired[field])}</bdi></td><td><bdi>${seen}</bdi>${differs && html` <span class="sign tone-trouble"><${Icon} name="warning" />differs</span>`}</td></tr>`;
          })}</tbody>
        </table>`;
      })}</div>
    </div>
  </article>`;
}
