// Asks for the API key. It stays in this tab's session storage and is sent as a header, never in an address.
import { html } from "../html.mjs";
import { link, setKey } from "../stream.mjs";
import { useEffect, useRef } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";
import { Icon } from "./icons.mjs";

/** The page while the controller wants a key. */
export function KeyPage() {
  const { refused, checking } = link.value;
  const complaint = useSignal("");
  const field = useRef(null);
  useEffect(() => {
    if (!checking) field.current?.focus();
  }, [checking]);
  const submit = (event) => {
    event.preventDefault();
    const typed = field.current.value.trim();
    // A header can carry nothing else (RFC 9110, 5.5); fetch would refuse it with words nobody understands.
    complaint.value = !typed ? "Type the key." : /^[\x21-\x7e]+$/.test(typed) ? "" : "A key has no spaces and no letters beyond ASCII.";
    if (!complaint.value) setKey(typed);
    else field.current.focus();
  };
  const said = complaint.value || (refused && !checking ? "The controller refused this key." : "");
  return html`<form class="card key" onSubmit=${submit}>
    <h1 tabindex="-1">This controller asks for its API key</h1>
    <p class="muted" id="key-help">It is kept until this tab is closed and sent to this controller alone. Whoever started the controller knows it.</p>
    <label for="key">API key</label>
    <input id="key" ref=${field} type="password" autocomplete="off" spellcheck="false" aria-describedby="key-help key-error" aria-invalid=${said !== ""} readonly=${checking} />
    <p id="key-error" class="message tone-trouble" role="alert">${said && html`<${Icon} name="warning" />${said}`}</p>
    <button type="submit" class="primary" disabled=${checking}>${checking ? "Asking the controller…" : "Show the fleet"}</button>
  </form>`;
}
