// The page: settings, the conversation, and what the keys do. How the server is asked stands in client.js, how an answer
// looks in answer.js.

import { AnswerView, element, shown, verdict } from "./answer.js";
import { ask, chunks } from "./client.js";

const $ = (id) => document.getElementById(id);
const KEY = "medusa-api-key"; // in the storage of this tab
const NOTES = {
  greedy: "The model’s likeliest token at each place: the same text with any tree.",
  typical: "Takes a guess that is likely enough to the model, by ε and δ = √ε.",
  rejection: "Exactly the model’s own distribution: a seed gives the same text with any tree.",
};
const chat = { model: null, messages: [], running: null };

// Settings

const scheme = () => $("settings").elements.scheme.value;
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const key = () => $("key").value.trim();

function requestFields() {
  const chosen = scheme();
  const [epsilon, nodes] = [number("epsilon"), number("tree-nodes")];
  return {
    max_tokens: number("max-tokens"),
    temperature: chosen === "greedy" ? 0 : number("temperature"),
    seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31),
    ...(chosen !== "greedy" && { acceptance: chosen }),
    ...(chosen === "typical" && { epsilon, delta: Math.sqrt(epsilon) }),
    ...(nodes && { tree_nodes: nodes }),
  };
}

function described(request) {
  if (request.temperature === 0) return "greedy";
  const warmth = `temperature ${request.temperature}`;
  if (request.tree_nodes === 1) return warmth;
  return request.acceptance === "typical" ? `typical, ε ${request.epsilon}, ${warmth}` : `rejection, ${warmth}`;
}

function showSettings() {
  $("temperature-value").value = Number($("temperature").value).toFixed(1);
  $("epsilon-value").value = Number($("epsilon").value).toFixed(2);
  $("temperature").disabled = scheme() === "greedy";
  $("epsilon").disabled = scheme() !== "typical";
  $("scheme-note").textContent = NOTES[scheme()];
  document.body.classList.toggle("no-tints", !$("tints").checked);
}

// On a wide screen they are always open.
function openSettings(open, focused) {
  document.body.classList.toggle("settings-open", open);
  $("settings-toggle").setAttribute("aria-expanded", String(open));
  if (focused) $(focused).focus();
}

// The conversation

async function connect() {
  try {
    const { data } = await (await ask("v1/models", key())).json();
    chat.model = data[0].id;
    $("model").textContent = chat.model;
  } catch (error) {
    $("model").textContent = "not connected";
    throw error;
  }
}

// What follows keeps the end in view, if the reader is there now.
function following() {
  const log = $("conversation");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  return () => { if (atEnd) log.scrollTop = log.scrollHeight; };
}

async function stream(view, request, signal) {
  view.begin();
  let stopped = false;
  try {
    for await (const chunk of chunks(request, key(), signal)) {
      const follow = following();
      view.add(chunk);
      follow();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    stopped = true;
  }
  const follow = following();
  view.end(described(request), stopped);
  follow();
}

// One question and its answer, or its two answers: one after the other, so that neither slows the other.
async function take(question) {
  const views = [new AnswerView("Medusa"), ...($("compare").checked ? [new AnswerView("Plain decoding")] : [])];
  const root = element("div", views.length > 1 ? "turn two" : "turn", "",
    element("p", "question", question), element("div", "answers", "", ...views.map((view) => view.root)));
  $("conversation").append(root);
  $("conversation").scrollTop = $("conversation").scrollHeight;

  const running = new AbortController();
  const before = chat.messages;
  setRunning(running);
  let current = views[0];
  try {
    if (!chat.model) await connect();
    const fields = requestFields();
    const messages = [...before, { role: "user", content: question }];
    const stream_options = { include_usage: true, continuous_usage_stats: true };
    const request = { model: chat.model, messages, ...fields, stream: true, stream_options };
    views[1]?.wait("Its turn comes when the other has ended, so that neither slows the other.");
    await stream(current, request, running.signal);
    // A chat that was left meanwhile for a new one is not gone on with.
    if (root.isConnected) chat.messages = [...messages, { role: "assistant", content: current.text }];
    if (views[1]) {
      current = views[1];
      if (running.signal.aborted) current.wait("Stopped.");
      else await stream(current, { ...request, tree_nodes: 1 }, running.signal);
    }
    const told = views[1] && !running.signal.aborted && verdict(...views, fields.acceptance !== "typical");
    const follow = following();
    if (told) root.append(told);
    follow();
    const how = running.signal.aborted ? "Stopped" : "Done";
    $("status").textContent = `${how}. ${shown(views[0].count.perStep, 2)} tokens per step.`;
  } catch (error) {
    const follow = following();
    if (views[1] && current === views[0]) views[1].wait("Not asked.");
    current.fail(error, () => {
      root.remove();
      chat.messages = before;
      submit(question);
    });
    follow();
    if (error.status === 401) openSettings(true, "key");
  } finally {
    setRunning(null);
  }
}

function setRunning(controller) {
  chat.running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (controller) $("status").textContent = "Answering.";
}

function submit(question) {
  if (!question.trim() || chat.running) return;
  if (!$("settings").checkValidity()) {
    openSettings(true);
    $("settings").reportValidity();
    return;
  }
  openSettings(false);
  $("prompt").value = "";
  fit();
  if ($("welcome").contains(document.activeElement)) $("conversation").focus();
  $("welcome").hidden = true;
  $("new-chat").hidden = false;
  take(question.trim());
}

function newChat() {
  chat.running?.abort();
  chat.messages = [];
  $("welcome").hidden = false;
  $("new-chat").hidden = true;
  $("conversation").replaceChildren($("welcome"));
  $("prompt").focus();
}

// The field grows with what is written.
function fit() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function greet() {
  connect().catch((error) => {
    $("model").textContent = error.message;
    if (error.status === 401) openSettings(true, "key");
  });
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit($("prompt").value);
  });
  $("prompt").addEventListener("input", fit);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit($("prompt").value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") chat.running?.abort();
  });
  $("stop").addEventListener("click", () => {
    chat.running?.abort();
    $("prompt").focus();
  });
  $("new-chat").addEventListener("click", newChat);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("input", showSettings);
  $("settings-toggle").addEventListener("click", () => openSettings(!document.body.classList.contains("settings-open")));
  $("key").addEventListener("change", () => {
    sessionStorage.setItem(KEY, key());
    greet();
  });
  for (const button of document.querySelectorAll(".examples button"))
    button.addEventListener("click", () => submit(button.textContent));
}

$("key").value = sessionStorage.getItem(KEY) ?? "";
listen();
showSettings();
greet();
