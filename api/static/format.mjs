// Values in people's words: sizes, spans of time, addresses, commands to copy. Pure.

/** MiB as `512 MiB`, `1.5 GiB`, `2 TiB`. */
export function size(mib) {
  const [value, unit] = mib < 1024 ? [mib, "MiB"] : mib < 1048576 ? [mib / 1024, "GiB"] : [mib / 1048576, "TiB"];
  return `${+value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}

/** Used of total in one unit: `1.5 of 8 GiB`. */
export function share(used, total) {
  const whole = size(total);
  const unit = whole.slice(whole.indexOf(" "));
  const divisor = { " MiB": 1, " GiB": 1024, " TiB": 1048576 }[unit];
  const part = used / divisor;
  return `${+part.toFixed(part < 10 ? 1 : 0)} of ${whole}`;
}

/** Seconds with their two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `4 d`. */
export function span(seconds) {
  let left = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [length, unit] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
    const count = Math.floor(left / length);
    left %= length;
    if (count) parts.push(`${count} ${unit}`);
    else if (parts.length) break;
    if (parts.length === 2) break;
  }
  return parts.join(" ") || "0 s";
}

/** A Unix time in the reader's zone and manner. */
export const moment = (seconds) => new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

const pictured = (char) => {
  const code = char.codePointAt(0);
  return code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "\u2421" : `<${code.toString(16).toUpperCase().padStart(4, "0")}>`;
};

/** What a machine wrote, with control characters and those that turn the direction of text shown instead of obeyed. */
export const printable = (text) => text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, pictured);

const isLoopback = (host) => /^(localhost|127\.[\d.]+|::1)$/.test(host);

/**
 * Where a host's forwarded ports are reached, from its agent's `name:port` address; "" when that is not a plain name or
 * address. An agent on the controller's own loopback is reached where this page came from.
 */
export function reachable(addr, page = location.hostname) {
  const match = /^(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9][A-Za-z0-9.-]*)):\d+$/.exec(addr);
  const host = match ? (match[1] ?? match[2]) : "";
  const own = page.replace(/^\[|\]$/g, "");
  return isLoopback(host) && own && !isLoopback(own) ? own : host;
}

/** The command that enters a machine, or "" while there is no way in. Safe to paste: `host` holds no shell character. */
export function sshCommand(host, port) {
  return host && Number.isInteger(port) ? `ssh -p ${port} root@${host}` : "";
}

const WEB = { 80: "http", 443: "https", 3000: "http", 5000: "http", 8000: "http", 8080: "http", 8443: "https", 8888: "http" };

/** Forwarded ports but ssh's, by guest port: {guest, endpoint: "host:port", url or ""}. */
export function endpoints(host, portMap) {
  const literal = host.includes(":") ? `[${host}]` : host;
  return Object.entries(portMap)
    .filter(([guest, port]) => guest !== "22" && Number.isInteger(port))
    .map(([guest, port]) => {
      const endpoint = literal ? `${literal}:${port}` : String(port);
      const scheme = Object.hasOwn(WEB, guest) ? WEB[guest] : "";
      return { guest: Number(guest), endpoint, url: literal && scheme ? `${scheme}://${endpoint}/` : "" };
    })
    .sort((a, b) => a.guest - b.guest);
}
