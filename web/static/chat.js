// The chat page: a conversation kept in this browser, answered by /v1/chat/completions as it streams.
//
// The conversation is a list of messages as the API takes them, with what else is shown beside each: reasoning, figures.

import { ask, key, make } from "./api.js";

const KEPT = "pagegraph.chat";
const CUT = "The connection was closed before the answer's end.";
const LEAST_STREAMED_MS = 100; // what comes all at once has no rate
// A tab keeps its own conversation; a new one begins with that of the tab that was last.
const STORAGES = [() => sessionStorage, () => localStorage];
const at = (id) => document.getElementById(id);
const [list, input, form, stop] = ["messages", "input", "form", "stop"].map(at);
const parameters = at("parameters");
const main = document.querySelector("main");

let messages = []; // {role, content, reasoning?, calls?, tool_call_id?, figures?}
let running = null; // AbortController of the answer that streams
let model = "";

// -- what is kept

function keep() {
  const { key: _, ...fields } = Object.fromEntries(new FormData(parameters));
  const content = JSON.stringify({ messages: messages.filter((one) => one !== empty()), fields });
  for (const storage of STORAGES) {
    try {
      storage().setItem(KEPT, content);
    } catch { /* full, or forbidden: the page works without */ }
  }
}

/** The answer at the end of which nothing has come. */
function empty() {
  const last = messages.at(-1);
  return last?.role === "assistant" && !last.content && !last.reasoning && !last.calls ? last : undefined;
}

function remember() {
  for (const storage of STORAGES) {
    try {
      const kept = JSON.parse(storage().getItem(KEPT));
      if (!Array.isArray(kept.messages) || !kept.messages.every(isMessage)) continue;
      messages = kept.messages;
      for (const [name, value] of Object.entries(kept.fields || {})) if (parameters.elements[name]) parameters.elements[name].value = value;
      break;
    } catch { /* nothing there, or not ours */ }
  }
  parameters.elements.key.value = key.get();
}

function isMessage(one) {
  const isText = (value) => typeof value === "string";
  const isCall = (call) => isText(call.id) && isText(call.function.name) && isText(call.function.arguments);
  return ["user", "assistant", "tool"].includes(one.role) && isText(one.content) && isText(one.reasoning ?? "") && (one.calls ?? []).every(isCall);
}

// -- what is shown

const purify = (text) => DOMPurify.sanitize(marked.parse(text, { gfm: true, breaks: true }), { FORBID_TAGS: ["img", "style", "form", "input", "button"], FORBID_ATTR: ["style"] });

function showAnswer(place, text) {
  place.innerHTML = purify(text);
  for (const link of place.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const block of place.querySelectorAll("pre")) {
    const code = block.textContent;
    block.tabIndex = 0; // it may scroll
    block.append(action("Copy", () => navigator.clipboard.writeText(code), "Copy this code"));
  }
}

function action(text, run, label = text) {
  const button = make("button", { type: "button", className: "small", textContent: text, onclick: run });
  button.setAttribute("aria-label", label);
  return button;
}

function folded(title, body, open = false) {
  return make("details", { open }, make("summary", {}, title), make("div", { className: "body" }, body));
}

/** The element of one message; it is replaced while it streams. */
function shown(message, index) {
  const place = make("article", { className: `message ${message.role}` });
  place.setAttribute("aria-label", message.role === "user" ? "You" : message.role === "tool" ? "Result of a tool" : "Answer");
  if (message.role === "tool") {
    place.append(folded("Result of the tool", message.content));
    return place;
  }
  const isLast = index === messages.length - 1;
  if (message.reasoning) place.append(folded(message.content || !isLast ? "Reasoning" : "Reasoning ...", message.reasoning));
  const body = make("div", { className: message.role === "user" ? "body" : "answer" });
  if (message.role === "user") body.textContent = message.content;
  else showAnswer(body, message.content || "");
  if (isLast && running && !message.content && !message.reasoning) body.classList.add("waiting");
  place.append(body);
  const after = messages.slice(index + 1);
  const isAsking = (call) => !running && after.every((one) => one.role === "tool" && one.tool_call_id !== call.id);
  for (const call of message.calls || []) place.append(shownCall(call, isAsking(call)));
  const tools = make("div", { className: "tools" });
  if (!(isLast && running)) {
    if (message.role === "user") tools.append(action("Edit", () => edit(index), "Edit this message"));
    else tools.append(action("Regenerate", () => again(index), "Answer again"), action("Copy", () => navigator.clipboard.writeText(message.content), "Copy this answer"));
  }
  if (message.figures) tools.append(make("span", { className: "figures" }, message.figures));
  place.append(tools);
  return place;
}

function shownCall(call, isOpen) {
  const place = folded(`Calls ${call.function.name}`, call.function.arguments, isOpen);
  if (isOpen) {
    const result = make("textarea", { rows: 2, placeholder: "What the tool answers" });
    result.setAttribute("aria-label", `Result of ${call.function.name}`);
    const send = make("button", { type: "button", textContent: "Send result" });
    send.onclick = () => {
      messages.push({ role: "tool", tool_call_id: call.id, content: result.value });
      const answered = messages.filter((one) => one.role === "tool").map((one) => one.tool_call_id);
      const asked = messages.findLast((one) => one.calls)?.calls ?? [];
      show();
      if (asked.every((one) => answered.includes(one.id))) answer(() => messages.pop());
    };
    place.append(result, send);
  }
  return place;
}

function show() {
  list.replaceChildren(...messages.map(shown));
  at("empty").hidden = messages.length > 0;
  toEnd();
}

function showLast() {
  const wasAtEnd = isAtEnd();
  const index = messages.length - 1;
  const [old, place] = [list.lastElementChild, shown(messages[index], index)];
  const open = [...old.querySelectorAll("details")].map((one) => one.open);
  [...place.querySelectorAll("details")].forEach((one, i) => { one.open = open[i] ?? one.open; });
  old.replaceWith(place);
  if (wasAtEnd) toEnd();
}

const isAtEnd = () => main.scrollHeight - main.scrollTop - main.clientHeight < 80;
const toEnd = () => { main.scrollTop = main.scrollHeight; };

function say(error) {
  at("error").textContent = error || "";
  at("error").hidden = !error;
}

// -- what is sent

function body() {
  const given = Object.fromEntries([...new FormData(parameters)].filter(([, value]) => value.trim() !== ""));
  const { system, tools, key: _, ...numbers } = given;
  const sent = messages.map(({ role, content, calls, tool_call_id }) => ({
    role, content, ...(calls?.length ? { tool_calls: calls } : {}), ...(tool_call_id ? { tool_call_id } : {}),
  }));
  return {
    stream: true, stream_options: { include_usage: true },
    messages: system ? [{ role: "system", content: system }, ...sent] : sent,
    ...Object.fromEntries(Object.entries(numbers).map(([name, value]) => [name, Number(value)])),
    ...(tools ? { tools: JSON.parse(tools) } : {}),
  };
}

/** Ask for an answer to the messages; `undo` puts things back as they were if nothing of it comes. */
async function answer(undo) {
  say();
  let request;
  try {
    request = body();
  } catch (error) {
    say(`Tools: ${error.message}`);
    at("settings").open = true;
    undo();
    show();
    return;
  }
  keep();
  const message = { role: "assistant", content: "" };
  messages.push(message);
  running = new AbortController();
  [at("send").hidden, stop.hidden] = [true, false];
  at("status").textContent = "Answering";
  show();
  const begun = performance.now();
  let first = 0, usage = null, due = 0;
  const redraw = () => { due ||= requestAnimationFrame(() => { due = 0; if (running) showLast(); }); };
  try {
    if (!model) await findModel();
    const options = { method: "POST", body: JSON.stringify({ model, ...request }), signal: running.signal, headers: { "Content-Type": "application/json" } };
    for await (const event of events(await ask("v1/chat/completions", options))) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      const delta = event.choices?.[0]?.delta;
      if (!delta) continue;
      if (delta.content || delta.reasoning_content || delta.reasoning || delta.tool_calls) first ||= performance.now();
      message.content += delta.content || "";
      const thought = delta.reasoning_content || delta.reasoning;
      if (thought) message.reasoning = (message.reasoning || "") + thought;
      for (const part of delta.tool_calls || []) addCall(message, part);
      redraw();
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.status === 401 ? `${error.message} (Settings, API key)` : error.message);
    if (error.status === 401) at("settings").open = true;
    if (error.status === 404) model = ""; // another one may be served now
  }
  first ||= performance.now();
  message.figures = figures(usage, first - begun, performance.now() - first, running.signal.aborted);
  if (empty() === message) {
    messages.pop();
    undo();
    if (at("error").hidden && !running.signal.aborted) say("The answer is empty.");
  }
  running = null;
  [at("send").hidden, stop.hidden] = [false, true];
  at("status").textContent = at("error").hidden ? "Answered" : "";
  show();
  keep();
  input.focus();
}

function addCall(message, part) {
  message.calls ??= [];
  const call = (message.calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  call.id = part.id || call.id;
  call.function.name += part.function?.name || "";
  call.function.arguments += part.function?.arguments || "";
}

function figures(usage, toFirst, streamed, stopped) {
  if (!usage) return stopped ? "stopped" : "";
  const tokens = usage.completion_tokens;
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const rate = tokens > 1 && streamed >= LEAST_STREAMED_MS ? `, ${((tokens - 1) / streamed * 1000).toFixed(1)} tokens/s` : "";
  return `${tokens} tokens${rate}, first after ${(toFirst / 1000).toFixed(2)} s; prompt ${usage.prompt_tokens}${cached ? `, ${cached} of it cached` : ""}`;
}

/** The events of a stream, parsed, up to [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const read = () => reader.read().catch((error) => {
    throw error.name === "AbortError" ? error : new Error(CUT);
  });
  let text = "";
  for (let part = await read(); !part.done; part = await read()) {
    text += part.value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
  throw new Error(CUT);
}

// -- what people do

function again(index) {
  if (running) return;
  const taken = messages.splice(index);
  answer(() => messages.push(...taken));
}

function edit(index) {
  if (running) return;
  input.value = messages[index].content;
  messages.length = index;
  show();
  keep();
  grow();
  input.focus();
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

form.onsubmit = (event) => {
  event.preventDefault();
  const content = input.value.trim();
  if (running || !content) return;
  messages.push({ role: "user", content });
  input.value = "";
  grow();
  answer(() => {
    messages.pop();
    input.value ||= content;
    grow();
  });
};
input.oninput = grow;
input.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  } else if (event.key === "ArrowUp" && !input.value) {
    const last = messages.findLastIndex((one) => one.role === "user");
    if (last >= 0) { event.preventDefault(); edit(last); }
  }
};
stop.onclick = () => running?.abort();
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
at("new").onclick = () => {
  running?.abort();
  messages = [];
  say();
  show();
  keep();
  input.focus();
};
parameters.onsubmit = (event) => event.preventDefault();
parameters.onchange = () => {
  key.set(parameters.elements.key.value);
  keep();
  if (!model) name();
};

async function findModel() {
  model = (await (await ask("v1/models")).json()).data[0].id;
  at("model").textContent = model;
}

async function name() {
  try {
    await findModel();
    say();
  } catch (error) {
    say(error.status === 401 ? "This server asks for an API key: Settings, API key." : error.message);
    at("settings").open ||= error.status === 401;
  }
}

addEventListener("pagehide", keep);
addEventListener("DOMContentLoaded", () => {
  remember();
  show();
  name();
  input.focus();
});
