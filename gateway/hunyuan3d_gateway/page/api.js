// Calls of the gateway: every failure becomes a Problem with words for people.

export class Problem extends Error {
  constructor(text, hint = "", code = "", status = 0) {
    super(text);
    this.hint = hint;
    this.code = code;
    this.status = status;
  }
}

let key = sessionStorage.getItem("key") || "";

export function useKey(value) {
  key = value.trim();
  sessionStorage.setItem("key", key);
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The gateway does not answer.", "Check your connection; this page tries again by itself.", "offline");
  }
  if (answer.ok) return answer;
  let told = {};
  try {
    told = (await answer.json()).error || {};
  } catch { /* an answer of something between this page and the gateway */ }
  throw new Problem(told.message || `The gateway answered with status ${answer.status}.`, told.hint || "Try again.", told.code, answer.status);
}

export const about = async () => (await call("/v1/about")).json();
export const job = async (id) => (await call(`/v1/jobs/${id}`)).json();
export const remove = async (id) => (await call(`/v1/meshes/${id}`, { method: "DELETE" })).json();

export async function submit(fields, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) if (value !== "" && value !== null && value !== undefined) form.append(name, value);
  for (const file of files) form.append(files.length > 1 ? "image[]" : "image", file, "picture");
  return (await call("/v1/meshes", { method: "POST", body: form, headers: { "Idempotency-Key": crypto.randomUUID?.() || String(Math.random()) } })).json();
}

export async function content(id, format) {
  return (await call(`/v1/meshes/${id}/content${format ? `?format=${format}` : ""}`)).blob();
}

// The states of a job until its end. EventSource cannot send a key, so the events are read from a plain answer.
export async function* events(id, signal) {
  const answer = await call(`/v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("");
      if (data) yield JSON.parse(data);
    }
  }
}
