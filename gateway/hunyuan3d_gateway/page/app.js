// The page: a picture or words go in, progress comes back, a mesh is shown. Nothing here talks to another host.

import * as api from "/static/api.js";
import { Cloud } from "/static/cloud.js";
import { dressed } from "/static/glb.js";
import * as history from "/static/history.js";

const $ = (id) => document.getElementById(id);
const VIEWS = ["front", "left", "back", "right"];
const STAGES = ["queued", "encoding", "sampling", "meshing"];
const PROMPTS = ["torus", "two flat tori", "tall cone", "helix", "flat cylinder", "octahedron"];
const PICTURES = ["torus", "cone", "cube", "helix"];
const number = new Intl.NumberFormat();
const dark = matchMedia("(prefers-color-scheme: dark)");

const cloud = new Cloud($("cloud"));
let able = null, files = [], mode = "picture", following = null, shown = null, urls = [];

// --- words for people

function problem(error) {
  $("problem").hidden = !error;
  if (!error) return;
  $("problem-text").textContent = error.message;
  $("problem-hint").textContent = error.hint || "";
  if (error.code === "key_needed") $("key-field").hidden = false;
}

function duration(seconds) {
  if (seconds < 1.5) return "a moment";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}

function told(state) {
  if (state.stage === "queued") return state.step ? `${number.format(state.step)} ${state.step === 1 ? "job is" : "jobs are"} before yours` : "Yours is next";
  if (state.stage === "sampling" && state.total) return `Step ${state.step} of ${state.total}`;
  if (state.stage === "meshing") return state.total ? `Refinement ${state.step} of ${state.total}` : "Finding the surface";
  if (state.stage === "encoding") return "Reading the picture";
  return state.stage ? state.stage[0].toUpperCase() + state.stage.slice(1) : "";
}

// --- what goes in

function choose(tab) {
  mode = tab;
  for (const name of ["picture", "words"]) {
    const chosen = name === tab;
    $(`tab-${name}`).setAttribute("aria-selected", chosen);
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    $(name).hidden = !chosen;
  }
  examples();
  ready();
}

function ready() {
  const input = mode === "picture" ? files.length > 0 : $("prompt").value.trim() !== "";
  $("go").disabled = !input || following !== null || !able || !able.meshes;
}

async function take(given) {
  problem(null);
  const most = Math.max(1, able ? able.views : 1), room = given.length > 1 ? [] : most > 1 && files.length < most ? files : [];
  const pictures = [...room, ...given].slice(0, most);
  for (const file of given) {
    if (able && file.size > able.max_body_bytes) return problem(new api.Problem(`This file is too large: ${Math.ceil(file.size / 2 ** 20)} MB.`, `At most ${Math.floor(able.max_body_bytes / 2 ** 20)} MB are taken. Make the picture smaller.`));
    try {
      (await createImageBitmap(file)).close();
    } catch {
      return problem(new api.Problem("This file is not a picture that can be read.", "Use a PNG, JPEG or WebP picture. If it is one, it may be damaged: save it again."));
    }
  }
  files = pictures;
  choose("picture");
  draw();
}

function draw() {
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = files.map((file) => URL.createObjectURL(file));
  $("views").replaceChildren(...urls.map((url, i) => {
    const figure = document.createElement("figure"), image = new Image();
    image.src = url;
    image.alt = `Your picture${files.length > 1 ? `: ${VIEWS[i]}` : ""}`;
    figure.append(image);
    if (files.length > 1) figure.append(Object.assign(document.createElement("figcaption"), { textContent: VIEWS[i] }));
    return figure;
  }));
  $("drop").classList.toggle("full", files.length > 0);
  $("clear").hidden = files.length === 0;
  ready();
}

function examples() {
  const buttons = mode === "words" ? PROMPTS.map((words) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: words });
    button.onclick = () => { $("prompt").value = words; ready(); $("go").focus(); };
    return button;
  }) : PICTURES.map((name) => {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "thumb", title: name });
    const image = Object.assign(new Image(), { src: `/static/examples/${name}.webp`, alt: `Example: ${name}` });
    button.append(image);
    button.onclick = async () => take([new File([await (await fetch(image.src)).blob()], name, { type: "image/webp" })]);
    return button;
  });
  $("examples").replaceChildren(...buttons);
}

// --- the job

async function make(event) {
  event.preventDefault();
  if ($("go").disabled) return;
  problem(null);
  if ($("key").value) api.useKey($("key").value);
  const fields = { seed: $("seed").value, num_inference_steps: $("steps").value, guidance_scale: $("guidance").value, resolution: $("resolution").value, max_faces: $("faces").value === "0" ? "" : $("faces").value, remove_background: $("background").value };
  const words = mode === "words" ? $("prompt").value.trim() : "";
  try {
    $("go").disabled = true;
    const made = await api.submit({ ...fields, prompt: words }, mode === "picture" ? files : []);
    history.setCurrent({ id: made.id, title: words || "Picture", key: null });
    follow(made.id);
  } catch (error) {
    problem(error);
    ready();
  }
}

async function follow(id) {
  following = new AbortController();
  const { signal } = following;
  show("making");
  $("go").textContent = "Making ...";
  $("progress").hidden = false;
  $("result").hidden = true;
  cloud.idle();
  progress({ stage: "queued", step: 0, total: 0, share: 0, left_s: null });
  if (innerWidth <= 860) $("stage").scrollIntoView({ block: "start" });
  for (let pause = 500; following && !signal.aborted;) {
    try {
      let last = null;
      for await (const state of api.events(id, signal)) {
        last = state;
        pause = 500;
        progress(state);
        if (state.preview) cloud.show(state.preview);
      }
      if (last && !["queued", "running"].includes(last.state)) return await ended(id, last);
    } catch (error) {
      if (signal.aborted) return;
      if (error.code !== "offline" && error.status !== 503 && error.status) return await ended(id, { state: "failed", error: { text: error.message, hint: error.hint } });
      $("told").textContent = "The connection is lost; trying again";
    }
    await new Promise((resolve) => setTimeout(resolve, (pause = Math.min(8000, pause * 1.6))));
  }
}

function progress(state) {
  const at = STAGES.indexOf(state.stage === "running" ? "encoding" : state.stage);
  [...$("stages").children].forEach((item, i) => {
    item.className = i < at ? "past" : i === at ? "now" : item.className === "past" && at < 0 ? "past" : "";
    item.toggleAttribute("aria-current", i === at);
  });
  const share = Math.max(0.015, state.share || 0);
  $("bar").firstElementChild.style.transform = `translateX(${100 * share - 100}%)`;
  $("bar").setAttribute("aria-valuenow", Math.round(100 * share));
  $("told").textContent = told(state);
  $("left").textContent = state.left_s === null || state.left_s === undefined ? "" : `about ${duration(state.left_s)} left`;
  document.title = `${Math.round(100 * share)} % - Picture to 3D`;
}

async function ended(id, state) {
  const current = history.current();
  following = null;
  $("progress").hidden = true;
  $("go").textContent = "Make it 3D";
  document.title = "Picture to 3D";
  history.setCurrent(null);
  ready();
  if (state.state === "completed") {
    history.add({ id, title: current?.title || "Mesh", at: Date.now(), until: able ? Date.now() + 1000 * able.keep_s : 0, result: state.result });
    await open(id, state.result, true);
    return;
  }
  show("empty");
  cloud.idle();
  if (state.error) problem(new api.Problem(state.error.text, state.error.hint));
}

async function cancel() {
  const id = history.current()?.id;
  following?.abort();
  following = null;
  try {
    if (id) await api.remove(id);
  } catch (error) {
    problem(error);
  }
  await ended(id, { state: "deleted" });
}

// --- the result

async function open(id, result, fresh = false) {
  problem(null);
  facts(result);
  downloads(id);
  try {
    const blob = await api.content(id, "glb");
    const buffer = dressed(await blob.arrayBuffer(), { dark: dark.matches, upright: able?.model === "shapes" });
    const ModelViewer = await customElements.whenDefined("model-viewer");
    ModelViewer.minimumRenderScale = 1;  // where drawing is slow, a smaller scale shows a part of the picture, enlarged
    const viewer = $("viewer"), url = URL.createObjectURL(new Blob([buffer], { type: "model/gltf-binary" }));
    viewer.src = url;
    await new Promise((resolve, reject) => {
      viewer.addEventListener("load", resolve, { once: true });
      viewer.addEventListener("error", () => reject(new api.Problem("This browser cannot show the mesh.", "Download it and open it in another program.")), { once: true });
    });
    URL.revokeObjectURL(url);
    show("done");
    await new Promise((resolve) => setTimeout(resolve, 60));  // the viewer learns its size first, and frames the mesh by it
    viewer.cameraOrbit = `35deg 72deg ${viewer.clientWidth < viewer.clientHeight ? "140%" : "auto"}`;
    await viewer.updateComplete;
    viewer.jumpCameraToGoal();
    viewer.toggleAttribute("auto-rotate", !matchMedia("(prefers-reduced-motion: reduce)").matches);
    shown = id;
    if (fresh) setTimeout(() => picture(id), 400);
  } catch (error) {
    if (error.status === 404) history.forget(id);
    problem(error);
    $("result").hidden = Boolean(error.status);
  }
  past();
}

function facts(result) {
  const rows = [["Faces", number.format(result.faces)], ["Vertices", number.format(result.vertices)], ["Closed", result.watertight ? "yes" : "no"], ["Made in", duration(result.seconds)]];
  $("facts").replaceChildren(...rows.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
    return row;
  }));
}

function downloads(id) {
  $("result").hidden = false;
  $("downloads").replaceChildren(...["glb", "obj", "stl", "ply"].map((format) => {
    const link = Object.assign(document.createElement("a"), { href: `/v1/meshes/${id}/content?format=${format}&download=true`, textContent: format.toUpperCase(), download: `mesh-${id.slice(0, 8)}.${format}` });
    link.setAttribute("aria-label", `Download as ${format.toUpperCase()}`);
    link.onclick = async (event) => { // by fetch, because a link sends no key and shows no error
      event.preventDefault();
      try {
        const url = URL.createObjectURL(await api.content(id, format));
        Object.assign(document.createElement("a"), { href: url, download: link.download }).click();
        setTimeout(() => URL.revokeObjectURL(url), 60000);
      } catch (error) {
        problem(error);
      }
    };
    return link;
  }));
}

function show(state) {
  $("stage").dataset.state = state;
  if (state === "done") cloud.stop();
  else {
    $("result").hidden = true;
    shown = null;
    cloud.start();
    past();
  }
}

// A small picture of the mesh for the list.
async function picture(id) {
  if (shown !== id) return;
  const image = new Image();
  image.src = $("viewer").toDataURL("image/png");
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: 160, height: 160 }), side = Math.min(image.width, image.height);
  canvas.getContext("2d").drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, 160, 160);
  history.update(id, { image: canvas.toDataURL("image/webp", 0.8) });
  past();
}

function past() {
  const entries = history.all();
  $("history").hidden = entries.length === 0;
  $("made").replaceChildren(...entries.map((entry) => {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-current", entry.id === shown);
    if (entry.image) button.append(Object.assign(new Image(), { src: entry.image, alt: entry.title }));
    else button.textContent = entry.title;
    button.onclick = () => { if (!following) open(entry.id, entry.result); };
    const gone = Object.assign(document.createElement("button"), { type: "button", className: "drop-it", textContent: "\u00d7", title: "Remove" });
    gone.setAttribute("aria-label", `Remove ${entry.title}`);
    gone.onclick = async () => {
      history.forget(entry.id);
      if (shown === entry.id) { show("empty"); cloud.idle(); }
      past();
      try { await api.remove(entry.id); } catch { /* it has expired */ }
    };
    item.append(button, gone, Object.assign(document.createElement("span"), { className: "caption", textContent: `${entry.title}, ${number.format(entry.result?.faces || 0)} faces` }));
    return item;
  }));
}

// --- the gateway

async function ask() {
  let pause = 15000;
  try {
    able = await api.about();
    $("key-field").hidden = true;
    $("served").textContent = `${able.model || "unnamed weights"}${able.random_weights ? ", random weights" : ""}`;
    $("served").classList.toggle("away", !able.ready);
    $("served").hidden = false;
    const both = able.prompts && able.views > 0;
    document.querySelector(".tabs").hidden = !both;
    if (able.prompts && !able.views) choose("words");
    cloud.upright = able.model === "shapes";
    if (able.words.nouns) $("vocabulary").textContent = `It knows: ${[...able.words.attributes, ...able.words.nouns.slice(0, 8)].join(", ")}.`;
    $("background-field").hidden = !able.cutting || !able.views;
    $("steps").max = able.max_steps;
    $("steps").placeholder = `automatic (${able.steps})`;
    [...$("resolution").options].forEach((option) => { option.disabled = Number(option.value) > able.max_resolution; });
    if (!able.meshes) problem(new api.Problem("The server makes no meshes.", "The operator can deploy a shape decoder: hunyuan3d-export vae."));
    else if (["offline", "no_server", "key_needed"].includes($("problem").dataset.code)) problem(null);
    $("problem").dataset.code = "";
  } catch (error) {
    $("served").classList.add("away");
    problem(error);
    $("problem").dataset.code = error.code || "";
    pause = 4000;
  }
  ready();
  if ($("problem").dataset.code !== "key_needed") setTimeout(ask, pause);
}

function listen() {
  $("make").addEventListener("submit", make);
  $("cancel").addEventListener("click", cancel);
  $("file").addEventListener("change", () => { if ($("file").files.length) take([...$("file").files]); $("file").value = ""; });
  $("clear").addEventListener("click", () => { files = []; draw(); $("file").focus(); });
  $("prompt").addEventListener("input", ready);
  $("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 2 ** 32); });
  $("key").addEventListener("change", () => { api.useKey($("key").value); problem(null); ask(); });
  for (const name of ["picture", "words"]) {
    $(`tab-${name}`).addEventListener("click", () => choose(name));
    $(`tab-${name}`).addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      choose(name === "picture" ? "words" : "picture");
      $(`tab-${mode}`).focus();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("make").requestSubmit();
    if (event.key === "Escape" && following) cancel();
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (pasted.length) { event.preventDefault(); take(pasted); }
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) take([...event.dataTransfer.files]);
    });
  }
}

async function begin() {
  listen();
  examples();
  cloud.idle();
  past();
  await ask();
  const current = history.current();
  if (current) follow(current.id);
  await import("/static/vendor/model-viewer.min.js");
}

begin();
