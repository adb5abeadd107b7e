// The fleet as the controller last told it: one signal an object, so that a change redraws the rows that show it and
// no others. Fed by stream.mjs, read by the views; knows nothing of connections.
import { batch, computed, signal } from "./vendor/signals.mjs";
import { verdictOf } from "./verdict.mjs";

const collator = new Intl.Collator("en", { numeric: true });
export const byName = (a, b) => collator.compare(a, b);

class Collection {
  #cells = new Map();
  #changed;
  ids = signal([]);
  all = computed(() => this.ids.value.map((id) => this.#cells.get(id).value));

  /** `changed(old, object)` is told of every difference, undefined standing for "not there". */
  constructor(changed = () => {}) {
    this.#changed = changed;
  }

  /** The object, or undefined; whoever reads it in a view is redrawn when it changes, comes or goes. */
  get(id) {
    const cell = this.#cells.get(id);
    if (cell) return cell.value;
    this.ids.value; // subscribes to its coming
    return undefined;
  }

  /** The object as it is now, without being redrawn for it. */
  peek(id) {
    return this.#cells.get(id)?.peek();
  }

  put(id, object) {
    const cell = this.#cells.get(id);
    if (!object && !cell) return;
    const old = cell?.peek();
    if (!object) {
      this.#cells.delete(id);
      this.ids.value = this.ids.value.filter((other) => other !== id);
      cell.value = undefined;
    } else if (cell) {
      cell.value = object;
    } else {
      this.#cells.set(id, signal(object));
      this.ids.value = [...this.ids.value, id];
    }
    this.#changed(old, object);
  }

  replace(objects) {
    const old = this.#cells;
    this.#cells = new Map(objects.map((object) => [object.id, old.get(object.id) ?? signal(undefined)]));
    this.ids.value = [...this.#cells.keys()];
    const change = (cell, object) => {
      const before = cell.peek();
      cell.value = object;
      this.#changed(before, object);
    };
    for (const [id, cell] of old) if (!this.#cells.has(id)) change(cell, undefined);
    for (const object of objects) change(this.#cells.get(object.id), object);
  }
}

const NONE = Object.freeze({ total: 0, ok: 0, busy: 0, waiting: 0, trouble: 0, leaving: 0 });
/** What was done to keep the indices true, for tests: one change must not cost a walk through the fleet. */
export const work = { counted: 0, sorted: 0 };

/** The machines by one of their fields, in order of environment and name, each group with its counts; kept true by each change alone. */
class Index {
  #groups = new Map();
  #of;
  /** Grows when a group comes or goes, or its members or their order change. */
  structure = signal(0);
  keys = signal([]);

  constructor(of) {
    this.#of = of;
  }

  #group(key) {
    let group = this.#groups.get(key);
    if (!group) this.#groups.set(key, (group = { members: new Set(), sorted: null, ids: signal(0), counts: { ...NONE }, counted: signal(0) }));
    return group;
  }

  changed(old, vm) {
    const [from, to] = [old && this.#of(old), vm && this.#of(vm)];
    if (from !== undefined) this.#count(from, old, -1);
    if (to !== undefined) this.#count(to, vm, 1);
    if (old && vm && from === to && old.name === vm.name && old.env_id === vm.env_id) return;
    if (from !== undefined && from !== to) this.#member(from, (members) => members.delete(old.id));
    if (to !== undefined) this.#member(to, (members) => members.add(vm.id));
  }

  #member(key, change) {
    const group = this.#group(key);
    const had = group.members.size;
    change(group.members);
    if (!had !== !group.members.size) this.keys.value = had ? this.keys.peek().filter((one) => one !== key) : [...this.keys.peek(), key];
    group.sorted = null;
    group.ids.value += 1;
    this.structure.value += 1;
  }

  #count(key, vm, by) {
    work.counted += 1;
    const { counts, counted } = this.#group(key);
    counts.total += by;
    counts[verdictOf(vm)] += by;
    counted.value += 1;
  }

  /** How many machines a group has, and how many of each verdict. */
  counts(key) {
    const { counts, counted } = this.#group(key);
    counted.value;
    return { ...counts };
  }

  /** The ids of a group's machines in order. */
  ids(key) {
    const group = this.#group(key);
    group.ids.value;
    return this.sorted(key);
  }

  /** As `ids`, without subscribing. */
  sorted(key) {
    const group = this.#group(key);
    if (!group.sorted) {
      work.sorted += group.members.size;
      const found = [...group.members].map((id) => vms.peek(id));
      group.sorted = found.sort((a, b) => byName(a.env_id, b.env_id) || byName(a.name, b.name) || byName(a.id, b.id)).map(({ id }) => id);
    }
    return group.sorted;
  }
}

export const byEnv = new Index((vm) => vm.env_id);
export const byHost = new Index((vm) => vm.host_id || undefined);
const everywhere = new Index(() => "");

export const hosts = new Collection();
export const envs = new Collection();
export const vms = new Collection((old, vm) => [byEnv, byHost, everywhere].forEach((index) => index.changed(old, vm)));
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
  else byKind[kind]?.put(id, object ?? undefined);
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

const names = computed(() => {
  const all = new Set([...envs.ids.value, ...byEnv.keys.value]);
  return [...all].sort(byName);
});

/** Every environment's name with the ids of its machines, both in order; machines of an unknown environment included. */
export const groups = computed(() => {
  byEnv.structure.value;
  return new Map(names.value.map((name) => [name, byEnv.sorted(name)]));
});

/** How many machines there are, and how many of each verdict. */
export const tally = computed(() => everywhere.counts(""));
