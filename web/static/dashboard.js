// The dashboard: /metrics read every second, rates and percentiles of the last minute, drawn over five; below them the last
// requests, of /recent_requests.
//
// Knows Prometheus' text format and the names of metrics; the server computes nothing for it.

import { ask, key, make } from "./api.js";

const EVERY_MS = 1000, ANSWER_MS = 10_000; // a server that hangs is told of, too
const ROWS = 20, RECENT_MS = 3000; // of the last requests
const WINDOW = 60, DRAWN = 300; // readings: of rates and percentiles, of lines
const at = (id) => document.getElementById(id);
const history = []; // readings, the newest last: {time, samples: Map of name -> [{labels, value}]}

function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const found = line.match(/^([\w:]+)(?:\{(.*)\})? (\S+)/);
    if (!found || line.startsWith("#")) continue;
    const labels = Object.fromEntries([...(found[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    if (!samples.has(found[1])) samples.set(found[1], []);
    samples.get(found[1]).push({ labels, value: Number(found[3]) });
  }
  return samples;
}

/** The sum of a metric's samples that have these labels; 0 where there is none. */
function sum(reading, name, labels = {}) {
  const matching = (reading.samples.get(name) || []).filter((one) => Object.entries(labels).every(([label, value]) => one.labels[label] === value));
  return matching.reduce((total, one) => total + one.value, 0);
}

/** Of all engines of the server: a share that each has of its own. */
function mean(reading, name) {
  return sum(reading, name) / Math.max((reading.samples.get(name) || []).length, 1);
}

/** The reading `count` before reading `end`, or the first of a server that has been restarted since. */
function before(end, count) {
  let start = end;
  while (start > 0 && end - start < count && sum(history[start - 1], "pagegraph:engine_steps_total") <= sum(history[start], "pagegraph:engine_steps_total")) start--;
  return history[start];
}

const grown = (end, count, name, labels) => sum(history[end], name, labels) - sum(before(end, count), name, labels);
const rate = (end, count, name, labels) => grown(end, count, name, labels) / Math.max((history[end].time - before(end, count).time) / 1000, 1e-9);
const share = (end, part, whole) => { const all = grown(end, WINDOW, whole); return all ? grown(end, WINDOW, part) / all : NaN; };

/** Percentile of a histogram, seconds, of the last minute, or of all since the start; linear within a bucket. */
function percentile(end, name, share, ofAll = false) {
  const start = before(end, WINDOW);
  const buckets = (history[end].samples.get(`${name}_bucket`) || []).map(({ labels }) => labels.le);
  const counts = buckets.map((le) => sum(history[end], `${name}_bucket`, { le }) - (ofAll ? 0 : sum(start, `${name}_bucket`, { le })));
  const wanted = share * counts.at(-1);
  if (!(wanted > 0)) return NaN;
  const place = counts.findIndex((count) => count >= wanted);
  const [low, high] = [place ? Number(buckets[place - 1]) : 0, Number(buckets[place])];
  if (!Number.isFinite(high)) return low;
  const below = place ? counts[place - 1] : 0;
  return low + (high - low) * (wanted - below) / (counts[place] - below);
}

/** Percentiles in words, of the last minute where it has any. */
function within(end, name, shares) {
  const ofAll = !Number.isFinite(percentile(end, name, 0.5));
  const found = shares.map((share) => `${100 * share} of 100 within ${time(percentile(end, name, share, ofAll))}`);
  if (!ofAll) return found.join(", ");
  return Number.isFinite(percentile(end, name, 0.5, true)) ? `since the start: ${found.join(", ")}` : "none yet";
}

const count = (value) => Math.round(value).toLocaleString("en");
const number = (value) => !Number.isFinite(value) ? "-" : !value ? "0" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(value >= 10 ? 1 : 2);
const percent = (value) => Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : "-";
const time = (seconds) => !Number.isFinite(seconds) ? "-" : seconds < 1 ? `${number(1000 * seconds)} ms` : `${number(seconds)} s`;

const V = "vllm:", OWN = "pagegraph:";
const [TTFT, ITL] = [`${V}time_to_first_token_seconds`, `${V}inter_token_latency_seconds`];
// title, the drawn value of reading `end`, how it is written, a line below it, the metric without which there is no card
const CARDS = [
  ["Tokens generated a second", (end) => rate(end, 3, `${V}generation_tokens_total`), number, (end) => `${number(rate(end, WINDOW, `${V}generation_tokens_total`))} over a minute`],
  ["Tokens of prompts a second", (end) => rate(end, 3, `${V}prompt_tokens_total`), number, hits],
  ["Requests running", (end) => sum(history[end], `${V}num_requests_running`), count, (end) => `${count(sum(history[end], `${V}num_requests_waiting`))} waiting`],
  ["KV cache in use", (end) => mean(history[end], `${V}kv_cache_usage_perc`), percent, (end) => `${count(grown(end, WINDOW, `${V}num_preemptions_total`))} preemptions in a minute`],
  ["Time to first token, median", (end) => percentile(end, TTFT, 0.5), time, (end) => within(end, TTFT, [0.95])],
  ["Between tokens, median", (end) => percentile(end, ITL, 0.5), time, (end) => within(end, ITL, [0.95, 0.99])],
  ["Requests ended in a minute", (end) => grown(end, WINDOW, `${V}request_success_total`), count, reasons],
  ["Steps a second", (end) => rate(end, 3, `${OWN}engine_steps_total`), number, steps],
  ["Draft tokens accepted", (end) => share(end, `${V}spec_decode_num_accepted_tokens_total`, `${V}spec_decode_num_draft_tokens_total`), percent, (end) => `${number(rate(end, WINDOW, `${V}spec_decode_num_draft_tokens_total`))} drafted a second`, `${V}spec_decode_num_draft_tokens_total`],
];

function hits(end) {
  const found = share(end, `${V}prompt_tokens_cached_total`, `${V}prompt_tokens_total`);
  return Number.isFinite(found) ? `${percent(found)} of them out of the prefix cache` : "no prompt in this minute";
}

function steps(end) {
  const graphs = mean(history[end], `${OWN}graph_hit_ratio`);
  const padding = share(end, `${OWN}engine_padding_tokens_total`, `${OWN}engine_step_tokens_total`);
  return [Number.isFinite(padding) && `${percent(padding)} padding`, graphs && `${percent(graphs)} in CUDA graphs`].filter(Boolean).join(", ");
}

function reasons(end) {
  const found = [...new Set((history[end].samples.get(`${V}request_success_total`) || []).map(({ labels }) => labels.finished_reason))];
  const counts = found.map((finished_reason) => [finished_reason, grown(end, WINDOW, `${V}request_success_total`, { finished_reason })]);
  return counts.filter(([, number]) => number).map(([reason, number]) => `${reason} ${count(number)}`).join(", ");
}

const SVG = "http://www.w3.org/2000/svg";
function drawing(title) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${DRAWN} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title}, over five minutes`);
  const [area, line, base] = ["polygon", "polyline", "line"].map((kind) => svg.appendChild(document.createElementNS(SVG, kind)));
  for (const [name, value] of Object.entries({ x1: 0, x2: DRAWN, y1: 99, y2: 99 })) base.setAttribute(name, value);
  return { svg, area, line };
}

function draw({ area, line }, values) {
  const top = Math.max(...values.filter(Number.isFinite), 0) || 1;
  const points = values.map((value, i) => [DRAWN - values.length + i + 1, 98 - 92 * (Number.isFinite(value) ? value : 0) / top]);
  const text = points.map((point) => point.map((one) => one.toFixed(1)).join(",")).join(" ");
  line.setAttribute("points", text);
  area.setAttribute("points", points.length ? `${points[0][0]},100 ${text} ${points.at(-1)[0]},100` : "");
}

const cards = CARDS.map(([title, value, written, below, needed]) => {
  const [now, more, peak] = ["now", "more", "peak"].map((className) => make("div", { className }));
  const picture = drawing(title);
  const place = make("section", { className: "card", hidden: true }, make("div", { className: "top" }, make("h2", {}, title), peak), now, more, picture.svg);
  at("cards").append(place);
  return { place, value, written, below, needed, now, more, peak, picture, values: [] };
});

function show() {
  const end = history.length - 1;
  for (const card of cards) {
    card.values.push(card.value(end));
    if (card.values.length > DRAWN) card.values.shift();
    const most = Math.max(...card.values.filter(Number.isFinite), 0);
    card.place.hidden = Boolean(card.needed) && !sum(history[end], card.needed);
    card.peak.textContent = most ? `most ${card.written(most)}` : "";
    card.now.textContent = card.written(card.values.at(-1));
    card.more.textContent = card.below(end);
    draw(card.picture, card.values);
  }
}

/** What became of the last requests, the newest first; the server tells no text of them. */
async function readRecent() {
  try {
    const { data } = await (await ask("recent_requests", { signal: AbortSignal.timeout(ANSWER_MS) })).json();
    at("recent").hidden = !data.length;
    at("rows").replaceChildren(...data.slice(0, ROWS).map((one) => make("tr", {}, ...cells(one).map((text) => make("td", { title: text }, text)))));
  } catch (error) {
    if (error.status === 401) at("recent").hidden = true; // an engine in a long step does not answer at once: what was read stays
  }
  setTimeout(readRecent, RECENT_MS);
}

/** How much of a prompt the prefix cache had, and why no more. */
const cached = (one) => [count(one.cached_tokens), one.cache_miss_reason?.replace("_", " ")].filter(Boolean).join(", ");

function cells(one) {
  const seconds = (value) => time(value ?? NaN);
  const toFirst = one.queue_s === null || one.prefill_s === null ? null : one.queue_s + one.prefill_s;
  const pace = one.completion_tokens > 1 && one.decode_s > 0 ? number((one.completion_tokens - 1) / one.decode_s) : "-";
  const ended = new Date(1000 * (one.created + (one.total_s ?? 0))).toLocaleTimeString();
  return [ended, one.finish_reason, count(one.prompt_tokens), cached(one), count(one.completion_tokens), seconds(one.queue_s), seconds(toFirst), pace, seconds(one.total_s), one.request_id];
}

async function read() {
  try {
    const text = await (await ask("metrics", { signal: AbortSignal.timeout(ANSWER_MS) })).text();
    history.push({ time: performance.now(), samples: parse(text) });
    if (history.length > DRAWN) history.shift();
    at("ask").hidden = true;
    at("state").textContent = "";
    at("model").textContent = history.at(-1).samples.get(`${V}num_requests_running`)?.[0]?.labels.model_name ?? "";
    if (history.length > 1) show();
  } catch (error) {
    at("ask").hidden = error.status !== 401;
    at("state").textContent = error.status === 401 && !key.get() ? "This server asks for an API key." : `The metrics cannot be read: ${error.message}`;
  }
  setTimeout(read, EVERY_MS);
}

at("key").onchange = () => key.set(at("key").value);
read();
readRecent();
