// What this browser has made: ids, small pictures and facts in localStorage. The meshes stay in the gateway until they expire.

const NAME = "made", MOST = 24, CURRENT = "current";

export function all() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) || "[]");
    return found.filter((entry) => !entry.until || entry.until > Date.now());
  } catch {
    return [];
  }
}

function keep(entries) {
  for (let most = MOST; most > 0; most = Math.floor(most / 2)) {
    try {
      localStorage.setItem(NAME, JSON.stringify(entries.slice(0, most)));
      return;
    } catch { /* the browser's store is full: keep fewer */ }
  }
}

export function add(entry) {
  keep([entry, ...all().filter((other) => other.id !== entry.id)]);
}

export function update(id, facts) {
  keep(all().map((entry) => (entry.id === id ? { ...entry, ...facts } : entry)));
}

export function forget(id) {
  keep(all().filter((entry) => entry.id !== id));
}

export const current = () => JSON.parse(localStorage.getItem(CURRENT) || "null");
export const setCurrent = (value) => (value ? localStorage.setItem(CURRENT, JSON.stringify(value)) : localStorage.removeItem(CURRENT));
