// The last lines of a machine's console: asked for only while it is open, so a page full of machines asks nothing.
import { html } from "../html.mjs";
import { printable } from "../format.mjs";
import { call } from "../stream.mjs";
import { useEffect, useRef } from "../vendor/preact-hooks.mjs";
import { useSignal } from "../vendor/signals.mjs";

const EVERY = 2000; // ms from an answer to the next question
const LINES = 200;

export function Console({ vm }) {
  const open = useSignal(false);
  const said = useSignal(null);
  const failed = useSignal("");
  const box = useRef(null);
  const follows = useRef(true);
  useEffect(() => {
    if (!open.value) return undefined;
    let current = true;
    let timer;
    const read = async () => {
      if (document.visibilityState === "visible") {
        try {
          const found = await call("GET", `vms/${encodeURIComponent(vm.id)}/console?tail=${LINES}`);
          if (!current) return;
          said.value = printable(found.text);
          failed.value = "";
        } catch (error) {
          if (!current) return;
          failed.value = error.message;
        }
      }
      timer = setTimeout(read, EVERY);
    };
    read();
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [open.value, vm.id]);
  useEffect(() => {
    if (box.current && follows.current) box.current.scrollTop = box.current.scrollHeight;
  }, [said.value]);
  const scrolled = ({ target }) => (follows.current = target.scrollHeight - target.scrollTop - target.clientHeight < 30);
  return html`<details class="details console" onToggle=${(event) => (open.value = event.target.open)}>
    <summary>Console</summary>
    ${open.value && failed.value && html`<p class="message"><bdi>${failed.value}</bdi>${said.value !== null && " What follows is what it said before."}</p>`}
    ${open.value && said.value !== null && html`<pre ref=${box} class="yaml" dir="ltr" tabindex="0" aria-label=${`Console of ${vm.name}`} onScroll=${scrolled}>${said.value || "Nothing said yet."}</pre>`}
  </details>`;
}
