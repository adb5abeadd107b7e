// Which page is shown, from the address after `#`: `#/`, `#/env/NAME`, `#/host/ID`, `#/edit/NAME`, `#/new`. Links can be sent to others.
import { signal } from "./vendor/signals.mjs";

const PAGES = ["env", "host", "new", "edit"];

function read() {
  const [, page = "", ...rest] = location.hash.split("/");
  if (!PAGES.includes(page)) return { page: "fleet", id: "" };
  try {
    return { page, id: decodeURIComponent(rest.join("/")) };
  } catch {
    return { page, id: rest.join("/") }; // a broken % sequence: then it is looked for, and not found, as written
  }
}

export const route = signal(read());

export const href = (page, id) => `#/${page}/${encodeURIComponent(id)}`;

addEventListener("hashchange", () => {
  const next = read();
  if (next.page !== route.peek().page || next.id !== route.peek().id) route.value = next;
});
