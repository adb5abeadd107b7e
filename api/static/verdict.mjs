// What a person wants to know of an object: is it as desired, and in which words and with which sign is that said.
// Pure; the phases are the controller's (specs/wire.py).

/** One of `ok busy waiting trouble leaving`. A machine that ended as its restart policy allows has phase `stopped`: fine. */
export function verdictOf(vm) {
  if (vm.desired === "absent" || vm.phase === "terminating") return "leaving";
  if (vm.phase === "stopped" || (vm.phase === "ready" && vm.desired === "running")) return "ok";
  if (vm.phase === "degraded" || vm.state === "failed") return "trouble";
  return vm.phase === "pending" ? "waiting" : "busy";
}

export const VERDICTS = {
  ok: { icon: "check", word: "As desired" },
  busy: { icon: "turning", word: "In progress" },
  waiting: { icon: "clock", word: "Waiting" },
  trouble: { icon: "warning", word: "Needs attention" },
  leaving: { icon: "leaving", word: "Going away" },
};

export const PHASES = {
  pending: { icon: "clock", word: "Waiting", tone: "waiting" },
  progressing: { icon: "turning", word: "In progress", tone: "busy" },
  ready: { icon: "check", word: "Ready", tone: "ok" },
  degraded: { icon: "warning", word: "Needs attention", tone: "trouble" },
  stopped: { icon: "stopped", word: "Stopped", tone: "off" },
  terminating: { icon: "leaving", word: "Going away", tone: "leaving" },
};

export const STATES = {
  running: { icon: "running", word: "Running" },
  stopped: { icon: "stopped", word: "Stopped" },
  paused: { icon: "paused", word: "Paused" },
  creating: { icon: "creating", word: "Creating" },
  failed: { icon: "failed", word: "Failed" },
  absent: { icon: "leaving", word: "Gone" },
};

export const HOST_STATES = {
  online: { icon: "online", word: "Online", tone: "ok" },
  offline: { icon: "offline", word: "Offline", tone: "trouble" },
};

/** Looks a word up; a newer controller may say one this page does not know, which is then shown as it is. */
export const say = (table, word) => (Object.hasOwn(table, word) ? table[word] : { icon: "creating", word: String(word), tone: "off" });
