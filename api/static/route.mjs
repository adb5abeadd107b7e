// Which page is shown, from the address after `#`: `#/`, `#/envs?q=…&only=…&sort=…`, `#/env/NAME`, `#/host/ID`, `#/edit/NAME`, `#/new`. Links can be sent to others.
import { signal } from "./vendor/signals.mjs";

const PAGES = ["env", "envs", "host", "new", "edit"];

const path = () => location.hash.split("?")[0];

function read() {
  const [, page = "", ...rest] = path().split("/");
  if (!PAGES.includes(page)) return { page: "fleet", id: "" };
  try {
    return { page, id: decodeURIComponent(rest.join("/")) };
  } catch {
    return { page, id: rest.join("/") }; // a broken % sequence: then it is looked for, and not found, as written
  }
}

export const route = signal(read());

/** The `id` of the element that the next page begins at; "" is its heading. */
export const landing = { id: "" };

const readQuery = () => Object.fromEntries(new URLSearchParams(location.hash.slice(path().length + 1)));

/** What is asked of the page's list: `q` (words), `only` (a verdict), `sort` (a column, `-` before it turns it round). */
export const query = signal(readQuery());

/** Changes what is asked for, and the address with it; "" takes a word out. */
export function ask(changes) {
  const next = { ...query.peek(), ...changes };
  const said = new URLSearchParams(Object.entries(next).filter(([, value]) => value)).toString();
  try {
    history.replaceState(null, "", `${path() || "#/"}${said && `?${said}`}`);
  } catch {
    // Some browsers refuse more than a hundred new addresses within 30 s: the list is right, its address comes with the next change.
  }
  query.value = next;
}

export const href = (page, id) => `#/${page}/${encodeURIComponent(id)}`;

addEventListener("hashchange", () => {
  const next = read();
  query.value = readQuery();
  if (next.page !== route.peek().page || next.id !== route.peek().id) route.value = next;
});
