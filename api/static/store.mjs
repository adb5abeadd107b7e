// The fleet as the controller last told it: one signal an object, so that a change redraws the rows that show it and
// no others. Fed by stream.mjs, read by the views; knows nothing of connections.
import { batch, computed, signal } from "./vendor/signals.mjs";
import { verdictOf } from "./verdict.mjs";

const collator = new Intl.Collator("en", { numeric: true });
export const byName = (a, b) => collator.compare(a, b);

class Collection {
  #cells = new Map();
  ids = signal([]);
  all = computed(() => this.ids.value.map((id) => this.#cells.get(id).value));

  /** The object, or undefined; whoever reads it in a view is redrawn when it changes, comes or goes. */
  get(id) {
    const cell = this.#cells.get(id);
    if (cell) return cell.value;
    this.ids.value; // subscribes to its coming
    return undefined;
  }

  put(id, object) {
    const cell = this.#cells.get(id);
    if (!object) {
      if (!cell) return;
      this.#cells.delete(id);
      this.ids.value = this.ids.value.filter((other) => other !== id);
      cell.value = undefined;
    } else if (cell) {
      cell.value = object;
    } else {
      this.#cells.set(id, signal(object));
      this.ids.value = [...this.ids.value, id];
    }
  }

  replace(objects) {
    const old = this.#cells;
    this.#cells = new Map(objects.map((object) => [object.id, old.get(object.id) ?? signal(object)]));
    this.ids.value = [...this.#cells.keys()];
    for (const object of objects) this.#cells.get(object.id).value = object;
    for (const [id, cell] of old) if (!this.#cells.has(id)) cell.value = undefined;
  }
}

export const hosts = new Collection();
export const envs = new Collection();
export const vms = new Collection();
const byKind = { host: hosts, env: envs, vm: vms };

/** The controller's revision of what is shown; null until a snapshot has come. */
export const revision = signal(null);
/** When the last word of the fleet came (milliseconds, this machine's clock). */
export const heardAt = signal(null);
/** Server clock minus this machine's, in milliseconds. Countdowns are the controller's: a laptop's clock may be off. */
export const skew = signal(0);
/** The controller's time in seconds, moved on once a second by app.mjs. */
export const now = signal(Date.now() / 1000);

export function tick() {
  now.value = (Date.now() + skew.peek()) / 1000;
}

/** Counts of the last hour as the controller took them, oldest first: {at, desired, actual, unconverged}. */
export const samples = signal([]);
/** By host id: when the controller last heard it (seconds, the controller's clock). */
export const heartbeats = signal({});
/** What happened while this page was open, oldest first. */
export const events = signal([]);
const SAMPLES = 720;
const EVENTS = 300;

export function applyHistory({ samples: told }) {
  samples.value = told.slice(-SAMPLES);
}

export function applyPulse({ sample, heartbeats: ages }) {
  samples.value = [...samples.peek().filter(({ at }) => at < sample.at), sample].slice(-SAMPLES);
  const heard = Object.entries(ages).filter(([, age]) => age !== null);
  heartbeats.value = Object.fromEntries(heard.map(([id, age]) => [id, sample.at - age]));
}

export function applySnapshot({ revision: at, hosts: allHosts, envs: allEnvs, vms: allVms }) {
  batch(() => {
    hosts.replace(allHosts);
    envs.replace(allEnvs);
    vms.replace(allVms);
    revision.value = at;
  });
}

/** Applies one change. Returns false when it cannot follow what is shown: then only a new snapshot helps. */
export function applyChange({ revision: at, kind, id, object }) {
  if (revision.peek() === null || at < revision.peek()) return false;
  if (kind === "event") events.value = [...events.peek().filter((one) => one.id !== id), object].slice(-EVENTS);
  else byKind[kind]?.put(id, object);
  revision.value = at;
  return true;
}

/** Forgets everything: without a valid key nothing of the fleet stays on the screen. */
export function clear() {
  batch(() => {
    applySnapshot({ revision: null, hosts: [], envs: [], vms: [] });
    heardAt.value = null;
    samples.value = [];
    heartbeats.value = {};
    events.value = [];
  });
}

/** Every environment's name with the ids of its machines, both in order; machines of an unknown environment included. */
export const groups = computed(() => {
  const found = new Map(envs.ids.value.map((id) => [id, []]));
  for (const vm of vms.all.value) {
    if (!found.has(vm.env_id)) found.set(vm.env_id, []);
    found.get(vm.env_id).push(vm);
  }
  const names = [...found.keys()].sort(byName);
  return new Map(
    names.map((name) => {
      const members = found.get(name).sort((a, b) => byName(a.name, b.name) || byName(a.id, b.id));
      return [name, members.map((vm) => vm.id)];
    }),
  );
});

/** How many machines there are, and how many of each verdict. */
export const tally = computed(() => {
  const count = { total: 0, ok: 0, busy: 0, waiting: 0, trouble: 0, leaving: 0 };
  for (const vm of vms.all.value) {
    count.total += 1;
    count[verdictOf(vm)] += 1;
  }
  return count;
});
