/** Shows what /stats says: models, tiles, the timeline in drawings, words and a table. Fetches nothing. */

import { draw } from "./drawing.js";
import { bytes, count, duration, number, share } from "./words.js";

// Places in a row of the history.
const [TIME, PROMPT, OUTPUT, RUNNING, WAITING, KV, MFU] = [0, 1, 2, 3, 4, 5, 6];
const HALF_MINUTE = 30;
const MEASURE = "not measured: run `headrace bench peaks`";

const byId = (id) => document.getElementById(id);
const notes = new Map(["mfu", "mbu", "floor"].map((id) => [id, byId(`${id}-note`).textContent]));
let shown = null;

/** Bring the figures up to date with an answer of /stats. */
export function showFigures(stats) {
  shown = stats;
  showModels(stats.models);
  showTiles(stats.now);
  showTimeline(stats.history);
  say("version", stats.version);
  say("uptime", `has run for ${duration(stats.uptime_s)}`);
}

/** Draw again, as after a change of width. */
export function redraw() {
  if (shown) showTimeline(shown.history);
}

/** Set a text, but only where it changes, so that screen readers are not told the same again. */
export function say(id, words) {
  const element = byId(id);
  if (element.textContent !== words) element.textContent = words;
}

// The table is filled only while it is open.
byId("halves").closest("details").addEventListener("toggle", redraw);

function showModels(models) {
  const words = models.map((model) => `${model.name}, ${model.loaded ? model.precision : "not loaded"}`);
  const list = byId("models");
  if ([...list.children].map((item) => item.textContent).join("\n") === words.join("\n")) return;
  list.replaceChildren(...words.map((word) => cell("li", word)));
  document.title = models.length === 1 ? `${models[0].name}: Headrace` : "Headrace";
}

function showTiles(now) {
  say("output-rate", number(now.output_tokens_per_s));
  say("prompt-rate", number(now.prompt_tokens_per_s));
  say("running", number(now.running));
  say("waiting", `${number(now.waiting)} waiting, ${number(now.background)} of batches`);
  say("finished", number(now.finished));
  say("refused", `${number(now.refused)} refused`);
  showShare("mfu", now.mfu);
  showShare("mbu", now.mbu);
  showShare("floor", now.floor_share);
  const used = now.kv_budget_bytes ? now.kv_used_bytes / now.kv_budget_bytes : 0;
  say("kv", share(used));
  say("kv-note", `${bytes(now.kv_used_bytes)} of ${bytes(now.kv_budget_bytes)}`);
  byId("kv-bar").value = used;
}

function showShare(id, value) {
  const words = share(value);
  say(id, words ?? "–");
  say(`${id}-note`, words === null ? MEASURE : notes.get(id));
}

function showTimeline(history) {
  const rates = [{ place: PROMPT, name: "prompt" }, { place: OUTPUT, name: "output" }];
  const queue = [{ place: RUNNING, name: "running" }, { place: WAITING, name: "waiting" }];
  draw(byId("rates"), history, rates, "Prompt and output tokens a second over the last five minutes");
  draw(byId("queue"), history, queue, "Requests running and waiting over the last five minutes");
  if (!history.length) return;
  say("rates-words", `Output: ${spell(history, OUTPUT)}. Prompts: ${spell(history, PROMPT)}.`);
  say("queue-words", `Running: ${spell(history, RUNNING)}. Waiting: ${spell(history, WAITING)}.`);
  const halves = byId("halves");
  if (halves.closest("details").open) halves.replaceChildren(...cutHalves(history).map(describeHalf));
}

/** A series in words, for those who do not see the drawing. */
function spell(rows, place) {
  const values = rows.map((row) => row[place]);
  return `${number(values[values.length - 1])} now, ${number(mean(values))} on average, ${number(Math.max(...values))} at most`;
}

/** Rows in groups of half a minute, the latest first: [seconds ago at the group's beginning, rows]. */
function cutHalves(history) {
  const end = history[history.length - 1][TIME];
  const groups = new Map();
  for (const row of history) {
    const ago = (Math.floor((end - row[TIME]) / HALF_MINUTE) + 1) * HALF_MINUTE;
    groups.set(ago, [...(groups.get(ago) ?? []), row]);
  }
  return [...groups].sort(([one], [other]) => one - other);
}

function describeHalf([ago, rows]) {
  const column = (place) => rows.map((row) => row[place]);
  const known = column(MFU).filter((value) => value !== null);
  const means = [PROMPT, OUTPUT, RUNNING, WAITING].map((place) => number(mean(column(place))));
  const line = document.createElement("tr");
  const head = cell("th", `${ago} to ${ago - HALF_MINUTE}`);
  head.scope = "row";
  const rest = [...means, bytes(Math.max(...column(KV))), known.length ? share(mean(known)) : "–"];
  line.append(head, ...rest.map((words) => cell("td", words)));
  return line;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

export function cell(tag, words) {
  const element = document.createElement(tag);
  element.textContent = words;
  return element;
}

/** What is done of a batch, in words. */
export function describeProgress(batch) {
  const failed = batch.failed ? `, ${number(batch.failed)} failed` : "";
  return `${number(batch.completed)} of ${count(batch.total, "row")}${failed}`;
}
