// Small parts that several views share.
import { html } from "../html.mjs";
import { moment, span } from "../format.mjs";
import { now } from "../store.mjs";
import { signal, useSignal } from "../vendor/signals.mjs";
import { useEffect } from "../vendor/preact-hooks.mjs";
import { Icon } from "./icons.mjs";

/** Text that others chose: isolated, so that a right-to-left name cannot reorder what stands beside it. */
export const Name = ({ text, mono }) => html`<bdi class=${mono ? "name mono" : "name"}>${text}</bdi>`;

/** A sign and its word in a tone: ok, busy, waiting, trouble, leaving or off. */
export function Sign({ icon, word, tone = "off" }) {
  // The key makes a new element of each new word: that is what lets the style sheet show that something just changed.
  return html`<span key=${word} class="sign tone-${tone}"><${Icon} name=${icon} /><span>${word}</span></span>`;
}

/** Time left until a Unix time, counted down; `past` is said once it is over. */
export function Countdown({ at, before, past }) {
  const left = at - now.value;
  return html`<time datetime=${new Date(at * 1000).toISOString()} title=${moment(at)}>${left < 0.5 ? past : `${before}${span(left)}`}</time>`;
}

const spoken = signal("");

/** What was just done, for screen readers; once on the page. */
export const Announcer = () => html`<div class="unseen" role="status" aria-live="polite">${spoken.value}</div>`;

/** The clipboard API exists on HTTPS and loopback pages alone; the older command works on every page. */
async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // No permission: the older way is left.
    }
  }
  const focused = document.activeElement;
  const box = document.createElement("textarea");
  box.className = "unseen";
  box.value = text;
  document.body.append(box);
  box.select();
  try {
    return document.execCommand("copy");
  } finally {
    box.remove();
    focused?.focus();
  }
}

/** A button that copies `text`; `what` names it to those who cannot see what stands beside it. */
export function Copy({ text, what }) {
  const done = useSignal("");
  useEffect(() => {
    if (!done.value) return undefined;
    const timer = setTimeout(() => (done.value = ""), 2000);
    return () => clearTimeout(timer);
  }, [done.value]);
  const copy = async () => {
    done.value = (await copyText(text)) ? "Copied" : "Select it to copy";
    spoken.value = `${done.value}: ${what}`;
  };
  return html`<button type="button" class="copy" onClick=${copy} aria-label=${`Copy ${what}`} title=${`Copy ${what}`}>
    <${Icon} name=${done.value === "Copied" ? "check" : "copy"} />${done.value && html`<span>${done.value}</span>`}
  </button>`;
}

/** Use of a total as a bar; the words beside it say the same. Drawn with attributes: the page may set no inline style. */
export function Bar({ parts, total }) {
  let x = 0;
  const scale = 100 / Math.max(total, 1);
  const drawn = parts.filter(([, count]) => count > 0).map(([tone, count]) => {
    const width = Math.min(count * scale, 100 - x);
    const rect = html`<rect key=${tone} class="fill-${tone}" x=${x} width=${width} y="0" height="4" />`;
    x += width;
    return rect;
  });
  return html`<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true" focusable="false">${drawn}</svg>`;
}
